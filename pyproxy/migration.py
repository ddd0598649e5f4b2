"""Moves a node from what carries its Service traffic to one of our modes, and back if that fails.

The new rules come beside the old ones, which are then taken out of the packets' way, but stay. Only
when cluster IPs answer by the new ones alone are the old ones removed. At each moment a new
connection meets one of the two, and established ones go on as connection tracking has noted them.
A little long: what may be moved, the move, and how it is tried are read together.
"""

import argparse
import asyncio
import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from pyproxy import proxier
from pyproxy.aftermath import clean_up_after_others, cleaned_up_after_others, outlast
from pyproxy.app import App, Fatal
from pyproxy.config import NAT_MODES, Config
from pyproxy.config.text import duration_text
from pyproxy.feed import Feed
from pyproxy.http import parse_bind
from pyproxy.lane import Lane
from pyproxy.model import Address, Change, Family, Forward, ObjectName, family_of
from pyproxy.plan import Plan
from pyproxy.proxier._ipvsdrain import connections, waiting
from pyproxy.proxier._others import Other, OthersError, found
from pyproxy.reconcile import ApplyError, Proxier

WRITE_SECONDS = 120.0
PROBE_SECONDS = 2.0
PROBE_ATTEMPTS = 3
PROBES = 20
STOPOVER = "nftables"
DETOUR = 3  # the exit code of a look that found that it takes two moves
MOST_BACKENDS = 5  # that a probe asks directly
LOOKS, PAUSE_SECONDS = 20, 0.05  # between two syncs
LAST_SECONDS = 1.0  # for what is relayed when NAT begins: most requests take less
T = TypeVar("T")

Say = Callable[[str], None]


class Request(NamedTuple):
    """What the command's own words say."""

    to: str
    then_run: bool
    dry_run: bool
    probes: int
    is_stopover: bool = False  # serve until virtual servers hold nothing, then end

    def stopover(self) -> "Request":
        """Return the first of two moves, where virtual servers have what sockets cannot have."""
        return self._replace(to=STOPOVER, is_stopover=True)


class Probe(NamedTuple):
    """A cluster IP that is to answer, because all of these do."""

    asked: Address
    backends: tuple[Address, ...]


class Situation(NamedTuple):
    """What is on the node before anything is changed."""

    others: tuple[Other, ...]
    running: str | None  # the mode of the proxy that runs, "" if it does not tell
    held: int = 0  # connections of virtual servers, which sockets cannot take over
    no_stopover: str | None = None  # why their end cannot be waited for in another mode


class QuietFeed:
    """A feed without Events: they are for the proxy that stays."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    async def follow(self, on_change: Callable[[Change], None]) -> None:
        await self._feed.follow(on_change)

    async def record(
        self, reason: str, message: str, *, warning: bool, action: str, service: ObjectName | None
    ) -> None:
        pass

    async def annotate(self, annotations: Mapping[str, str]) -> str | None:
        return None

    async def aclose(self) -> None:
        await self._feed.aclose()


# --- what is asked for, and whether it can be -----------------------------------------------------


def request(words: Sequence[str]) -> tuple[Request, list[str]]:
    """Read what is the command's own; return it with the flags that it shares with ``run``."""
    parser = argparse.ArgumentParser(
        prog="pyproxy migrate",
        description="Have this node's Service traffic carried by another mode, without losing a"
        " connection: write the new rules beside the old, try them alone, remove the old. If"
        " anything fails, the old rules are back as they were, and the exit code is 1.",
        epilog="All flags of pyproxy run count as well: give those that the DaemonSet has, such as"
        " --config or --manifests.",
        allow_abbrev=False,
    )
    parser.add_argument("--to", required=True, metavar="MODE", help=", ".join(proxier.modes()))
    parser.add_argument(
        "--then-run",
        action="store_true",
        help="stay and serve; without it the DaemonSet takes over",
    )
    parser.add_argument("--dry-run", action="store_true", help="check, say what would be done, end")
    parser.add_argument(
        "--probes", type=int, default=PROBES, metavar="N",
        help="how many cluster IPs are tried for each family (default: %(default)s)",
    )  # fmt: skip
    own, shared = parser.parse_known_args(words)
    return Request(own.to, own.then_run, own.dry_run, own.probes), shared


