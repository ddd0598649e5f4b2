"""Shows backends the address of the client, where the plan does not replace it.

The socket towards the backend is bound to the client's address and port. What the backend answers
is addressed to the client, and must end here: one rule of nf_tables marks packets that a
transparent socket of this node wants, and a routing rule delivers marked packets locally.
Linux: Documentation/networking/tproxy.rst.

It may only be done where the answers come by this node for certain: the client, or the backend, is
a pod of this node. If both are behind one bridge, the backend would speak to the client itself, and
rules inside of the bridge lift its answers (``_lifting``); behind another interface of both, nobody
could.
"""

import errno
import logging
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from itertools import count
from math import ceil
from pathlib import Path
from random import randrange
from socket import IPPROTO_IP, IPPROTO_IPV6, SocketType
from typing import NamedTuple

from pyproxy.model import Address, Family, Forward
from pyproxy.proxier import _lifting as lifting
from pyproxy.proxier._netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    Netlink,
    attribute,
    attributes,
)
from pyproxy.proxier._nfnetlink import NfError, NfTables
from pyproxy.proxier._nfpack import delete_table, new_table
from pyproxy.proxier._nfwhole import Whole
from pyproxy.proxier._sockdiag import forget_waiting
from pyproxy.proxier._sockets import OPTIONS
from pyproxy.reconcile import Difference
from pyproxy.rules.listeners import Surroundings, origin_of
from pyproxy.rules.nft import (
    Chain,
    Hook,
    MatchMark,
    MatchTransparent,
    Rule,
    SetMark,
    Table,
    ToggleMark,
)
from pyproxy.rules.tproxy import AFTER_DSTNAT

TABLE_NAME = "pyproxy-userspace"
CHAIN = Chain("prerouting", Hook("filter", "prerouting", AFTER_DSTNAT))
# What comes to a Service is marked too. Virtual servers, which are next, would send it by the mark.
ARRIVED = Chain("input", Hook("filter", "input", 0))
MARK = 0x1000  # 0x2000 is CNI's plugin portmap, 0x4000 and 0x8000 are Kubernetes'
IP_BIND_ADDRESS_NO_PORT = 24
IP_LOCAL_PORT_RANGE = 51  # Linux 6.3
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
PORTS = 32768, 60999  # as Linux has it
ANY_PORT = bytes(4)
ROUTES = 98 << 24 | 1  # a routing table of our own
TABLE = struct.pack("=I", ROUTES)
RULE_PRIORITY = 97
PROTOCOL = 97  # the routing protocol of what is made here; routes to Service addresses have 98

RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
RTN_LOCAL, RT_SCOPE_HOST, FR_ACT_TO_TABLE = 2, 254, 1
RTA_DST, RTA_OIF, RTA_TABLE = 1, 4, 15
FRA_PRIORITY, FRA_FWMARK, FRA_TABLE, FRA_FWMASK, FRA_PROTOCOL = 6, 10, 15, 16, 21
ROUTE = struct.Struct("=BBBBBBBBI")

INTERFACE_SECONDS = 10.0  # that an address is taken to be behind the same interface
INTERFACES_KEPT = 4096
MARGIN_SECONDS = 10  # that the rules remember a flow of UDP for longer than the relay does
DISTRUST_SECONDS = 60.0  # for a backend that did not answer the client's address

log = logging.getLogger(__name__)


class Guise(NamedTuple):
    """What a backend shall see."""

    ip: str  # of the client
    is_bridged: bool  # the backend is on the client's bridge


