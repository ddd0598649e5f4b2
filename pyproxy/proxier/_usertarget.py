"""The target of mode userspace: sockets, and whatever leads packets to them and answers back.

A little long, because the order of opening, leading, and closing is one decision.
"""

import asyncio
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from msgspec.structs import replace

from pyproxy.counters import Entry, total
from pyproxy.delta import Delta
from pyproxy.ip import is_loopback
from pyproxy.model import Family, Frontend, ServicePortName
from pyproxy.proxier import Env
from pyproxy.proxier import _transparent as transparent
from pyproxy.proxier._around import node_port_ips, surroundings
from pyproxy.proxier._bypass import Bypass
from pyproxy.proxier._capture import WAYS, best
from pyproxy.proxier._crew import Crew
from pyproxy.proxier._dataplane import DataPlane, Manner, rehearse
from pyproxy.proxier._flow import IdleTimeouts
from pyproxy.proxier._fronts import Fronts
from pyproxy.proxier._given import Given
from pyproxy.proxier._handover import Handover
from pyproxy.proxier._leftover import ANOTHER_SERVES, END, tell_leftovers
from pyproxy.proxier._lookup import Unsupported
from pyproxy.proxier._nfwhole import Tabled, changed_tables, renewed
from pyproxy.proxier._refusals import Refusals, remove_refusals
from pyproxy.proxier._socketlb_site import remove_pins
from pyproxy.proxier._sockets import Shared
from pyproxy.proxier._succession import Succession, meeting_place
from pyproxy.proxier._tproxy import ByRules, remove_rules
from pyproxy.proxier._transparent import Transparent
from pyproxy.proxier._vips import RTPROT_PYPROXY, Needs, Vip, Vips, vip_of, whole_address
from pyproxy.proxier._way import Capture
from pyproxy.reconcile import ApplyError, Difference
from pyproxy.rules.listeners import Listener, Surroundings

OPENED_AT_ONCE = 200  # frontends, until the loop may do something else
FIRST_PID_NAMESPACE = 0xEFFFFFFC  # the inode of the machine's: PROC_PID_INIT_INO in the kernel
LEAVING_SECONDS = 2.0  # until a route that open connections kept is looked at again

log = logging.getLogger(__name__)


