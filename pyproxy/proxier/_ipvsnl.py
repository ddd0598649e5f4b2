"""The virtual servers of this network namespace, over generic netlink. Linux: ip_vs_ctl.c."""

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from socket import AF_INET6, inet_aton, inet_pton
from typing import NamedTuple

from msgspec import Struct

from pyproxy.counters import Counts
from pyproxy.model import Address, Family, Frontend, Proto
from pyproxy.proxier._netlink import ATTRIBUTE, Message, Netlink, attribute, attributes
from pyproxy.rules.ipvs import Destination, Server
from pyproxy.rules.nft import PROTO_NUMBERS, packed_ip

NETLINK_GENERIC = 16
CONTROLLER, GETFAMILY = 16, 3
FAMILY_ID, FAMILY_NAME = 1, 2
NAME = b"IPVS\0"

NEW_SERVICE, SET_SERVICE, DEL_SERVICE, GET_SERVICE = 1, 2, 3, 4
NEW_DEST, SET_DEST, DEL_DEST, GET_DEST = 5, 6, 7, 8
SET_CONFIG = 12
SERVICE, DEST, TIMEOUT_TCP, TIMEOUT_TCP_FIN, TIMEOUT_UDP = 1, 2, 4, 5, 6
AF, PROTOCOL, ADDR, PORT, FWMARK, SCHEDULER, FLAGS, TIMEOUT, NETMASK = range(1, 10)
STATS, STATS64 = 10, 12  # of servers and of destinations alike; the second since Linux 4.1
COUNTERS = range(1, 6)
COUNTED = ("connections", "packets_in", "packets_out", "bytes_in", "bytes_out")
D_ADDR, D_PORT, D_METHOD, D_WEIGHT, D_UPPER, D_LOWER, D_ACTIVE, D_INACTIVE = range(1, 9)
PERSISTENT = 0x1
# Flags that schedulers give a meaning to. Without the first, connections that hash to a
# destination of weight 0 are refused; kube-proxy has mh mind the client's port too.
FALL_BACK, BY_PORT = 0x8, 0x10
SCHEDULER_FLAGS: Mapping[str, int] = {"sh": FALL_BACK, "mh": FALL_BACK | BY_PORT}
# The third flag that schedulers may give a meaning to, and none does: it tells, in the kernel
# itself, which virtual servers are ours.
OURS = 0x20
AT_ONCE = 512  # messages of one send

GENERIC = struct.Struct("=BBH")
U32 = struct.Struct("=I")
# Attribute DEST in one go, for they are most of all messages: what is the same in all of them is
# packed once. Of the whole, 64 bytes, only address, port and weight differ.
DEST_PLACE = struct.Struct("=8s16s4s2s2x")
DEST_WHOLE = struct.Struct("=8s16s4s2s2x12sI16s")
ADDRESS_HEAD, PORT_HEAD = ATTRIBUTE.pack(20, D_ADDR), ATTRIBUTE.pack(6, D_PORT)
PLACE_HEAD = ATTRIBUTE.pack(DEST_PLACE.size, DEST) + ADDRESS_HEAD
WHOLE_HEAD = ATTRIBUTE.pack(DEST_WHOLE.size, DEST) + ADDRESS_HEAD
METHOD = attribute(D_METHOD, bytes(4)) + ATTRIBUTE.pack(8, D_WEIGHT)  # masquerading
LIMITS = attribute(D_UPPER, bytes(4)) + attribute(D_LOWER, bytes(4))  # none
AFS: Mapping[Family, int] = {4: socket.AF_INET, 6: socket.AF_INET6}
PROTOS: Mapping[int, Proto] = {number: proto for proto, number in PROTO_NUMBERS.items()}
ANY_HOST: Mapping[Family, int] = {4: 0xFFFFFFFF, 6: 128}  # a netmask, and a prefix length


class Busy(NamedTuple):
    """A destination as it is."""

    weight: int
    active: int
    inactive: int  # closed, or half closed

    def is_idle(self, *, doomed: bool) -> bool:
        """Say whether it may go: of a server that goes too, half closed connections are cut.

        They take minutes, through which its address would be refused by this node.
        """
        return not self.active and (doomed or not self.inactive)


class Request(Struct, frozen=True, gc=False):
    """One change, and what it is about, for who reads that it failed."""

    command: int
    subject: Frontend | Destination
    content: Server | int | None  # None: it shall be gone
    body: bytes