class Transparent:
    """Says which clients keep their address, and dresses sockets so; for one family."""

    def __init__(self, family: Family, surroundings: Callable[[], Surroundings]) -> None:
        self._family = family
        self._surroundings = surroundings
        self._netlink: Netlink | None = None  # while this is on
        self._interfaces: dict[str, tuple[int, float]] = {}
        self._bridges: dict[int, tuple[bool, float]] = {}
        self._lifts: bool | None = None  # None: nobody has asked yet
        self._udp_seconds: int | None = None  # None: another process installed what there is
        self._distrusted: dict[Address, float] = {}
        self._ports = ports_of_few()

    @property
    def is_on(self) -> bool:
        return self._netlink is not None

    def switch_on(self, netlink: Netlink, udp_seconds: float) -> None:
        """Have answers to clients delivered here; where that cannot be, say so and stay off.

        A flow of UDP may be silent for ``udp_seconds``.
        """
        self._netlink = None
        try:
            install(self._family, netlink)
        except (NfError, OSError) as error:
            fields = {"family": self._family, "reason": str(error)}
            log.info("backends will see this node instead of their clients", extra=fields)
            return
        self._netlink, self._udp_seconds = netlink, ceil(udp_seconds)
        try:
            lifting.install(self._lifted(self._udp_seconds))
            self._lifts = True
        except NfError as error:
            fields = {"family": self._family, "reason": str(error)}
            log.info("backends on a client's bridge will see this node", extra=fields)
            self._lifts = False

    def tables(self) -> list[Whole]:
        if not self.is_on or self._udp_seconds is None:
            return []
        return [whole(self._family), *([self._lifted(self._udp_seconds)] if self._lifts else ())]

    def lost(self) -> list[Difference]:
        """Return what others have removed of the way that answers take. Raises ``OSError``."""
        if self._netlink is None or self._udp_seconds is None:
            return []
        found = []
        if not any(map(is_current, rules_there(self._family, self._netlink))):
            found.append(Difference("routing rule for answers", "a rule of ours", None))
        if not has_route(self._family, self._netlink):
            found.append(Difference("local route for answers", "a route of ours", None))
        return found

    def renew(self) -> None:
        if self._netlink is not None and self._udp_seconds is not None:
            self.switch_on(self._netlink, self._udp_seconds)

    def join(self, netlink: Netlink) -> None:
        """Rely on what another process has installed."""
        self._netlink = netlink

    def close(self) -> None:
        """Dress nobody any more. What was installed stays, for who comes next."""
        if self._netlink is not None:
            forget(self._family)
        self._netlink = None

    def guise(self, action: Forward, ip: str, backend: Address, now: float) -> Guise | None:
        """Return what a backend shall see of this client; None if it is to see this node."""
        if self._netlink is None or action.masquerade or backend.ip == ip:
            return None
        around = self._surroundings()
        if not around.pods or backend.ip in around.node_ips or origin_of(ip, around) == "node":
            return None
        if now < self._distrusted.get(backend, now):
            return None
        near = self._interface(self._netlink, ip, now)
        far = self._interface(self._netlink, backend.ip, now)
        if not near or not far:
            return None
        is_bridged = near == far
        return Guise(ip, is_bridged) if not is_bridged or self._can_lift(near, now) else None

    def prefer_port(self, sock: SocketType) -> None:
        """Have a TCP socket connect with a port that the client itself hardly uses.

        Else that client's connections past the relay would now and then meet this socket: the
        kernel takes their answers for its own. Where the port is in use, EADDRNOTAVAIL follows.
        """
        with suppress(OSError):
            sock.setsockopt(IPPROTO_IP, IP_LOCAL_PORT_RANGE, next(self._ports))

    def distrust(self, backend: Address, now: float) -> None:
        """Take note that a backend did not answer a client's address."""
        if len(self._distrusted) >= INTERFACES_KEPT:
            self._distrusted.clear()
        self._distrusted[backend] = now + DISTRUST_SECONDS

    def _lifted(self, udp_seconds: int) -> Whole:
        return lifting.whole(self._family, TABLE_NAME, MARK, udp_seconds + MARGIN_SECONDS)

    def _interface(self, netlink: Netlink, ip: str, now: float) -> int:
        """Return the interface that an address is behind; 0 if there is no route to it."""
        index, until = self._interfaces.get(ip, (0, now))
        if now < until:
            return index
        if len(self._interfaces) >= INTERFACES_KEPT:
            self._interfaces.clear()
        try:
            index = interface_to(self._family, netlink, ip)
        except OSError:
            index = 0
        self._interfaces[ip] = (index, now + INTERFACE_SECONDS)
        return index

    def _can_lift(self, index: int, now: float) -> bool:
        """Say whether an interface is a bridge, and answers inside of bridges are lifted."""
        if self._lifts is None:
            self._lifts = lifting.is_installed(self._family, TABLE_NAME)
        if not self._lifts or self._netlink is None:
            return False
        is_bridge, until = self._bridges.get(index, (False, now))
        if now < until:
            return is_bridge
        try:
            is_bridge = lifting.is_bridge(self._netlink, index)
        except OSError:
            is_bridge = False
        self._bridges[index] = (is_bridge, now + INTERFACE_SECONDS)
        return is_bridge


