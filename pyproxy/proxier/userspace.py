"""Proxy mode ``userspace``: sockets of this process carry the traffic.

It needs no packet filter and no NAT: Service addresses are made local to the node by routes, and
each frontend is a listening socket. The kernel keeps silent for it, by socket filters.
"""

import asyncio
import logging
import random
from collections.abc import Iterable, Mapping
from functools import partial

from pyproxy.balancer import Picker
from pyproxy.config import Config, sync_periods, with_setting
from pyproxy.counters import Entry
from pyproxy.delta import Delta
from pyproxy.ip import is_loopback
from pyproxy.model import Family, Forward, Frontend, Pool, ServicePortName
from pyproxy.proxier import Env
from pyproxy.proxier import _transparent as transparent
from pyproxy.proxier._around import node_port_ips, surroundings
from pyproxy.proxier._bypass import Bypass
from pyproxy.proxier._capture import WAYS, Capture, best, risk, why_not
from pyproxy.proxier._fronts import Fronts
from pyproxy.proxier._handover import Given, Succession, meeting_place
from pyproxy.proxier._lookup import Unsupported
from pyproxy.proxier._socketlb import Balanced
from pyproxy.proxier._socketlb_site import remove_pins
from pyproxy.proxier._sockets import Shared
from pyproxy.proxier._tcp import TcpRelay
from pyproxy.proxier._tproxy import remove_rules
from pyproxy.proxier._transparent import Transparent
from pyproxy.proxier._udp import IdleTimeouts, UdpRelay
from pyproxy.proxier._vips import RTPROT_PYPROXY, Vip, Vips, one_port, whole_address
from pyproxy.reconcile import ApplyError, Difference, Proxier, Reconciler
from pyproxy.rules.listeners import Listener, Surroundings, compile_owner, owns_address, passes_by

OPENED_AT_ONCE = 200  # frontends, until the loop may do something else
REPLIES_SECONDS = 0.5  # for datagrams on their way back, when a successor has taken over
LEAVING_SECONDS = 2.0  # until a route that open connections kept is looked at again

log = logging.getLogger(__name__)


def unsupported() -> str | None:
    return None


def settled(config: Config) -> Config:
    """Choose how to capture. Raises ``LookupError`` when it is set to what cannot be here."""
    name = config.userspace.capture
    if name == "auto":
        return with_setting(config, "userspace.capture", best())
    reason = why_not(name)
    if reason is not None:
        raise LookupError(f"userspace.capture: {name} cannot work on this node: {reason}")
    if danger := risk(name):
        log.warning("userspace.capture", extra={"capture": name, "problem": danger})
    return config


def prepare(config: Config) -> tuple[str, ...]:
    return ()


def build(env: Env) -> Proxier:
    frontends = Frontends(env)
    target = Balanced(env, frontends, lambda: frontends.is_over)
    env.tasks.create_task(watch(frontends, env), name=f"watch routes IPv{env.family}")
    return Reconciler("userspace", env.family, compile_owner, target, env.clock)


async def cleanup(family: Family, _config: Config, *, ours: bool = True) -> str | None:
    """Remove what outlives the process: routes, programs and rules. kube-proxy has none of it."""
    if not ours:
        return None
    routes = Vips(family, None)
    try:
        remove_pins(family)
        left = routes.remove(routes.listed())
        Bypass(family, RTPROT_PYPROXY, routes.netlink).clear()
    except OSError as error:
        return f"cannot remove local routes and programs: {error}"
    finally:
        routes.close()
    problems = list(left.values())
    try:
        remove_rules(family)
    except OSError as error:
        problems.append(f"cannot remove the rules of the capture: {error.strerror}")
    problem = transparent.remove(family)
    return "; ".join([*problems, *([problem] if problem else [])]) or None


