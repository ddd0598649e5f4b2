"""Leads packets for Service addresses to this node's sockets, by routes of type local.

A cluster IP belongs to nobody else: the whole address becomes local,
``ip route add local ADDRESS dev lo proto 98``. An external or load balancer IP may well be the
address of another machine (people list their nodes in externalIPs): only the ports of Services
become local, by a routing table for each port, ``ip rule add ipproto tcp dport 80 lookup TABLE``.

The routing protocol number marks routes and rules as ours, so that a restart finds what an
earlier process left. Routes carry the node's address as their preferred source: without it, the
node's own connections to a Service would come from the Service's address.
"""

import errno
import os
import socket
import struct
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from pyproxy.ip import is_loopback
from pyproxy.model import Family, Frontend, Proto, Route
from pyproxy.proxier._netlink import (
    ATTRIBUTE,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    Netlink,
    attributes,
)
from pyproxy.proxier._netlink import attribute as attr
from pyproxy.rules.listeners import owns_address, passes_by

RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
RTN_LOCAL = 2
RT_SCOPE_HOST = 254
RT_TABLE_LOCAL = 255
RTPROT_PYPROXY = 98
RTPROT_IPVS = 99  # of mode ipvs, whose routes must outlive the clean-up after another mode
RULE_PRIORITY = 98  # after the table of the node's own addresses, before all others
FR_ACT_TO_TABLE = 1
RTA_DST, RTA_OIF, RTA_PRIORITY, RTA_PREFSRC, RTA_TABLE = 1, 4, 6, 7, 15
FRA_PRIORITY, FRA_TABLE, FRA_PROTOCOL, FRA_IP_PROTO, FRA_DPORT_RANGE = 6, 15, 21, 22, 24
ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg, and struct fib_rule_hdr has the same form
PROTOCOLS: Mapping[Proto, int] = {
    "TCP": socket.IPPROTO_TCP,
    "UDP": socket.IPPROTO_UDP,
    "SCTP": socket.IPPROTO_SCTP,
}


class Vip(NamedTuple):
    """An address to be led here; ``table`` says for which packets."""

    ip: str
    table: int


def whole_address(ip: str) -> Vip:
    return Vip(ip, RT_TABLE_LOCAL)


def one_port(frontend: Frontend, mark: int = RTPROT_PYPROXY) -> Vip:
    """Return the address with a table of our own for each protocol and port."""
    return Vip(frontend.ip, mark << 24 | PROTOCOLS[frontend.proto] << 16 | frontend.port)


def vip_of(frontend: Frontend, route: Route, own: Collection[str]) -> Vip | None:
    """Return what must be led here; None for what the node has itself, as node ports."""
    ip = frontend.ip
    if not ip or ip in own or is_loopback(ip):
        return None
    return whole_address(ip) if owns_address(route) else one_port(frontend)


class Needs:
    """Who needs which addresses to be led here, as far as it has been said so."""

    def __init__(self) -> None:
        self.of: dict[Vip, set[Frontend]] = {}
        self.passed: set[Frontend] = set()  # those that pods and the node go past
        self._vips: dict[Frontend, Vip] = {}
        self._changed: set[Vip] = set()

    def put(self, frontend: Frontend, route: Route, own: Collection[str]) -> None:
        """Take in a frontend, new or changed."""
        vip = vip_of(frontend, route, own)
        if self._vips.get(frontend) != vip:
            self.drop(frontend)
            if vip is not None:
                self._vips[frontend] = vip
                self.of.setdefault(vip, set()).add(frontend)
                self._changed.add(vip)
        if vip is not None and passes_by(route):
            self.passed.add(frontend)
        else:
            self.passed.discard(frontend)

    def drop(self, frontend: Frontend) -> None:
        """Take in that a frontend is gone; more than once is allowed."""
        self.passed.discard(frontend)
        vip = self._vips.pop(frontend, None)
        if vip is not None:
            self.of[vip].discard(frontend)
            if not self.of[vip]:
                del self.of[vip]
            self._changed.add(vip)

    def doubt(self, vips: Iterable[Vip]) -> None:
        """Have these looked at with the next changes."""
        self._changed.update(vips)

    def changed(self) -> set[Vip]:
        """Return what may be needed, or not, otherwise than at the last call."""
        changed, self._changed = self._changed, set()
        return changed


def frontend_of(vip: Vip) -> Frontend | None:
    """Return what ``one_port`` was given; None for a whole address."""
    if vip.table == RT_TABLE_LOCAL:
        return None
    number = vip.table >> 16 & 0xFF
    proto = next((name for name, n in PROTOCOLS.items() if n == number), None)
    return Frontend(vip.ip, vip.table & 0xFFFF, proto) if proto else None