async def situation(config: Config, families: Sequence[Family]) -> Situation:
    """Look who carries traffic here. Raises ``OthersError``."""
    others = [other for family in families for other in await found(family)]
    try:
        held = await connections(families, config) if config.mode == "userspace" else 0
    except OSError as error:
        raise OthersError(f"cannot look at virtual servers: {error.strerror}") from error
    no_stopover = proxier.load(STOPOVER).unsupported() if held else None
    return Situation(tuple(others), await running_mode(config), held, no_stopover)


async def running_mode(config: Config) -> str | None:
    """Return the mode of the proxy on this node, as its metrics port tells; None without one."""
    if config.metrics_bind_address:
        answer = await _got(config.metrics_bind_address, "/proxyMode")
        if answer is not None:
            return answer
    if (
        config.healthz_bind_address
        and await _got(config.healthz_bind_address, "/livez") is not None
    ):
        return ""
    return None


async def _got(bind: str, path: str) -> str | None:
    """Return the body of what is there, None if nobody listens."""
    ip, port = parse_bind(bind)
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            reader, writer = await asyncio.open_connection(ip or "127.0.0.1", port)
            writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            text = (await reader.read(65536)).decode(errors="replace")
            writer.close()
    except OSError:  # which a TimeoutError is
        return None
    return text.partition("\r\n\r\n")[2].strip()


def obstacle(asked: Request, now: Situation) -> str | None:
    """Return why the move cannot be made now; None if it can."""
    running = now.running
    if asked.to == "userspace" and not asked.then_run:
        return "mode userspace lives in its process: add --then-run, or start the DaemonSet instead"
    if now.no_stopover is not None:
        return (
            f"{now.held} connections of virtual servers would be cut, and mode {STOPOVER}, in which"
            f" their end can be waited for, cannot work on this node: {now.no_stopover} (give"
            " --ipvs-drain-timeout=0 to cut them)"
        )
    if running is None:
        return None
    name = f"a proxy in mode {running}" if running else "a proxy"
    if running == asked.to:
        return f"{name} runs here already; if it is kube-proxy, stop it: its rules stay, and serve"
    if asked.then_run:
        return f"{name} runs here, on the ports of this one: stop it, its rules stay, and serve"
    return None


def way(now: Situation, config: Config) -> str:
    """Return, in words, where the move leads, and by way of what."""
    if not now.held or now.no_stopover is not None:
        return config.mode
    most = duration_text(config.ipvs.drain_timeout_seconds)
    return (
        f"{config.mode}, by way of {STOPOVER}: move there, serve until {now.held} connections of"
        f" virtual servers have ended (at most {most}, as ipvs.drainTimeout asks), and move on"
    )


def described(now: Situation) -> str:
    """Return, in words, who carries traffic."""
    what = ", ".join(map(str, now.others)) or "nobody"
    if now.running is None:
        return what
    return f"{what}; a proxy {f'in mode {now.running} ' * bool(now.running)}is running"


# --- the move -------------------------------------------------------------------------------------