def dress(sock: SocketType, guise: Guise) -> None:
    """Give a socket the address of a client, with a port that is free. Raises ``OSError``."""
    level = IPPROTO_IPV6 if sock.family == socket.AF_INET6 else IPPROTO_IP
    sock.setsockopt(level, OPTIONS["transparent", level], 1)
    sock.setsockopt(IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)  # free towards this backend will do
    if guise.is_bridged:
        lifting.announce(sock)
    sock.bind((guise.ip, 0))


def take_any_port(sock: SocketType) -> None:
    with suppress(OSError):
        sock.setsockopt(IPPROTO_IP, IP_LOCAL_PORT_RANGE, ANY_PORT)


def ports_of_few() -> Iterator[bytes]:
    """Return for ever, for IP_LOCAL_PORT_RANGE, a port that connect(2) takes when others are used.

    It begins with those that are even if the first of the range is (Linux: __inet_hash_connect).
    """
    try:
        low, high = map(int, PORT_RANGE.read_text(encoding="ascii").split())
    except OSError:
        low, high = PORTS
    ports = range(low + 1, high + 1, 2) or range(low, high + 1)
    begin = randrange(len(ports))  # workers shall not try the same
    chosen = (ports[number % len(ports)] for number in count(begin))
    return (struct.pack("=I", port << 16 | port) for port in chosen)


def interface_to(family: Family, netlink: Netlink, ip: str) -> int:
    """Return the index of the interface by which packets to an address leave."""
    kind = address_family(family)
    body = ROUTE.pack(kind, 32 if family == 4 else 128, 0, 0, 0, 0, 0, 0, 0)
    answer = netlink.fetch(RTM_GETROUTE, body + attribute(RTA_DST, socket.inet_pton(kind, ip)))
    values = dict(attributes(answer, ROUTE.size))
    return int.from_bytes(values.get(RTA_OIF, b""), "little")


def install(family: Family, netlink: Netlink) -> None:
    """Make the rule of nf_tables, the routing rule and its route. Raises ``NfError``, ``OSError``.

    What an earlier process left is replaced.
    """
    with closing(NfTables()) as nf_tables:
        nf_tables.commit(whole(family).made())
    flags = NLM_F_CREATE | NLM_F_EXCL
    requests = [
        Message(RTM_NEWROUTE, flags, route(family)),
        Message(RTM_NEWRULE, flags, rule(family)),
    ]
    for code in netlink.carry_out(requests):
        if code not in (0, errno.EEXIST):
            remove(family)
            raise OSError(code, errno.errorcode.get(code, "unknown error"))
    others = [body for body in rules_there(family, netlink) if not is_current(body)]
    netlink.carry_out([Message(RTM_DELRULE, 0, body) for body in others])