class Vips:
    """The local routes of one family that are ours, and the rules that lead to their tables.

    ``mark`` is the routing protocol that tells that they are.
    """

    def __init__(self, family: Family, source: str | None, *, mark: int = RTPROT_PYPROXY) -> None:
        self._mark = mark
        self._family = socket.AF_INET if family == 4 else socket.AF_INET6
        self._bits = 32 if family == 4 else 128
        self._source = source
        self._loopback = socket.if_nametoindex("lo")
        self.netlink = Netlink()
        self._rules: set[int] = set()  # tables that a rule leads to

    def close(self) -> None:
        self.netlink.close()

    def listed(self) -> set[Vip]:
        """Return what our routes lead here, whichever process made them. Raises ``OSError``.

        A route in a table that no rule leads to does not.
        """
        self._rules = self._listed_rules()
        led = {RT_TABLE_LOCAL, *self._rules}
        return {vip for vip in self._routed() if vip.table in led}

    def clear(self) -> Mapping[Vip, str]:
        """Remove all our routes and rules; return why not. Raises ``OSError``."""
        self._rules = self._listed_rules()
        return self.remove(self._routed())

    def _routed(self) -> set[Vip]:
        found: set[Vip] = set()
        for body in self.netlink.dump(RTM_GETROUTE, self._header(0)):
            _family, bits, _src, _tos, table, protocol, *_rest = ROUTE.unpack_from(body)
            values = dict(attributes(body, ROUTE.size))
            if RTA_TABLE in values:
                table = struct.unpack("=I", values[RTA_TABLE])[0]
            if bits == self._bits and protocol == self._mark and RTA_DST in values:
                found.add(Vip(socket.inet_ntop(self._family, values[RTA_DST]), table))
        return found

    def add(self, vips: Iterable[Vip]) -> Mapping[Vip, str]:
        """Lead addresses here; return why not, for each that cannot be.

        An address that an interface of the node has is local already, and stays its own.
        """
        wanted = list(vips)
        failed = self._routes(RTM_NEWROUTE, wanted, self._source)
        invalid = [vip for vip, code in failed.items() if code == errno.EINVAL]
        if invalid and self._source is not None:  # the node does not have the address it should
            for vip in invalid:
                del failed[vip]
            failed |= self._routes(RTM_NEWROUTE, invalid, None)
        failed |= self._lead_to({vip.table for vip in wanted}, wanted)
        return {
            vip: f"cannot make {vip.ip} local to this node: {os.strerror(code)}"
            for vip, code in failed.items()
            if code != errno.EEXIST
        }

    def remove(self, vips: Iterable[Vip], left: Iterable[Vip] = ()) -> Mapping[Vip, str]:
        """Remove our routes; return why not, for each that is still there.

        With a route to one port, the rules of tables that are not among those of ``left`` go first.
        """
        gone = list(vips)
        unused: set[int] = set()
        if any(vip.table != RT_TABLE_LOCAL for vip in gone):  # all of ``left`` is looked at
            unused = self._rules - {vip.table for vip in left}
        self.netlink.carry_out([self._rule(RTM_DELRULE, table) for table in unused])
        self._rules -= unused
        failed = self._routes(RTM_DELROUTE, gone, None)
        return {
            vip: f"cannot remove the route to {vip.ip}: {os.strerror(code)}"
            for vip, code in failed.items()
            if code != errno.ESRCH
        }

    def _routes(self, kind: int, vips: list[Vip], source: str | None) -> dict[Vip, int]:
        flags = NLM_F_CREATE | NLM_F_EXCL if kind == RTM_NEWROUTE else 0
        starts = {table: self._start(table, source) for table in {vip.table for vip in vips}}
        messages = [
            Message(kind, flags, starts[table] + socket.inet_pton(self._family, ip))
            for ip, table in vips
        ]
        codes = self.netlink.carry_out(messages)
        return {vip: code for vip, code in zip(vips, codes, strict=True) if code}

    def _lead_to(self, tables: set[int], vips: list[Vip]) -> dict[Vip, int]:
        missing = sorted(tables - self._rules - {RT_TABLE_LOCAL})
        codes = self.netlink.carry_out([self._rule(RTM_NEWRULE, table) for table in missing])
        failed = {t: c for t, c in zip(missing, codes, strict=True) if c not in (0, errno.EEXIST)}
        self._rules.update(set(missing) - failed.keys())
        return {vip: failed[vip.table] for vip in vips if vip.table in failed}

    def _listed_rules(self) -> set[int]:
        tables: set[int] = set()
        for body in self.netlink.dump(RTM_GETRULE, ROUTE.pack(self._family, *[0] * 8)):
            values = dict(attributes(body, ROUTE.size))
            if values.get(FRA_PROTOCOL) == bytes([self._mark]) and FRA_TABLE in values:
                tables.add(struct.unpack("=I", values[FRA_TABLE])[0])
        return tables

    def _rule(self, kind: int, table: int) -> Message:
        protocol, port = table >> 16 & 0xFF, table & 0xFFFF
        body = ROUTE.pack(self._family, 0, 0, 0, 0, 0, 0, FR_ACT_TO_TABLE, 0)
        body += attr(FRA_PRIORITY, struct.pack("=I", RULE_PRIORITY))
        body += attr(FRA_TABLE, struct.pack("=I", table))
        body += attr(FRA_PROTOCOL, bytes([self._mark]))
        body += attr(FRA_IP_PROTO, bytes([protocol]))
        body += attr(FRA_DPORT_RANGE, struct.pack("=HH", port, port))
        return Message(kind, NLM_F_CREATE | NLM_F_EXCL if kind == RTM_NEWRULE else 0, body)

    def _start(self, table: int, source: str | None) -> bytes:
        """Return what all routes of a table have in common: all but the address that follows."""
        body = self._header(self._bits)
        body += attr(RTA_TABLE, struct.pack("=I", table))
        body += attr(RTA_OIF, struct.pack("=I", self._loopback))
        if self._mark != RTPROT_PYPROXY:  # another metric: the same address may be both modes'
            body += attr(RTA_PRIORITY, struct.pack("=I", self._mark))
        if source is not None:
            body += attr(RTA_PREFSRC, socket.inet_pton(self._family, source))
        return body + ATTRIBUTE.pack(ATTRIBUTE.size + self._bits // 8, RTA_DST)

    def _header(self, bits: int) -> bytes:
        scope = RT_SCOPE_HOST if bits and self._family == socket.AF_INET else 0
        kind = RTN_LOCAL if bits else 0
        return ROUTE.pack(self._family, bits, 0, 0, 0, self._mark, scope, kind, 0)