class Migration:
    """One move, made by an ``App`` that writes the new mode's rules."""

    def __init__(self, asked: Request, now: Situation, config: Config, say: Say) -> None:
        self._asked = asked
        self._now = now
        self._config = config
        self._say = say
        self._silent: list[Other] = []
        self._written: tuple[tuple[Lane, Proxier], ...] = ()
        self._is_over = False  # and cannot be undone
        self._waits = False  # what was there before, for the end of its connections
        self._may_go_on = False  # to another move: nobody asked to end before this one has

    def feed(self, feed: Feed) -> Feed:
        """Return what the app is to follow."""
        return feed if self._asked.then_run else QuietFeed(feed)

    async def run(self, app: App) -> None:
        """Make the move; stop the app when it is made, or raise ``Fatal``."""
        try:
            await self._move(app)
        except (OthersError, ApplyError) as error:
            raise Fatal(f"migrate: {error}") from error
        finally:
            self._written = app.carriers()
            if not self._is_over:
                await self._wake()
        if self._waits and self._asked.is_stopover:
            await self._outlast([lane.family for lane, _carrier in app.carriers()])
        self._may_go_on = True
        if self._asked.is_stopover or not self._asked.then_run:
            app.stop()
        elif self._waits:
            await clean_up_after_others(self._config, asyncio.get_running_loop().time)

    async def _outlast(self, families: Sequence[Family]) -> None:
        """Serve until virtual servers have ended. Raises ``Fatal`` where they do not."""
        held = partial(connections, families, self._config)
        clock = asyncio.get_running_loop().time
        if left := await outlast(held, self._config, clock, self._say):
            raise Fatal(f"migrate: {self._asked.to} serves, and of the old is left: {left.what}")
        self._say("removed: virtual servers")

    async def free_ports(self) -> None:
        """Until the move is made, let clients have ports that were relayed in their names."""
        while (relayed := self._relayed()) and not self._is_over:
            for other in relayed:
                await other.silence()
            await asyncio.sleep(PAUSE_SECONDS)

    def _relayed(self) -> list[Other]:
        """Return what relayed so far, where the new mode leads past it."""
        others = [other for other in self._now.others if other.mode == "userspace"]
        return [] if self._asked.to == "userspace" else others

    async def undo(self) -> bool:
        """If the move was not made, remove the new rules; say whether it was, and to its end."""
        if self._is_over:
            return self._may_go_on or not self._asked.is_stopover
        if any(other.continues_as(self._asked.to) for other in self._now.others):
            self._say(f"rules of mode {self._asked.to} were here before: they stay as they are now")
            return False
        for _lane, carrier in self._written:
            try:
                await carrier.clear()
            except ApplyError as error:
                self._say(f"cannot remove the new rules: {error}")
        before = ", ".join(map(str, self._now.others)) or "nobody"
        self._say(f"rolled back: mode {self._asked.to} has no rules; as before serves: {before}")
        return False

    async def _move(self, app: App) -> None:
        await self._settled(app)
        entries = 0
        for lane, carrier in app.carriers():
            entries += await compared(lane, carrier)
        plans = [lane.plan for lane, _carrier in app.carriers()]
        ports = sum(len(plan.ports) for plan in plans)
        self._say(
            f"written: {ports} ports of Services, {entries} entries, compared with the kernel"
        )
        if self._now.running is not None:
            await self._probe(plans, "beside the other proxy")
            await asyncio.sleep(LAST_SECONDS if self._relayed() else 0)
            self._is_over = True
            self._say("left: what the other proxy serves by; pyproxy run removes it when that ends")
            return
        await self._remove_followers([lane.family for lane, _carrier in app.carriers()])
        await self._silence()
        await self._probe(plans, "alone")
        self._is_over = True
        left = await cleaned_up_after_others(self._config)
        if left is not None and not left.waits:
            raise Fatal(f"migrate: the new rules serve, and of the old some are left: {left.what}")
        self._waits = left is not None
        self._say("removed: what was there before" + (f", but {left.what}" if left else ""))
        await self._probe(plans, "after the removal")

    async def _settled(self, app: App) -> None:
        """Wait until everything is written. Raises ``Fatal`` where something cannot be."""
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await app.settled()
        except TimeoutError as error:
            why = "; ".join(app.troubles())
            raise Fatal(f"migrate: not written after {WRITE_SECONDS:.0f} s: {why}") from error
        lost = [
            why
            for lane, _carrier in app.carriers()
            for owner in lane.plan.ports
            for why in lane.progress.refusals(owner)
        ]
        if lost:
            more = f", and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise Fatal(f"migrate: this node cannot serve {'; '.join(lost[:3])}{more}")

    async def _remove_followers(self, families: Sequence[Family]) -> None:
        """Remove virtual servers that NAT has taken over from: sockets come after them."""
        modes = {other.mode for other in self._now.others}
        if self._asked.to == "userspace" and "ipvs" in modes and modes & set(NAT_MODES):
            await waiting(families, self._config)

    async def _silence(self) -> None:
        for other in self._now.others:
            if other.continues_as(self._asked.to):
                continue
            self._silent.append(other)  # a half of it may be done when it fails
            if await other.silence():
                self._say(f"silent: {other}")

    async def _wake(self) -> None:
        while self._silent:
            other = self._silent.pop()
            try:
                await other.wake()
            except OthersError as error:
                self._say(f"cannot put back {other}: {error}")

    async def _probe(self, plans: Iterable[Plan], how: str) -> None:
        """Ask cluster IPs for a connection. Raises ``Fatal``."""
        probes = [probe for plan in plans for probe in sample(plan, self._asked.probes)]
        silent = [probe for probe in probes if not await answers(probe.asked)]
        faults = [probe for probe in silent if await all_answer(probe.backends)]
        if faults:
            names = ", ".join(str(probe.asked) for probe in faults[:5])
            raise Fatal(
                f"migrate: {len(faults)} cluster IPs whose endpoints answer do not: {names}"
            )
        without = f"; {len(silent)} have endpoints that do not answer either" if silent else ""
        self._say(f"probed, {how}: {len(probes) - len(silent)} of {len(probes)} answer{without}")