class Ipvs:
    """A connection to ip_vs. Raises ``OSError`` where the kernel has none, or has no right."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._netlink = Netlink(NETLINK_GENERIC, batch=AT_ONCE, receive_buffer=1 << 21)
        try:
            self._id = self._family_id()
        except OSError:
            self._netlink.close()
            raise

    def close(self) -> None:
        self._netlink.close()

    def carry_out(self, requests: Sequence[Request]) -> list[tuple[Request, int]]:
        """Make all changes; return those that failed, each with its errno."""
        heads = [GENERIC.pack(command, 1, 0) for command in range(GET_DEST)]
        messages = [Message(self._id, 0, heads[r.command] + r.body) for r in requests]
        codes = self._netlink.carry_out(messages)
        return [(request, code) for request, code in zip(requests, codes, strict=True) if code]

    def servers(self, *, ours: bool = True) -> dict[Frontend, Server]:
        """Return the virtual servers of this family that are ours, or those that are not."""
        found: dict[Frontend, Server] = {}
        for frontend, values in self._servers(ours=ours):
            flags = U32.unpack_from(values[FLAGS])[0]
            seconds = U32.unpack(values[TIMEOUT])[0] if flags & PERSISTENT else None
            found[frontend] = Server(values[SCHEDULER].rstrip(b"\0").decode(), seconds)
        return found

    def destinations(self, server: Frontend) -> dict[Address, Busy]:
        """Return the destinations of a virtual server; none if there is no such server."""
        found: dict[Address, Busy] = {}
        for address, values in self._destinations(server):
            numbers = (values[kind] for kind in (D_WEIGHT, D_ACTIVE, D_INACTIVE))
            found[address] = Busy(*(U32.unpack(number)[0] for number in numbers))
        return found

    def counters(self) -> dict[Frontend, Counts]:
        """Return what went through each of our virtual servers since it was made."""
        return {frontend: counts_of(values) for frontend, values in self._servers(ours=True)}

    def destination_counters(self, server: Frontend) -> dict[Address, Counts]:
        """Return what went to each destination of a virtual server since it was made."""
        return {address: counts_of(values) for address, values in self._destinations(server)}

    def set_timeouts(self, tcp: int, tcp_fin: int, udp: int) -> None:
        """Set the times after which idle connections are forgotten; 0 leaves the kernel's."""
        body = GENERIC.pack(SET_CONFIG, 1, 0)
        for kind, seconds in ((TIMEOUT_TCP, tcp), (TIMEOUT_TCP_FIN, tcp_fin), (TIMEOUT_UDP, udp)):
            body += attribute(kind, U32.pack(seconds))
        self._must(Message(self._id, 0, body))

    def _servers(self, *, ours: bool) -> Iterator[tuple[Frontend, dict[int, bytes]]]:
        for values in self._dump(GET_SERVICE, b"", SERVICE):
            proto = PROTOS.get(_u16(values.get(PROTOCOL)))  # of a firewall mark there is none
            if proto and _u16(values.get(AF)) == AFS[self._family]:
                flags = U32.unpack_from(values[FLAGS])[0]
                if bool(flags & OURS) == ours:
                    yield Frontend(self._ip(values[ADDR]), _port(values[PORT]), proto), values

    def _destinations(self, server: Frontend) -> Iterator[tuple[Address, dict[int, bytes]]]:
        for values in self._dump(GET_DEST, nested_place(server), DEST):
            yield Address(self._ip(values[D_ADDR]), _port(values[D_PORT])), values

    def _dump(self, command: int, body: bytes, wanted: int) -> Iterator[dict[int, bytes]]:
        for answer in self._netlink.dump(self._id, GENERIC.pack(command, 1, 0) + body):
            for kind, value in attributes(answer, GENERIC.size):
                if kind & 0x3FFF == wanted:
                    yield {k & 0x3FFF: v for k, v in attributes(value, 0)}

    def _family_id(self) -> int:
        body = GENERIC.pack(GETFAMILY, 1, 0)
        self._must(Message(CONTROLLER, 0, body + attribute(FAMILY_NAME, NAME)))  # loads the module
        answers = [dict(attributes(a, GENERIC.size)) for a in self._netlink.dump(CONTROLLER, body)]
        ids = [_u16(values[FAMILY_ID]) for values in answers if values.get(FAMILY_NAME) == NAME]
        if not ids:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return ids[0]

    def _must(self, message: Message) -> None:
        (code,) = self._netlink.carry_out([message])
        if code:
            raise OSError(code, os.strerror(code))

    def _ip(self, data: bytes) -> str:
        return socket.inet_ntop(AFS[self._family], data[: 4 if self._family == 4 else 16])