async def watch(frontends: "Frontends", env: Env) -> None:
    """Have local routes made again that others removed, for ever."""
    period, _ = sync_periods(env.config, "userspace")
    while True:
        await asyncio.sleep(period)
        lost = frontends.lost_routes()
        if lost:
            env.drifted("local", lost, "somebody")
            env.resync()


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
        observe = env.observe
        keeps = env.config.userspace.keep_client_address
        self._transparent = Transparent(env.family, self._surroundings) if keeps else None
        self._tcp = TcpRelay(self._surroundings, partial(observe, "TCP"), self._transparent)
        self._udp = UdpRelay(
            self._tcp.poller,
            self._surroundings,
            timeouts,
            partial(observe, "UDP"),
            self._transparent,
        )
        self._opened: Fronts | None = None
        self._succession = Succession(
            meeting_place(env.config.userspace.runtime_dir, env.family),
            lambda: self._fronts.entrances(),
            self._retire,
        )
        self._pickers: dict[ServicePortName, Picker] = {}
        self._local: set[Vip] = set()  # what has a route of ours
        self._leaving: asyncio.TimerHandle | None = None  # for routes that are still in use
        self._vips: Vips | None = None
        self._bypass: Bypass | None = None
        env.host.on_change(self._look_around)

    @property
    def is_over(self) -> bool:
        """Say whether a successor serves."""
        return self._succession.is_over

    async def adopt(self) -> Mapping[Frontend, Listener]:
        """Return what listens; and see which local routes there are, from whomever."""
        if self._vips is None:
            await self._env.host.read()
            shared, own = await self._succession.inherited()
            capture = self._way(shared)
            self._opened = Fronts(self._env.family, self._tcp, self._udp, capture, own)
            self._look_around()
            self._vips = Vips(self._env.family, self._source())
            self._bypass = Bypass(self._env.family, RTPROT_PYPROXY, self._vips.netlink)
            if self._transparent is not None:
                self._transparent.switch_on(self._vips.netlink)
            else:
                transparent.remove(self._env.family)  # of an earlier process
        try:
            self._local = self._vips.listed()
        except OSError as error:
            raise ApplyError(f"cannot list local routes: {error.strerror}") from error
        return self._fronts.listeners()

    async def apply(self, delta: Delta[Frontend, Listener]) -> Mapping[Frontend, str]:
        """Open before routing to it, and route elsewhere before closing.

        By the end of the first one everything is there that a predecessor has served.
        """
        if self.is_over:
            return {}
        changed = dict(delta.added) | {f: new for f, (_old, new) in delta.changed.items()}
        refused: dict[Frontend, str] = {}
        by_owner: dict[ServicePortName, dict[Frontend, Listener]] = {}
        for frontend, listener in changed.items():
            by_owner.setdefault(listener.owner, {})[frontend] = listener
        for count, (owner, listeners) in enumerate(by_owner.items(), 1):
            refused |= self._serve(owner, listeners)
            if count % OPENED_AT_ONCE == 0:
                await asyncio.sleep(0)
        wanted = self._wanted(self._fronts.held() - delta.removed.keys())
        self._lead_past(frontend for users in wanted.values() for frontend in users)
        self._commit()
        refused |= self._make_local(wanted)
        self._unroute(self._local - wanted.keys())
        self._close(delta.removed)
        self._commit()
        await self._succession.begin(self._tcp.take_over)
        return refused

    def lost_routes(self) -> int:
        """Return how many of our routes others removed; none where nobody can tell."""
        if self._vips is None:
            return 0
        try:
            return len(self._local - self._vips.listed())
        except OSError:
            return 0  # the next sync will say so

    async def compare(self, wanted: Mapping[Frontend, Listener]) -> tuple[Difference, ...]:
        """Look at our sockets, and at the kernel's local routes. Raises ``ApplyError``."""
        assert self._vips is not None, "what was written was adopted before"
        try:
            listed = self._vips.listed()
        except OSError as error:
            raise ApplyError(f"cannot list local routes: {error.strerror}") from error
        found = [d for f, listener in wanted.items() for d in self._fronts.differing(f, listener)]
        held = self._fronts.held()
        missing = self._wanted(f for f in wanted if f in held).keys() - listed
        lost = [Difference(f"local route {vip.ip}", "a route of ours", None) for vip in missing]
        return (*found, *lost)

    async def counters(self, *, by_endpoint: bool) -> tuple[Entry[Frontend], ...]:
        """Return what our sockets have carried; the kernel balances others without telling.

        Raises ``ApplyError``.
        """
        entries = self._opened.entries() if self._opened is not None else ()
        try:
            return tuple(entry for entry in entries if by_endpoint or entry.endpoint is None)
        except OSError as error:
            raise ApplyError(f"cannot read counters: {error.strerror}") from error

    async def clear(self) -> None:
        """Remove the local routes, also those of an earlier process. Raises ``ApplyError``."""
        problem = await cleanup(self._env.family, self._env.config)
        self._local.clear()
        if problem is not None:
            raise ApplyError(problem)

    async def aclose(self) -> None:
        """Serve until a successor does, or for so long as is set; then let go of everything."""
        if self._leaving is not None:
            self._leaving.cancel()
        await self._succession.wait(self._env.config.userspace.drain_timeout_seconds)
        self._succession.close()
        if self.is_over:
            if self._udp.open_count:
                await asyncio.sleep(REPLIES_SECONDS)
            self._fronts.end()
        elif self._opened is not None:
            self._close(self._opened.listeners())
            self._opened.aclose()
        if self._tcp.open_count:
            log.info("closing connections", extra={"open": self._tcp.open_count})
        self._tcp.close_all()
        self._udp.close_all()
        for opened in (self._transparent, self._vips):
            if opened is not None:
                opened.close()

    async def _retire(self) -> list[Given]:
        """Let nobody in any more; return the connections that there are, for a successor."""
        self._fronts.retire()
        given = await self._tcp.surrender()
        self._fronts.leave()
        if self._leaving is not None:
            self._leaving.cancel()
        return given

    def _serve(
        self, owner: ServicePortName, listeners: dict[Frontend, Listener]
    ) -> dict[Frontend, str]:
        """Bring the frontends of one owner up to date; return those that cannot be opened.

        Nothing waits in here: a connection sees the pools of before, or those of after.
        """
        picker = self._pickers.get(owner) or Picker(random.randrange)
        self._pickers[owner] = picker
        picker.use(pools(self._fronts.of(owner) | listeners))
        refused = {}
        for frontend, listener in listeners.items():
            problem = self._fronts.put(frontend, listener, picker)
            if problem is not None:
                refused[frontend] = f"{owner}: {frontend}: {problem}"
        return refused

    def _commit(self) -> None:
        try:
            self._fronts.commit()
        except OSError as error:
            raise ApplyError(f"cannot capture packets for Services: {error.strerror}") from error

    def _wanted(self, frontends: Iterable[Frontend]) -> dict[Vip, list[Frontend]]:
        """Return what must be led here for these frontends, and which of them need it."""
        own = self._around.node_ips
        wanted: dict[Vip, list[Frontend]] = {}
        for frontend in frontends:
            ip = frontend.ip
            if ip and ip not in own and not is_loopback(ip):
                whole = owns_address(self._fronts.listener(frontend).route)
                vip = whole_address(ip) if whole else one_port(frontend)
                wanted.setdefault(vip, []).append(frontend)
        return wanted

    def _make_local(self, wanted: Mapping[Vip, list[Frontend]]) -> dict[Frontend, str]:
        """Lead the addresses to this node; close and return the frontends of those that fail."""
        assert self._vips is not None, "adopt comes before apply"
        missing = wanted.keys() - self._local
        failed = self._vips.add(missing)
        for vip in missing - failed.keys():
            self._local.add(vip)
            if vip == whole_address(vip.ip):
                self._fronts.capture.silence(vip.ip)
        lost = {frontend: why for vip, why in failed.items() for frontend in wanted[vip]}
        owners = {frontend: self._fronts.listener(frontend).owner for frontend in lost}
        self._close(lost)
        return {
            frontend: f"{owners[frontend]}: {frontend}: {why}" for frontend, why in lost.items()
        }

    def _lead_past(self, frontends: Iterable[Frontend]) -> None:
        """Let pods and the node reach the load balancer itself where they are to."""
        assert self._bypass is not None, "adopt comes before apply"
        passed = [f for f in frontends if passes_by(self._fronts.listener(f).route)]
        for problem in self._bypass.put(passed, self._around.pods).values():
            log.warning("pods reach a load balancer through this node", extra={"why": problem})

    def _unroute(self, unwanted: set[Vip]) -> None:
        """Remove these routes; one that open connections come by stays until they are over."""
        if not unwanted:
            return
        assert self._vips is not None, "adopt comes before apply"
        in_use = self._tcp.local_ips()
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
        self._unroute(self._local - self._wanted(self._fronts.held()).keys())

    def _close(self, frontends: Iterable[Frontend]) -> None:
        for frontend in frontends:
            owner = self._fronts.close(frontend)
            if owner is not None and not self._fronts.of(owner):
                self._pickers.pop(owner, None)

    @property
    def _fronts(self) -> Fronts:
        assert self._opened is not None, "adopt comes first"
        return self._opened

    def _surroundings(self) -> Surroundings:
        return self._around

    def _look_around(self) -> None:
        """See anew which addresses are the node's, and what depends on it."""
        env = self._env
        self._around = surroundings(env)
        serving = node_port_ips(env, loopback=True)
        if serving is None and not env.config.iptables.localhost_node_ports:
            serving = tuple(sorted(ip for ip in self._around.node_ips if not is_loopback(ip)))
        if self._opened is not None and not self.is_over:
            self._opened.surround(self._around, serving)

    def _source(self) -> str | None:
        """Return the address that the node's own connections to Services shall come from."""
        own = self._around.node_ips
        preferred = [ip for ip in self._env.node_ips if ip in own]
        others = sorted(ip for ip in own if not is_loopback(ip) and not ip.startswith("fe80:"))
        return next(iter(preferred + others), None)

    def _way(self, inherited: Shared | None) -> Capture:
        """Return the way to capture that the settings name, or the best there is.

        Raises ``ApplyError`` when it cannot be had.
        """
        name = self._env.config.userspace.capture
        try:
            return WAYS[best() if name == "auto" else name](self._env.family, inherited)
        except Unsupported as why:
            raise ApplyError(f"userspace.capture: {name}: {why}") from why


def pools(listeners: Mapping[Frontend, Listener]) -> list[Pool]:
    """Return the pools of these listeners, each once."""
    found: dict[int, Pool] = {}
    for listener in listeners.values():
        route = listener.route
        for action in (route.from_pod, route.from_node, route.from_outside):
            if isinstance(action, Forward):
                found[id(action.pool)] = action.pool
    return list(found.values())