async def compared(lane: Lane, carrier: Proxier) -> int:
    """Compare what is written with what there is; return how much. Raises ``Fatal``, ApplyError."""
    for _attempt in range(LOOKS):
        found = await carrier.verify(set(lane.plan.ports))
        if found is None:
            await asyncio.sleep(PAUSE_SECONDS)
            continue
        if found.differences:
            entries = ", ".join(difference.entry for difference in found.differences[:3])
            raise Fatal(f"migrate: {len(found.differences)} entries are not as written: {entries}")
        return found.entries
    raise Fatal("migrate: syncs follow each other too fast to look")


# --- probes ---------------------------------------------------------------------------------------


def sample(plan: Plan, count: int) -> list[Probe]:
    """Choose cluster IPs, evenly among those that this node is to be forwarded from, over TCP."""
    probes = [
        Probe(Address(route.frontend.ip, route.frontend.port), addresses(route.from_node))
        for owner in sorted(plan.ports)
        for route in plan.ports[owner].routes
        if route.kind == "ClusterIP"
        and route.frontend.proto == "TCP"
        and isinstance(route.from_node, Forward)
    ]
    return evenly(probes, count)


def addresses(action: Forward) -> tuple[Address, ...]:
    return tuple(backend.address for backend in action.pool.backends)


def evenly(items: Sequence[T], count: int) -> list[T]:
    """Return so many of the items, spread over all of them."""
    if len(items) <= count:
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]


async def answers(address: Address) -> bool:
    """Say whether a connection can be made, at one of a few attempts."""
    for _attempt in range(PROBE_ATTEMPTS):
        if await connects(address):
            return True
    return False


async def all_answer(backends: Collection[Address]) -> bool:
    found = [await connects(backend) for backend in evenly(list(backends), MOST_BACKENDS)]
    return all(found)


async def connects(address: Address) -> bool:
    family = socket.AF_INET if family_of(address.ip) == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as opened:
        opened.setblocking(False)
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await asyncio.get_running_loop().sock_connect(opened, (address.ip, address.port))
        except OSError:  # which a TimeoutError is
            return False
    return True
