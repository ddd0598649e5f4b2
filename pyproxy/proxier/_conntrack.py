"""The kernel's table of tracked connections: find those of a few frontends, and delete some.

The kernel walks its whole table for each question, and tells only what it is asked for: a few
ports are asked for one by one. Everything here blocks, and is meant for a thread; while the
kernel walks, the interpreter's lock is free.
"""

import errno
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import NamedTuple

from pyproxy.model import Address, Family, Frontend, Proto
from pyproxy.proxier._netlink import (
    ATTRIBUTE,
    BATCH,
    HEADER,
    NETLINK_NETFILTER,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    Netlink,
    aligned,
    attribute,
    packed,
    raise_errno,
)
from pyproxy.rules.flows import Flow, Review, condemned
from pyproxy.rules.listeners import Surroundings

NLA_F_NESTED = 0x8000
CT_NEW = 0x100  # subsystem 1: ctnetlink
CT_GET = 0x101
CT_DELETE = 0x102

CTA_TUPLE_ORIG = 1
CTA_ID = 12
CTA_ZONE = 18
CTA_FILTER = 25
CTA_TUPLE_IP = 1
CTA_TUPLE_PROTO = 2
CTA_IP_V4_DST = 2
CTA_PROTO_NUM = 1
CTA_PROTO_DST_PORT = 3
CTA_FILTER_ORIG_FLAGS = 1
BY_IP_DST = 1 << 1
BY_PROTO = 1 << 3
BY_PORT_DST = 1 << 5

NUMBERS: dict[Proto, int] = {"TCP": 6, "UDP": 17, "SCTP": 132}
PROTOS: dict[int, Proto] = {number: proto for proto, number in NUMBERS.items()}
FEW = 5  # questions; more of them cost more than one about all ports of a protocol
ATTEMPTS = 5
DATAGRAM = 1 << 16

LENGTH_AND_KIND = struct.Struct("=IHH")
PORT = struct.Struct("!H")
ERRNO = struct.Struct("=i")


class Layout(NamedTuple):
    """Where a tuple's parts are, from the start of its attribute.

    The kernel writes address, protocol and ports of every tuple in this order, and begins each
    message with the original one: finding a destination in a message is two slices.
    """

    source: slice
    destination: slice
    proto: int
    source_port: int
    destination_port: int


LAYOUTS: dict[Family, Layout] = {
    4: Layout(slice(12, 16), slice(20, 24), 32, 40, 48),
    6: Layout(slice(12, 28), slice(32, 48), 56, 64, 72),
}
TUPLE_AT = HEADER.size + 4  # behind the netlink header and nfgenmsg