class Frontends:
    """The listening sockets of one family and the local routes that lead to them."""

    def __init__(self, env: Env) -> None:
        self._env = env
        self._around = Surroundings()
        conntrack = env.config.conntrack
        defaults = IdleTimeouts()
        timeouts = IdleTimeouts(
            conntrack.udp_timeout_seconds or defaults.single,
            conntrack.udp_stream_timeout_seconds or defaults.stream,
        )
        own = env.config.userspace
        self._manner = Manner(env.family, own.keep_client_address, timeouts)
        self._plane = DataPlane(self._manner, self._surroundings, env.observe)
        self._workers = max(own.workers, 1)
        self._place = meeting_place(own.runtime_dir, env.family)
        self._succession = Succession(
            Handover(
                self._place, lambda: self._fronts.entrances(), self._plane.retire, self._surrender
            )
        )
        self._crew = Crew(self._plane, self._surroundings, env.observe, env.worker_lost)
        self._local: set[Vip] = set()  # what has a route of ours
        self._needs = Needs()
        self._leaving: asyncio.TimerHandle | None = None  # for routes that are still in use
        self._vips: Vips | None = None
        self._bypass: Bypass | None = None
        self._refusals = Refusals() if env.family == 4 else None  # IPv6 refuses by itself
        env.host.on_change(self._look_around)

    @property
    def is_over(self) -> bool:
        """Say whether a successor serves."""
        return self._succession.is_over

    async def adopt(self) -> Mapping[Frontend, Listener]:
        """Return what listens; and see which local routes there are, from whomever."""
        if self._vips is None:
            with attempting("see which addresses are the node's"):
                await self._env.host.read()
            inherited, own = await self._succession.inherited()
            self._plane.open(self._way(inherited), own)
            self._look_around()
            self._vips = Vips(self._env.family, self._source())
            self._bypass = Bypass(self._env.family, RTPROT_PYPROXY, self._vips.netlink)
            dresser, timeouts = self._plane.transparent, self._manner.timeouts
            if dresser is not None:
                dresser.switch_on(self._vips.netlink, max(timeouts.single, timeouts.stream))
            else:
                transparent.remove(self._env.family)  # of an earlier process
            manner = replace(self._manner, keeps_client=dresser is not None and dresser.is_on)
            # Only shared sockets can be anybody's; and one worker is this process.
            workers = self._workers if self._workers > 1 and self._fronts.capture.doors else 0
            env = self._env
            self._crew.start(workers, env.tasks, self._place, manner, env.config.logging)
        with attempting("list local routes"):
            before, self._local = self._local, self._vips.listed()
            rules = self._lost_rules()
        self._needs = Needs()
        self._need(self._fronts.held())
        self._needs.doubt(self._local)
        for part in self._ruled() if rules else ():
            part.renew()
        if lost := len(before - self._local) + len(rules):
            self._env.drifted("local", lost, "somebody")
        for table, count in (await renewed(self._tabled())).items():
            self._env.drifted(table, count, "somebody")
        return self._fronts.listeners()

    def rehearse(self, state: Mapping[Frontend, Listener]) -> None:
        rehearse(state, self._env.family)

    async def apply(self, delta: Delta[Frontend, Listener]) -> Mapping[Frontend, str]:
        """Open before routing to it, and route elsewhere before closing.

        By the end of the first one everything is there that a predecessor has served.
        """
        if self.is_over:
            return {}
        changed = dict(delta.added) | {f: new for f, (_old, new) in delta.changed.items()}
        refused = await self._serve(changed)
        before = (old.owner for old, _new in delta.changed.values())
        self._crew.changed({*(listener.owner for listener in changed.values()), *before})
        await self._crew.flush()
        await self._crew.settle()  # whoever serves until now does so meanwhile
        for frontend in delta.removed:
            self._needs.drop(frontend)
        with attempting("lead packets past Services"):
            self._lead_past()
        self._commit()
        with attempting("lead packets to Services"):
            refused |= await self._lead()
        self._close(delta.removed)
        self._commit()
        await self._crew.flush()
        if self._refusals is not None:
            self._refusals.apply(changed, delta.removed, self._around.node_ips)
        if not self._succession.began:
            await self._succession.begin(self._crew)
            await asyncio.to_thread(tell_leftovers, self._env.family, ANOTHER_SERVES)
        return refused

    async def _lead(self) -> dict[Frontend, str]:
        """Lead packets here, or no more, where that has changed; close and return what fails.

        Raises ``OSError``.
        """
        moved = self._needs.changed()
        refused = self._make_local({vip for vip in moved if vip in self._needs.of})
        if unwanted := {vip for vip in moved & self._local if vip not in self._needs.of}:
            self._unroute(unwanted, await self._crew.local_ips())
        return refused

    async def _serve(self, frontends: Mapping[Frontend, Listener]) -> dict[Frontend, str]:
        """Open these frontends, or bring them up to date; return those that cannot be, and why."""
        refused: dict[Frontend, str] = {}
        by_owner: dict[ServicePortName, dict[Frontend, Listener]] = {}
        for frontend, listener in frontends.items():
            by_owner.setdefault(listener.owner, {})[frontend] = listener
        for count, (owner, listeners) in enumerate(by_owner.items(), 1):
            refused |= self._plane.serve(owner, listeners)
            self._need(listeners)
            if count % OPENED_AT_ONCE == 0:
                await asyncio.sleep(0)
        return refused

    async def has_lost(self) -> bool:
        """Say whether others changed routes, rules or tables of ours; no, where nobody can tell."""
        if self._vips is None:
            return False
        try:
            lost = not self._local <= self._vips.listed() or bool(self._lost_rules())
            return lost or bool(await changed_tables(self._tabled()))
        except (OSError, ApplyError):
            return False  # the next sync will say so

    async def compare(self, wanted: Mapping[Frontend, Listener]) -> tuple[Difference, ...]:
        """Look at our sockets, the kernel's local routes, and our tables. Raises ``ApplyError``."""
        assert self._vips is not None, "what was written was adopted before"
        with attempting("list local routes"):
            listed, rules = self._vips.listed(), self._lost_rules()
        found = [d for f, listener in wanted.items() for d in self._fronts.differing(f, listener)]
        own, held = self._around.node_ips, self._fronts.held()
        needed = {vip_of(f, li.route, own) for f, li in wanted.items() if f in held}
        missing = sorted(vip for vip in needed if vip is not None and vip not in listed)
        lost = [Difference(f"local route {vip.ip}", "a route of ours", None) for vip in missing]
        tables = (await changed_tables(self._tabled())).values()
        return (*found, *lost, *rules, *(difference for table in tables for difference in table))

    async def counters(self, *, by_endpoint: bool) -> tuple[Entry[Frontend], ...]:
        """Return what our sockets have carried; the kernel balances others without telling.

        Raises ``ApplyError``.
        """
        with attempting("read counters"):
            entries = await self._crew.entries()
        refused = self._refusals.counts() if self._refusals is not None else {}
        return tuple(
            entry._replace(counts=total((entry.counts, refused[entry.key])))
            if entry.endpoint is None and entry.key in refused
            else entry
            for entry in entries
            if by_endpoint or entry.endpoint is None
        )

    async def clear(self) -> None:
        """Remove the local routes, also those of an earlier process. Raises ``ApplyError``."""
        problem = removed(self._env.family)
        self._local.clear()
        if problem is not None:
            raise ApplyError(problem)

    async def aclose(self) -> None:
        """Serve until a successor does, or for so long as is set; then let go of everything."""
        if self._leaving is not None:
            self._leaving.cancel()
        seconds = self._env.config.userspace.drain_timeout_seconds
        if seconds and not self.is_over and self._may_leave():
            self._leave(seconds)
            return
        await self._succession.wait(seconds)
        self._succession.close()
        if self.is_over:
            self._fronts.end()
        elif self._plane.is_open:
            self._close(self._fronts.listeners())
            self._fronts.aclose()
        await self._crew.aclose(is_over=self.is_over)
        if self._plane.tcp.open_count:
            log.info("closing connections", extra={"open": self._plane.tcp.open_count})
        self._plane.close_all()
        if self._vips is not None:
            self._vips.close()

    def _may_leave(self) -> bool:
        """Say whether workers can serve without this process, and will be let."""
        plane = self._plane
        idle = not (plane.tcp.open_count or plane.udp.open_count)
        return self._crew.serves_all and idle and not ends_all()

    def _leave(self, seconds: float) -> None:
        """End at once, and let workers serve for so long, or until a successor does."""
        log.info("workers serve on", extra={"family": self._env.family, "seconds": seconds})
        self._succession.close()
        self._fronts.retire()
        self._fronts.leave()
        self._fronts.end()
        self._crew.leave(seconds)
        self._plane.close_all()
        if self._vips is not None:
            self._vips.close()

    async def _surrender(self) -> list[Given]:
        """Let go of everything, for a successor; return the connections that there are."""
        given = await self._plane.surrender()
        if self._leaving is not None:
            self._leaving.cancel()
        return given

    def _tabled(self) -> list[Tabled]:
        """Return who has tables; nobody while they may be a successor's."""
        if not self._plane.is_open or self._succession.is_near:
            return []
        capture = self._fronts.capture
        by_rules = capture if isinstance(capture, ByRules) else None
        parts = (by_rules, self._plane.transparent, self._refusals)
        return [part for part in parts if part is not None]

    def _ruled(self) -> list[Bypass | Transparent]:
        """Return who has rules of policy routing; nobody while they may be a successor's."""
        if not self._plane.is_open or self._succession.is_near:
            return []
        parts = (self._bypass, self._plane.transparent)
        return [part for part in parts if part is not None]

    def _lost_rules(self) -> list[Difference]:
        """Return what others removed of our policy routing. Raises ``OSError``."""
        return [difference for part in self._ruled() for difference in part.lost()]

    def _commit(self) -> None:
        with attempting("capture packets for Services"):
            self._fronts.commit()

    def _need(self, frontends: Iterable[Frontend]) -> None:
        """See what these frontends need, now that they are served, or could not be."""
        own = self._around.node_ips
        for frontend in frontends:
            if self._fronts.holds(frontend):
                self._needs.put(frontend, self._fronts.listener(frontend).route, own)
            else:
                self._needs.drop(frontend)

    def _make_local(self, vips: set[Vip]) -> dict[Frontend, str]:
        """Lead addresses to this node; close and return the frontends of those that fail."""
        assert self._vips is not None, "adopt comes before apply"
        missing = vips - self._local
        failed = self._vips.add(missing)
        for vip in missing - failed.keys():
            self._local.add(vip)
            if vip == whole_address(vip.ip):
                self._fronts.capture.silence(vip.ip)
        lost = {frontend: why for vip, why in failed.items() for frontend in self._needs.of[vip]}
        owners = {frontend: self._fronts.listener(frontend).owner for frontend in lost}
        self._close(lost)
        return {
            frontend: f"{owners[frontend]}: {frontend}: {why}" for frontend, why in lost.items()
        }

    def _lead_past(self) -> None:
        """Let pods and the node reach the load balancer itself where they are to."""
        assert self._bypass is not None, "adopt comes before apply"
        for problem in self._bypass.put(self._needs.passed, self._around.pods).values():
            log.warning("pods reach a load balancer through this node", extra={"why": problem})

    def _unroute(self, unwanted: set[Vip], in_use: Collection[str]) -> None:
        """Remove these routes; one that open connections come by stays until they are over."""
        assert self._vips is not None, "adopt comes before apply"
        gone = {vip for vip in unwanted if vip.ip not in in_use}
        self._local -= gone
        self._vips.remove(gone, self._local)
        for vip in gone:
            if vip == whole_address(vip.ip):
                self._fronts.capture.unsilence(vip.ip)
        if gone != unwanted and self._leaving is None:
            loop = asyncio.get_running_loop()
            self._leaving = loop.call_later(LEAVING_SECONDS, self._look_at_leaving)

    def _look_at_leaving(self) -> None:
        self._leaving = None
        self._env.tasks.create_task(self._unroute_leaving(), name="routes no more in use")

    async def _unroute_leaving(self) -> None:
        try:
            in_use = await self._crew.local_ips()
            if not self.is_over:
                self._unroute(self._local - self._needs.of.keys(), in_use)
        except OSError as error:
            log.warning("routes no more in use are left", extra={"error": error.strerror})
            self._env.resync()

    def _close(self, frontends: Iterable[Frontend]) -> None:
        closed = list(frontends)
        for frontend in closed:
            self._needs.drop(frontend)
        self._crew.changed(self._plane.close(closed))
        self._crew.forget(closed)

    @property
    def _fronts(self) -> Fronts:
        return self._plane.fronts

    def _surroundings(self) -> Surroundings:
        return self._around

    def _look_around(self) -> None:
        """See anew which addresses are the node's, and what depends on it."""
        env = self._env
        self._around = surroundings(env)
        serving = node_port_ips(env, loopback=True)
        if serving is None and not env.config.iptables.localhost_node_ports:
            serving = tuple(sorted(ip for ip in self._around.node_ips if not is_loopback(ip)))
        if self._plane.is_open and not self.is_over:
            held = self._fronts.held()
            try:
                self._fronts.surround(self._around, serving)
            finally:
                self._need(held)
                self._crew.look()

    def _source(self) -> str | None:
        """Return the address that the node's own connections to Services shall come from."""
        own = self._around.node_ips
        preferred = [ip for ip in self._env.node_ips if ip in own]
        others = sorted(ip for ip in own if not is_loopback(ip) and not ip.startswith("fe80:"))
        return next(iter(preferred + others), None)

    def _way(self, inherited: Sequence[Shared]) -> Capture:
        """Return the way to capture that the settings name, or the best there is.

        Raises ``ApplyError`` when it cannot be had.
        """
        name = self._env.config.userspace.capture
        try:
            return WAYS[best() if name == "auto" else name](
                self._env.family, inherited, self._workers
            )
        except Unsupported as why:
            raise ApplyError(f"userspace.capture: {name}: {why}") from why


