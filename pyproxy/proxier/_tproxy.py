"""Capture by rules of nf_tables: the elements that changed are one transaction for each sync.

It needs CAP_NET_ADMIN only, which root of a user namespace has.
"""

import socket
from collections.abc import Sequence
from contextlib import suppress

from pyproxy.counters import NOTHING, Counts
from pyproxy.model import Address, Family, Frontend, Proto, Route
from pyproxy.proxier import _nfpack as pack
from pyproxy.proxier._lookup import Unsupported
from pyproxy.proxier._nfnetlink import NfError, NfTables
from pyproxy.proxier._nftarget import delete_tables
from pyproxy.proxier._nfwhole import Whole
from pyproxy.proxier._sockets import Shared, doors, silent
from pyproxy.rules import tproxy
from pyproxy.rules.listeners import Surroundings, has_affinity
from pyproxy.rules.nft import Element, packed_ip
from pyproxy.rules.tproxy import LEAVE, NODE_PORT_IPS, SILENT, TAKE, Doors

TABLE = "pyproxy-capture"
TRIAL = "pyproxy-trial"

Place = tuple[str, bytes]  # a set's name, and a key in it


class ByRules:
    """Frontends that serve everybody have a rule to the shared sockets; others have their own."""

    def __init__(
        self,
        family: Family,
        inherited: Sequence[Shared] = (),
        workers: int = 1,
        table: str = TABLE,
    ) -> None:
        """The table is made anew by the first ``commit``, whole. Raises ``Unsupported``."""
        self._family = family
        self._workers = workers
        self._table = tproxy.table(family, table)
        self._there: dict[Place, Element] = {}
        self._wanted: dict[Place, Element] = {}
        self._touched: set[Place] = set()
        self._everywhere = False  # node ports are served at all addresses of the node
        self._is_there: bool | None = None  # the same of the table; None: it is not there yet
        self._sinks: dict[Proto, socket.socket] = {}
        self.doors: Sequence[Shared] = ()
        self._nf = NfTables()
        try:
            self.doors = doors(family, workers, inherited, together=True)
            for proto in ("TCP", "UDP"):
                self._sinks[proto] = silent(family, proto)
        except OSError as error:
            self.close()
            raise Unsupported(error.strerror) from error

    @property
    def kept(self) -> list[int]:
        return [sink.fileno() for sink in self._sinks.values()]

    def takes(self, route: Route) -> bool:
        """Say so where everybody is served by any worker: the kernel's choice is none of ours."""
        return tproxy.takes(route) and (self._workers == 1 or not has_affinity(route))

    def put(self, frontend: Frontend, route: Route, *, foreign: bool) -> None:
        verdict = TAKE if self.takes(route) else LEAVE
        name, element = tproxy.frontend_element(frontend, self._family, verdict)
        self._want(name, element)

    def drop(self, frontend: Frontend) -> None:
        name, element = tproxy.frontend_element(frontend, self._family, LEAVE)
        self._want_no(name, element.key)

    def refused(self, frontend: Frontend) -> Counts:
        return NOTHING

    def silence(self, ip: str) -> None:
        self._want(SILENT, Element(packed_ip(ip)))

    def unsilence(self, ip: str) -> None:
        self._want_no(SILENT, packed_ip(ip))

    def surround(self, around: Surroundings, node_port_ips: Sequence[str] | None) -> None:
        wanted = {packed_ip(ip) for ip in node_port_ips or ()}
        there = {key for name, key in self._wanted if name == NODE_PORT_IPS}
        for key in wanted - there:
            self._want(NODE_PORT_IPS, Element(key))
        for key in there - wanted:
            self._want_no(NODE_PORT_IPS, key)
        self._everywhere = node_port_ips is None

    def commit(self) -> None:
        messages = self._base().made() if self._is_there is None else self._entrance()
        try:
            self._nf.commit(messages + self._difference())
        except NfError as error:
            raise OSError(error.errno, str(error)) from error
        self._is_there = self._everywhere
        for place in self._touched:
            element = self._wanted.get(place)
            if element is None:
                self._there.pop(place, None)
            else:
                self._there[place] = element
        self._touched.clear()

    def close(self) -> None:
        """Remove the table: packets go where they would without us."""
        with suppress(OSError, NfError):  # it was never made
            delete_tables([self._table])
        self.leave()

    def leave(self) -> None:
        """Leave the table, which is a successor's by now."""
        self._nf.close()
        for sink in self._sinks.values():
            sink.close()
        for pair in self.doors:
            pair.close()

    def tables(self) -> list[Whole]:
        if self._is_there is None:
            return []
        elements: dict[str, list[Element]] = {}
        for (name, _key), element in self._there.items():
            elements.setdefault(name, []).append(element)
        return [self._base()._replace(elements=elements)]

    def renew(self) -> None:
        self._is_there = None
        self._there.clear()
        self._touched.update(self._wanted)

    def _base(self) -> Whole:
        """Return the table without elements."""
        door = self.doors[0]
        doors = Doors(
            {"TCP": address(door.tcp), "UDP": address(door.udp)},
            {proto: address(sock) for proto, sock in self._sinks.items()},
        )
        rules = (*tproxy.rules(doors), *tproxy.entrance(node_ports_everywhere=self._everywhere))
        return Whole(self._table, tproxy.CHAINS, rules, tproxy.sets(self._family))

    def _entrance(self) -> list[bytes]:
        """Return the messages that change where node ports are served."""
        if self._everywhere == self._is_there:
            return []
        rules = tproxy.entrance(node_ports_everywhere=self._everywhere)
        flush = pack.flush_chain(self._table, tproxy.PREROUTING.name)
        return [flush, *(pack.new_rule(self._table, rule) for rule in rules)]

    def _want(self, name: str, element: Element) -> None:
        self._wanted[name, element.key] = element
        self._touched.add((name, element.key))

    def _want_no(self, name: str, key: bytes) -> None:
        self._wanted.pop((name, key), None)
        self._touched.add((name, key))

    def _difference(self) -> list[bytes]:
        gone: dict[str, list[Element]] = {}
        new: dict[str, list[Element]] = {}
        for place in self._touched:
            before, after = self._there.get(place), self._wanted.get(place)
            if before == after:
                continue
            if before is not None:
                gone.setdefault(place[0], []).append(before)
            if after is not None:
                new.setdefault(place[0], []).append(after)
        messages = []
        for name, elements in gone.items():
            messages += pack.delete_elements(self._table, name, elements)
        for name, elements in new.items():
            messages += pack.new_elements(self._table, name, elements)
        return messages


def remove_rules(family: Family) -> None:
    """Remove what an earlier process left. Raises ``OSError``."""
    try:
        delete_tables([tproxy.table(family, TABLE)])
    except NfError as error:
        raise OSError(error.errno, str(error)) from error


def address(sock: socket.socket) -> Address:
    return Address(*sock.getsockname()[:2])