class Conntrack:
    """The tracked connections of one family in this network namespace.

    ``filters`` says whether to let the kernel choose; it turns that off by refusing.
    """

    def __init__(self, family: Family, *, filters: bool = True) -> None:
        self._family = family
        self._af = socket.AF_INET if family == 4 else socket.AF_INET6
        self._message = struct.pack("=BBH", self._af, 0, 0)
        self._filters = filters

    def flows(self, frontends: Iterable[Frontend]) -> Iterator[Flow]:
        """Yield, once each, the flows whose clients sent them to one of these frontends.

        A node port is one at every address. Raises ``OSError``.
        """
        for question, asked_for in questions(frontends).items():
            yield from self._found(asked_for, self._filter(question))

    def delete(self, flows: Iterable[Flow]) -> int:
        """Delete flows and return how many there still were. Raises ``OSError``.

        Each is named by its original tuple, its zone and the kernel's own number.
        """
        bodies = [self._message + flow.identity for flow in flows]
        if not bodies:
            return 0
        with closing(Channel(NETLINK_NETFILTER)) as channel:
            failures = channel.carry_out_quietly(CT_DELETE, bodies)
        others = [code for code in failures if code != errno.ENOENT]
        if others:
            raise_errno(others[0])
        return len(bodies) - len(failures)

    def _found(self, frontends: Sequence[Frontend], question: bytes) -> list[Flow]:
        """Ask until the kernel was not disturbed; in the end be content with a part."""
        for _attempt in range(ATTEMPTS):
            sieve = Sieve(self._family, frontends)
            try:
                self._read(sieve, question if self._filters else b"")
            except OSError as error:
                if not self._filters or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self._filters = False  # kernels before 5.8 ignore a filter; some may refuse it
                continue
            if not sieve.interrupted:
                break
        return sieve.found

    def _read(self, sieve: "Sieve", question: bytes) -> None:
        with closing(Channel(NETLINK_NETFILTER)) as channel:
            channel.ask(CT_GET, self._message + question)
            while not sieve.sift(channel.datagram()):
                pass

    def _filter(self, frontend: Frontend) -> bytes:
        """Return the attributes that ask for the flows of a frontend; port 0 is every port."""
        flags = BY_PROTO
        proto = attribute(CTA_PROTO_NUM, bytes((NUMBERS[frontend.proto],)))
        inner = b""
        # Linux (seen in 6.18) has the comparison of IPv6 addresses the wrong way round: it tells
        # all flows but those asked for. Asking by port alone is right with any kernel.
        if frontend.ip and self._family == 4:
            flags |= BY_IP_DST
            inner = nested(
                CTA_TUPLE_IP, attribute(CTA_IP_V4_DST, socket.inet_pton(self._af, frontend.ip))
            )
        if frontend.port:
            flags |= BY_PORT_DST
            proto += attribute(CTA_PROTO_DST_PORT, PORT.pack(frontend.port))
        return nested(CTA_TUPLE_ORIG, inner + nested(CTA_TUPLE_PROTO, proto)) + nested(
            CTA_FILTER, attribute(CTA_FILTER_ORIG_FLAGS, struct.pack("=I", flags))
        )


class Sieve:
    """Picks the flows of some frontends out of the kernel's answers to one question."""

    def __init__(self, family: Family, frontends: Iterable[Frontend]) -> None:
        self.found: list[Flow] = []
        self.interrupted = False  # the table changed while it was read: some may be missing
        self._af = socket.AF_INET if family == 4 else socket.AF_INET6
        self._layout = LAYOUTS[family]
        self._ips: dict[bytes, set[bytes] | None] = {}  # by protocol and port; None: whatever
        for frontend in frontends:
            key = bytes((NUMBERS[frontend.proto],)) + PORT.pack(frontend.port)
            ips = self._ips.setdefault(key, set())
            if not frontend.ip:
                self._ips[key] = None
            elif ips is not None:
                ips.add(socket.inet_pton(self._af, frontend.ip))
        self._names: dict[bytes, str] = {}

    def sift(self, data: bytes) -> bool:
        """Look through one datagram; say whether it was the last. Raises ``OSError``."""
        layout, read, wanted = self._layout, LENGTH_AND_KIND.unpack_from, self._ips
        proto_at = TUPLE_AT + layout.proto
        port_at = TUPLE_AT + layout.destination_port
        low, high = TUPLE_AT + layout.destination.start, TUPLE_AT + layout.destination.stop
        at, end = 0, len(data)
        while at < end:
            length, kind, flags = read(data, at)
            if flags & NLM_F_DUMP_INTR:
                self.interrupted = True
            if kind == CT_NEW:
                port = at + port_at
                ips = wanted.get(
                    data[at + proto_at : at + proto_at + 1] + data[port : port + 2], ()
                )
                if ips is None or data[at + low : at + high] in ips:
                    self.found.append(self._flow(data, at + TUPLE_AT, at + length))
            elif kind in (NLMSG_DONE, NLMSG_ERROR):
                self._end(-ERRNO.unpack_from(data, at + HEADER.size)[0])
                return True
            at += aligned(length)
        return False

    def _end(self, code: int) -> None:
        if code == errno.EINTR:
            self.interrupted = True
        elif code:
            raise_errno(code)

    def _flow(self, data: bytes, at: int, end: int) -> Flow:
        layout = self._layout
        original = data[at : at + aligned(ATTRIBUTE.unpack_from(data, at)[0])]
        reply_at = at + len(original)
        reply = data[reply_at : reply_at + aligned(ATTRIBUTE.unpack_from(data, reply_at)[0])]
        return Flow(
            PROTOS[original[layout.proto]],
            self._address(original, layout.source, layout.source_port),
            self._address(original, layout.destination, layout.destination_port),
            self._address(reply, layout.source, layout.source_port),
            original + picked(data, reply_at + len(reply), end),
        )

    def _address(self, data: bytes, where: slice, port_at: int) -> Address:
        packed_ip = data[where]
        name = self._names.get(packed_ip)
        if name is None:
            name = self._names[packed_ip] = socket.inet_ntop(self._af, packed_ip)
        return Address(name, PORT.unpack_from(data, port_at)[0])