# --- requests -------------------------------------------------------------------------------------


def new_server(frontend: Frontend, server: Server) -> Request:
    return Request(NEW_SERVICE, frontend, server, _server(frontend, server))


def set_server(frontend: Frontend, server: Server) -> Request:
    return Request(SET_SERVICE, frontend, server, _server(frontend, server))


def delete_server(frontend: Frontend) -> Request:
    return Request(DEL_SERVICE, frontend, None, nested_place(frontend))


def new_destination(destination: Destination, weight: int) -> Request:
    return Request(NEW_DEST, destination, weight, _destination(destination, weight))


def set_destination(destination: Destination, weight: int) -> Request:
    return Request(SET_DEST, destination, weight, _destination(destination, weight))


def delete_destination(destination: Destination) -> Request:
    return Request(DEL_DEST, destination, None, _destination(destination, None))


@lru_cache(maxsize=1024)
def nested_place(frontend: Frontend) -> bytes:
    """Return the attribute that says which virtual server is meant."""
    return attribute(SERVICE, place(frontend))


def place(frontend: Frontend) -> bytes:
    family: Family = 6 if ":" in frontend.ip else 4
    return (
        attribute(AF, struct.pack("=H", AFS[family]))
        + attribute(PROTOCOL, struct.pack("=H", PROTO_NUMBERS[frontend.proto]))
        + attribute(ADDR, packed_ip(frontend.ip).ljust(16, b"\0"))
        + attribute(PORT, struct.pack(">H", frontend.port))
    )


def _server(frontend: Frontend, server: Server) -> bytes:
    family: Family = 6 if ":" in frontend.ip else 4
    flags = OURS | SCHEDULER_FLAGS.get(server.scheduler, 0)
    if server.affinity_seconds is not None:
        flags |= PERSISTENT
    body = nested_place(frontend)[ATTRIBUTE.size :] + attribute(
        SCHEDULER, server.scheduler.encode() + b"\0"
    )
    body += attribute(FLAGS, struct.pack("=II", flags, 0xFFFFFFFF))
    body += attribute(TIMEOUT, U32.pack(server.affinity_seconds or 0))
    return attribute(SERVICE, body + attribute(NETMASK, U32.pack(ANY_HOST[family])))


def _destination(destination: Destination, weight: int | None) -> bytes:
    (ip, port), head = destination.address, nested_place(destination.server)
    packed = inet_pton(AF_INET6, ip) if ":" in ip else inet_aton(ip)
    if weight is None:
        return head + DEST_PLACE.pack(PLACE_HEAD, packed, PORT_HEAD, port.to_bytes(2, "big"))
    return head + DEST_WHOLE.pack(
        WHOLE_HEAD, packed, PORT_HEAD, port.to_bytes(2, "big"), METHOD, weight, LIMITS
    )


def why_not(request: Request, code: int) -> str:
    """Say in words why something could not be made."""
    subject = request.subject
    if isinstance(subject, Destination):
        return f"cannot send from {subject.server} to {subject.address}: {os.strerror(code)}"
    if code == errno.EEXIST:
        return f"{subject}: somebody else's virtual server, which ipvs.excludeCIDRs leaves alone"
    reason = "no such scheduler" if code == errno.ENOENT else os.strerror(code)
    return f"cannot make a virtual server for {subject}: {reason}"


def counts_of(values: Mapping[int, bytes]) -> Counts:
    """Return the counters among the attributes of a server or of a destination."""
    counted = dict(attributes(values.get(STATS64) or values[STATS], 0))
    numbers = (int.from_bytes(counted[kind], sys.byteorder) for kind in COUNTERS)
    return Counts(**dict(zip(COUNTED, numbers, strict=True)))


def _u16(data: bytes | None) -> int:
    return int(struct.unpack("=H", data)[0]) if data else 0


def _port(data: bytes) -> int:
    return int.from_bytes(data, "big")
