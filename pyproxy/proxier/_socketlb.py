"""Balances sockets of this machine at connect time, beside the listeners that serve everybody.

What cannot be decided there, or not on this machine, is left to the listeners: nothing else
depends on it.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path

from pyproxy.config import node_port_cidrs
from pyproxy.counters import Entry
from pyproxy.delta import Delta
from pyproxy.model import Address, Frontend
from pyproxy.proxier import Env
from pyproxy.proxier._sockdiag import end_everywhere
from pyproxy.proxier._socketlb_kernel import SocketBalancer
from pyproxy.proxier._socketlb_site import Off, chosen_cgroup, pins, remove_pins
from pyproxy.reconcile import Difference, Target
from pyproxy.rules.listeners import Listener
from pyproxy.rules.socketlb import NODE, POD, content, mapped_ip

PUT_AT_ONCE = 200  # frontends, until the loop may do something else

log = logging.getLogger(__name__)

Listeners = Target[Frontend, Listener]


class Balanced:
    """The listeners of one family, and sockets that are given backends before they get there."""

    def __init__(
        self, env: Env, listeners: Listeners, is_over: Callable[[], bool] = lambda: False
    ) -> None:
        """``is_over`` says whether a successor serves, which has the same maps."""
        self._env = env
        self._is_over = is_over
        self._listeners = listeners
        self._sockets: SocketBalancer | None = None
        self._looked = False
        self._held: Mapping[Frontend, Listener] = {}  # what listens and is not yet balanced
        self._relayed: set[Frontend] = set()  # for want of room
        self._ended: dict[Address, set[Frontend]] = {}  # whose flows a task has to end
        self._ending = False
        env.host.on_change(self._look_around)

    async def adopt(self) -> Mapping[Frontend, Listener]:
        self._held = await self._listeners.adopt()
        if not self._looked:
            self._looked = True
            self._sockets = self._opened()
            self._look_around()
        return self._held

    def rehearse(self, state: Mapping[Frontend, Listener]) -> None:
        self._listeners.rehearse(state)
        for frontend, listener in state.items():
            content(frontend, listener, None, 0)

    async def apply(self, delta: Delta[Frontend, Listener]) -> Mapping[Frontend, str]:
        """Have the listeners serve first: whatever goes wrong here goes on to them."""
        if self._is_over():
            return {}
        self._withdraw(delta.removed)
        refused = await self._listeners.apply(delta)
        if self._sockets is None:
            return refused
        changed = dict(delta.added) | {f: new for f, (_old, new) in delta.changed.items()}
        held, self._held = self._held, {}
        kept = {f: listener for f, listener in held.items() if f not in delta.removed}
        for number, (frontend, listener) in enumerate((kept | changed).items(), 1):
            if frontend in refused:
                self._withdraw([frontend])
            else:
                self._put(frontend, listener)
            if number % PUT_AT_ONCE == 0:
                await asyncio.sleep(0)
        self._attach()
        self._end_flows(delta)
        return refused

    async def compare(self, wanted: Mapping[Frontend, Listener]) -> tuple[Difference, ...]:
        """Look at the listeners: they serve everybody whom nothing here helps."""
        return await self._listeners.compare(wanted)

    async def counters(self, *, by_endpoint: bool) -> Sequence[Entry[Frontend]]:
        """Return what was relayed: of sockets that were given a backend, nothing is counted."""
        return await self._listeners.counters(by_endpoint=by_endpoint)

    async def clear(self) -> None:
        if self._sockets is not None:
            self._sockets.close()
            self._sockets = None
        self._looked = False
        await self._listeners.clear()

    async def aclose(self) -> None:
        """Leave to pinned programs what they do; without pins they end here."""
        await self._listeners.aclose()
        if self._sockets is not None:
            self._sockets.close()

    def _opened(self) -> SocketBalancer | None:
        env, family = self._env, self._env.family
        fields: dict[str, object] = {"family": family}
        try:
            cgroup = chosen_cgroup(env.config)
            folder = self._pins(cgroup)
            sockets = SocketBalancer(family, cgroup, folder, random.randrange)
        except (Off, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            log.info("sockets are not balanced: all is relayed", extra=fields | {"reason": reason})
            self._forget(but=None)
            return None
        fields |= {"cgroup": str(cgroup), "pinned": str(folder or "nowhere")}
        log.info("sockets are balanced when they connect", extra=fields)
        self._forget(but=folder)
        return sockets

    def _pins(self, cgroup: Path) -> Path | None:
        try:
            return pins(cgroup, self._env.family)
        except OSError as error:
            reason = "sockets are not balanced while no pyproxy runs: no bpf file system"
            log.info(reason, extra={"family": self._env.family, "error": error.strerror})
            return None

    def _forget(self, *, but: Path | None) -> None:
        """Remove what an earlier process pinned elsewhere, or with other settings."""
        try:
            remove_pins(self._env.family, but=but)
        except OSError as error:
            log.warning("cannot remove old programs", extra={"error": str(error)})

    def _attach(self) -> None:
        assert self._sockets is not None, "somebody looked"
        try:
            self._sockets.attach()
        except OSError as error:
            fields = {"family": self._env.family, "reason": error.strerror}
            log.warning("sockets are not balanced: all is relayed", extra=fields)
            self._sockets.close()
            self._sockets = None
            self._forget(but=None)

    def _put(self, frontend: Frontend, listener: Listener) -> None:
        assert self._sockets is not None, "somebody looked"
        try:
            self._sockets.put(frontend, listener)
            self._relayed.discard(frontend)
        except OSError as error:  # told once for all that do not fit
            if not self._relayed:
                fields = {"frontend": str(frontend), "error": error.strerror}
                log.warning("some frontends are only relayed, not balanced", extra=fields)
            self._relayed.add(frontend)

    def _withdraw(self, frontends: Iterable[Frontend]) -> None:
        if self._sockets is not None:
            for frontend in frontends:
                self._sockets.remove(frontend)
                self._relayed.discard(frontend)

    def _look_around(self) -> None:
        """See anew at which addresses of the node its ports are served, and for whom."""
        if self._sockets is None:
            return
        env, seen = self._env, self._env.host.snapshot
        ranges = node_port_cidrs(env.config, env.family, env.node_ips)
        ips = seen.ips(env.family) if ranges is None else seen.ips_in(env.family, ranges)
        with_loopback = ranges is not None or env.config.iptables.localhost_node_ports
        served: dict[str, int] = {}
        for ip in ips:
            address = ip_address(ip)
            if address.is_loopback:
                served |= {ip: NODE} if with_loopback else {}
            elif not address.is_link_local:  # the same address may be another one's elsewhere
                served[ip] = POD | NODE
        self._sockets.place(served)

    def _end_flows(self, delta: Delta[Frontend, Listener]) -> None:
        """Have connected UDP sockets ended whose backends serve their Service no more."""
        gone = [(f, old.serving) for f, old in delta.removed.items()]
        gone += [(f, old.serving - new.serving) for f, (old, new) in delta.changed.items()]
        for frontend, addresses in gone:
            if frontend.proto == "UDP":
                for address in addresses:
                    self._ended.setdefault(address, set()).add(frontend)
        if self._ended and not self._ending:
            self._ending = True
            self._env.tasks.create_task(self._end(), name="end flows")

    async def _end(self) -> None:
        try:
            while self._ended and self._sockets is not None:
                ended, self._ended = self._ended, {}
                condemned = Condemned(self._sockets, ended)
                count, problem = await asyncio.to_thread(end_everywhere, condemned)
                log.debug("flows ended", extra={"count": count, "problem": problem})
                if problem is not None and not count:
                    log.info("flows not ended", extra={"error": problem})
        finally:
            self._ending = False


class Condemned:
    """Says of a socket whether it came to its backend through a frontend that lost it."""

    def __init__(self, sockets: SocketBalancer, ended: Mapping[Address, set[Frontend]]) -> None:
        self._sockets = sockets
        self._ended = ended

    def __call__(self, cookie: bytes, peer: Address) -> bool:
        frontends = self._ended.get(peer)
        service = self._sockets.service_of(cookie, peer) if frontends else None
        if frontends is None or service is None:
            return False
        ip, port = service
        return any(f.port == port and (not f.ip or mapped_ip(f.ip) == ip) for f in frontends)