class Channel(Netlink):
    """A netlink socket for large dumps and for many requests that hardly ever fail."""

    def ask(self, kind: int, body: bytes) -> None:
        """Request a dump. Its answers are not to be mixed with those to anything else."""
        self._sequence += 1
        self._socket.send(packed(kind, NLM_F_REQUEST | NLM_F_DUMP, self._sequence, body))

    def datagram(self) -> bytes:
        return self._socket.recv(DATAGRAM)

    def carry_out_quietly(self, kind: int, bodies: Sequence[bytes]) -> list[int]:
        """Send all requests; return the errno of those that fail, in order.

        Only the last request of a batch asks for an answer if all is well: an answer to each
        costs more than the request.
        """
        failures: list[int] = []
        for start in range(0, len(bodies), BATCH):
            batch = bodies[start : start + BATCH]
            first = self._sequence + 1
            self._sequence += len(batch)
            requests = [packed(kind, NLM_F_REQUEST, first + n, b) for n, b in enumerate(batch)]
            requests[-1] = packed(kind, NLM_F_REQUEST | NLM_F_ACK, self._sequence, batch[-1])
            self._socket.send(b"".join(requests))
            failures += self._failures()
        return failures

    def _failures(self) -> list[int]:
        codes: list[int] = []
        while True:
            for answer, sequence, payload in self._receive():
                if answer == NLMSG_ERROR:
                    code = -ERRNO.unpack_from(payload)[0]
                    if code:
                        codes.append(code)
                    if sequence == self._sequence:
                        return codes


def clean(table: Conntrack, review: Review, around: Surroundings) -> int:
    """Delete what the review condemns and return how many flows. It blocks; raises ``OSError``."""
    if not review:
        return 0
    return table.delete(list(condemned(table.flows(review.frontends), review, around)))


def questions(frontends: Iterable[Frontend]) -> Mapping[Frontend, list[Frontend]]:
    """Return what to ask the kernel for, and the frontends that each answer is looked through for.

    An address is asked for where it is the only one with its port. No flow is in two answers.
    """
    by_port: dict[Frontend, list[Frontend]] = {}
    for frontend in set(frontends):
        by_port.setdefault(frontend._replace(ip=""), []).append(frontend)
    if len(by_port) <= FEW:
        return {same[0] if len(same) == 1 else port: same for port, same in by_port.items()}
    by_proto: dict[Frontend, list[Frontend]] = {}
    for port, same in by_port.items():
        by_proto.setdefault(port._replace(port=0), []).extend(same)
    return by_proto


def picked(data: bytes, at: int, end: int) -> bytes:
    """Return the attributes that, with the original tuple, name exactly one flow.

    A zone, which most flows do not have, comes before the number.
    """
    zone = b""
    while at < end:
        length, kind = ATTRIBUTE.unpack_from(data, at)
        after = at + aligned(length)
        if kind == CTA_ID:
            return zone + data[at:after]
        if kind == CTA_ZONE:
            zone = data[at:after]
        at = after
    return zone


def nested(kind: int, value: bytes) -> bytes:
    return attribute(kind | NLA_F_NESTED, value)
