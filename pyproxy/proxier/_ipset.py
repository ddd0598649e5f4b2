"""Sets of addresses that rules of iptables match, over netlink.

Members that are there already, or gone already, are no errors to the kernel unless it is asked
to mind: a batch may be repeated. Linux: include/uapi/linux/netfilter/ipset/ip_set.h.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence

from pyproxy.model import Family
from pyproxy.proxier._netlink import (
    NETLINK_NETFILTER,
    Message,
    Netlink,
    attribute,
    attributes,
)

SUBSYSTEM = 6 << 8
CREATE, DESTROY, LIST, ADD, DEL = (SUBSYSTEM | n for n in (2, 3, 7, 9, 10))
PROTOCOL = 6  # of the kernel's two, the one that old ones speak too
REVISION = 1  # of the types; the first that knows SCTP
MAX_MEMBERS = 1 << 20
NLA_F_NESTED = 0x8000
NLA_F_NET_BYTEORDER = 0x4000
ATTR_PROTOCOL, ATTR_SETNAME, ATTR_TYPENAME, ATTR_REVISION, ATTR_FAMILY = 1, 2, 3, 4, 5
ATTR_DATA, ATTR_ADT = 7, 8
ATTR_IP, ATTR_PORT, ATTR_PROTO, ATTR_IP2 = 1, 4, 7, 20
ATTR_MAXELEM = 19
ATTR_IPADDR: dict[Family, int] = {4: 1, 6: 2}
AFS: dict[Family, int] = {4: socket.AF_INET, 6: socket.AF_INET6}
NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132}
PROTOS = {number: name for name, number in NUMBERS.items()}
IP_PORT, IP_PORT_IP = "hash:ip,port", "hash:ip,port,ip"
NF_HEADER = struct.Struct("=BBH")


class IpSets:
    """The sets of one family. One thread at a time may use it."""

    def __init__(self, family: Family) -> None:
        self._family: Family = family
        self._netlink = Netlink(NETLINK_NETFILTER)

    def close(self) -> None:
        self._netlink.close()

    def create(self, name: str, kind: str) -> None:
        """Create a set unless it is there. Raises ``OSError``."""
        body = attribute(ATTR_TYPENAME, kind.encode() + b"\0")
        body += attribute(ATTR_REVISION, bytes([REVISION]))
        body += attribute(ATTR_FAMILY, bytes([AFS[self._family]]))
        limit = attribute(ATTR_MAXELEM | NLA_F_NET_BYTEORDER, struct.pack("!I", MAX_MEMBERS))
        self._carry_out([self._message(CREATE, name, body + nested(ATTR_DATA, limit))], name)

    def add(self, name: str, members: Iterable[str]) -> None:
        """Add members, each as ``ip,proto:port`` or ``ip,proto:port,ip``. Raises ``OSError``."""
        self._change(ADD, name, members)

    def remove(self, name: str, members: Iterable[str]) -> None:
        self._change(DEL, name, members)

    def members(self, name: str) -> set[str] | None:
        """Return the members; None if there is no such set. Raises ``OSError``."""
        found: set[str] = set()
        try:
            for payload in self._netlink.dump(LIST, self._message(LIST, name, b"").body):
                found.update(members_in(payload))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return found

    def destroy(self, name: str) -> None:
        """Delete a set; it is no error if it is not there. Raises ``OSError``."""
        code = self._netlink.carry_out([self._message(DESTROY, name, b"")])[0]
        if code not in (0, errno.ENOENT):
            raise OSError(code, f"set {name}: {text_of(code)}")

    def _message(self, kind: int, name: str, body: bytes) -> Message:
        head = NF_HEADER.pack(AFS[self._family], 0, 0) + attribute(ATTR_PROTOCOL, bytes([PROTOCOL]))
        return Message(kind, 0, head + attribute(ATTR_SETNAME, name.encode() + b"\0") + body)

    def _change(self, kind: int, name: str, members: Iterable[str]) -> None:
        packed = [self._message(kind, name, packed_member(m, self._family)) for m in members]
        self._carry_out(packed, name)

    def _carry_out(self, messages: Sequence[Message], name: str) -> None:
        for code in self._netlink.carry_out(messages):
            if code:
                raise OSError(code, f"set {name}: {text_of(code)}")


def packed_member(text: str, family: Family) -> bytes:
    ip, port, *rest = text.split(",")
    proto, _, number = port.partition(":")
    data = packed_address(ATTR_IP, ip, family)
    data += attribute(ATTR_PORT | NLA_F_NET_BYTEORDER, int(number).to_bytes(2, "big"))
    data += attribute(ATTR_PROTO, bytes([NUMBERS[proto]]))
    data += b"".join(packed_address(ATTR_IP2, ip, family) for ip in rest)
    return nested(ATTR_DATA, data)


def packed_address(kind: int, ip: str, family: Family) -> bytes:
    packed = socket.inet_pton(AFS[family], ip)
    return nested(kind, attribute(ATTR_IPADDR[family] | NLA_F_NET_BYTEORDER, packed))


def nested(kind: int, value: bytes) -> bytes:
    return attribute(kind | NLA_F_NESTED, value)


def text_of(code: int) -> str:
    return os.strerror(code) if code < 4096 else f"error {code} of ip_set"


def members_in(payload: bytes) -> Iterator[str]:
    """Yield the members that one answer to a listing has."""
    for kind, value in attributes(payload, NF_HEADER.size):
        if kind & 0xFFF == ATTR_ADT:
            for _kind, data in attributes(value, 0):
                yield member_in(data)


def member_in(data: bytes) -> str:
    found = {kind & 0xFFF: value for kind, value in attributes(data, 0)}
    port = int.from_bytes(found[ATTR_PORT], "big")
    text = f"{ip_in(found[ATTR_IP])},{PROTOS.get(found[ATTR_PROTO][0], '?')}:{port}"
    return f"{text},{ip_in(found[ATTR_IP2])}" if ATTR_IP2 in found else text


def ip_in(data: bytes) -> str:
    packed = next(value for _kind, value in attributes(data, 0))
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)