@contextmanager
def attempting(what: str) -> Iterator[None]:
    """Raise ``ApplyError`` where the operating system refuses: nothing certain is known then."""
    try:
        yield
    except OSError as error:
        raise ApplyError(f"cannot {what}: {error.strerror or error}") from error


def removed(family: Family) -> str | None:
    """Remove what outlives processes: routes, programs and rules; return what went wrong."""
    tell_leftovers(family, END)
    routes = Vips(family, None)
    try:
        remove_pins(family)
        left = routes.clear()
        Bypass(family, RTPROT_PYPROXY, routes.netlink).clear()
    except OSError as error:
        return f"cannot remove local routes and programs: {error}"
    finally:
        routes.close()
    problems = list(left.values())
    try:
        remove_rules(family)
        if family == 4:
            remove_refusals()
    except OSError as error:
        problems.append(f"cannot remove rules of nf_tables: {error.strerror}")
    problem = transparent.remove(family)
    return "; ".join([*problems, *([problem] if problem else [])]) or None


def ends_all() -> bool:
    """Say whether others end with this process: it is the first of a container, or the next."""
    in_container = os.stat("/proc/self/ns/pid").st_ino != FIRST_PID_NAMESPACE
    return os.getpid() == 1 or (os.getppid() == 1 and in_container)