def remove(family: Family) -> str | None:
    """Remove everything that ``install`` makes; return what went wrong."""
    with closing(Netlink()) as netlink:
        requests = []
        with suppress(OSError):  # a kernel without rules, or without this family
            requests = [Message(RTM_DELRULE, 0, body) for body in rules_there(family, netlink)]
        codes = netlink.carry_out([*requests, Message(RTM_DELROUTE, 0, route(family))])
    problems = [errno.errorcode.get(c, str(c)) for c in codes if c not in (0, *NOT_THERE)]
    if 0 in codes[:-1]:
        forget(family)
    try:
        nf_tables = NfTables()
    except OSError:
        return "; ".join(problems) or None  # a kernel without nf_tables
    try:
        for removal in (
            [new_table(nf_table(family)), delete_table(nf_table(family))],
            lifting.removal(family, TABLE_NAME),
        ):
            try:
                nf_tables.commit(removal)
            except NfError as error:
                if error.errno not in NO_NF_TABLES:
                    problems.append(str(error))
    finally:
        nf_tables.close()
    return "; ".join(problems) or None


def forget(family: Family) -> None:
    """Let clients connect past this mode with ports that they have had with it."""
    try:
        forget_waiting(family)
    except OSError as error:
        log.debug("connections in TIME_WAIT stay", extra={"error": error.strerror})


NOT_THERE = (errno.ENOENT, errno.ESRCH, errno.EAFNOSUPPORT, errno.EPERM)
NO_NF_TABLES = (errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)


def whole(family: Family) -> Whole:
    leads = Rule(CHAIN.name, (MatchTransparent(), SetMark(MARK)))
    has_led = Rule(ARRIVED.name, (MatchMark(MARK), ToggleMark(MARK)))
    return Whole(nf_table(family), (CHAIN, ARRIVED), (leads, has_led))


def nf_table(family: Family) -> Table:
    return Table(family, TABLE_NAME, "pyproxy, mode userspace: answers to clients are ours")


def rule(family: Family) -> bytes:
    body = ROUTE.pack(address_family(family), 0, 0, 0, 0, 0, 0, FR_ACT_TO_TABLE, 0)
    body += attribute(FRA_PRIORITY, struct.pack("=I", RULE_PRIORITY))
    body += attribute(FRA_TABLE, TABLE)
    body += attribute(FRA_FWMARK, struct.pack("=I", MARK))
    body += attribute(FRA_FWMASK, struct.pack("=I", MARK))
    return body + attribute(FRA_PROTOCOL, bytes([PROTOCOL]))


def rules_there(family: Family, netlink: Netlink) -> list[bytes]:
    """Return the rules that lead to our table, whichever version of this made them.

    Raises ``OSError``.
    """
    start = ROUTE.pack(address_family(family), *[0] * 8)
    ours = {FRA_PROTOCOL: bytes([PROTOCOL]), FRA_TABLE: TABLE}
    return [body for body in netlink.dump(RTM_GETRULE, start) if has(body, ours)]


def has_route(family: Family, netlink: Netlink) -> bool:
    """Say whether our table has its route. Raises ``OSError``."""
    start = ROUTE.pack(address_family(family), 0, 0, 0, 0, PROTOCOL, 0, 0, 0)
    found = [has(body, {RTA_TABLE: TABLE}) for body in netlink.dump(RTM_GETROUTE, start)]
    return any(found)


def is_current(body: bytes) -> bool:
    mark = struct.pack("=I", MARK)
    priority = struct.pack("=I", RULE_PRIORITY)
    return has(body, {FRA_PRIORITY: priority, FRA_FWMARK: mark, FRA_FWMASK: mark})


def has(body: bytes, wanted: Mapping[int, bytes]) -> bool:
    return wanted.items() <= dict(attributes(body, ROUTE.size)).items()


def route(family: Family) -> bytes:
    scope = RT_SCOPE_HOST if family == 4 else 0
    body = ROUTE.pack(address_family(family), 0, 0, 0, 0, PROTOCOL, scope, RTN_LOCAL, 0)
    body += attribute(RTA_TABLE, TABLE)
    return body + attribute(RTA_OIF, struct.pack("=I", socket.if_nametoindex("lo")))


def address_family(family: Family) -> int:
    return socket.AF_INET if family == 4 else socket.AF_INET6
