"""What carries the traffic of one family: frontends, connections, flows, and their backends.

A process of its own has one, and so has the one that plans: each for the clients that come in by
the sockets it looks after.
"""

import logging
import random
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from msgspec import Struct

from pyproxy.balancer import MOST_CLIENTS, Picker
from pyproxy.counters import Entry
from pyproxy.model import Family, Forward, Frontend, Pool, Proto, ServicePortName
from pyproxy.proxier._flow import IdleTimeouts, UdpRelay
from pyproxy.proxier._fronts import Fronts
from pyproxy.proxier._given import Bound, Given, GivenFlow
from pyproxy.proxier._tcp import TcpRelay
from pyproxy.proxier._transparent import Transparent
from pyproxy.proxier._way import Capture
from pyproxy.rules.capture import NO_SOURCES, entry, frontend_key, packed_entry
from pyproxy.rules.listener_bytes import packed_owner
from pyproxy.rules.listeners import Listener, Surroundings

log = logging.getLogger(__name__)

Observe = Callable[[Proto, str], None]  # the result of a connection, for the metrics


class Manner(Struct, frozen=True):
    """How to carry it."""

    family: Family
    keeps_client: bool  # show backends the address of the client, where the plan says so
    timeouts: IdleTimeouts = IdleTimeouts()


class DataPlane:
    """One family's traffic in one process."""

    def __init__(
        self, manner: Manner, surroundings: Callable[[], Surroundings], observe: Observe
    ) -> None:
        family = manner.family
        self.family = family
        self.transparent = Transparent(family, surroundings) if manner.keeps_client else None
        self.tcp = TcpRelay(surroundings, partial(observe, "TCP"), self.transparent)
        self.udp = UdpRelay(
            self.tcp.poller,
            surroundings,
            manner.timeouts,
            partial(observe, "UDP"),
            self.transparent,
        )
        self._opened: Fronts | None = None
        self._pickers: dict[ServicePortName, Picker] = {}

    def open(
        self,
        capture: Capture,
        inherited: Mapping[Bound, socket.socket],
        *,
        checks_ports: bool = True,
    ) -> None:
        """Serve frontends from now on, by the sockets of a capture and those of a predecessor."""
        self._opened = Fronts(
            self.family, self.tcp, self.udp, capture, inherited, checks_ports=checks_ports
        )

    @property
    def is_open(self) -> bool:
        return self._opened is not None

    @property
    def fronts(self) -> Fronts:
        assert self._opened is not None, "open comes first"
        return self._opened

    def serve(
        self, owner: ServicePortName, listeners: Mapping[Frontend, Listener]
    ) -> dict[Frontend, str]:
        """Bring frontends of one owner up to date; return those that cannot be opened, and why.

        Nothing waits in here: a connection sees the pools of before, or those of after.
        """
        picker = self._pickers.get(owner) or Picker(random.randrange, partial(tell_of_many, owner))
        self._pickers[owner] = picker
        picker.use(pools({**self.fronts.of(owner), **listeners}))
        refused = {}
        for frontend, listener in listeners.items():
            problem = self.fronts.put(frontend, listener, picker)
            if problem is not None:
                refused[frontend] = f"{owner}: {frontend}: {problem}"
        return refused

    def close(self, frontends: Iterable[Frontend]) -> set[ServicePortName]:
        """Let go of frontends; return whose they were."""
        owners = set()
        for frontend in frontends:
            owner = self.fronts.close(frontend)
            if owner is not None:
                owners.add(owner)
                if not self.fronts.of(owner):
                    self._pickers.pop(owner, None)
        return owners

    def entries(self) -> Iterator[Entry[Frontend]]:
        """Yield what has been carried here so far."""
        return self._opened.entries() if self._opened is not None else iter(())

    def retire(self) -> list[GivenFlow]:
        """Let nobody in any more, and let go of all flows, for a successor."""
        self.fronts.retire()
        return self.fronts.give_flows()

    async def surrender(self) -> list[Given]:
        """Let go of everything else: return the connections that there are, for a successor."""
        given = await self.tcp.surrender()
        self.fronts.leave()
        return given

    def close_all(self) -> None:
        """End all connections and flows; nothing is relayed after that."""
        self.tcp.close_all()
        self.udp.close_all()
        if self.transparent is not None:
            self.transparent.close()


def rehearse(listeners: Mapping[Frontend, Listener], family: Family) -> None:
    """Pack what workers and the kernel's socket lookup would be told, to no end."""
    for frontend, listener in listeners.items():
        packed_owner(listener.owner, [listener])
        frontend_key(frontend, family)
        packed_entry(entry(listener.route), NO_SOURCES)


def tell_of_many(owner: ServicePortName) -> None:
    fields = {"service": str(owner), "remembered": MOST_CLIENTS}
    log.warning("session affinity forgets who was silent longest: many clients", extra=fields)


def pools(listeners: Mapping[Frontend, Listener]) -> list[Pool]:
    """Return the pools of these listeners, each once."""
    found: dict[int, Pool] = {}
    for listener in listeners.values():
        route = listener.route
        for action in (route.from_pod, route.from_node, route.from_outside):
            if isinstance(action, Forward):
                found[id(action.pool)] = action.pool
    return list(found.values())
