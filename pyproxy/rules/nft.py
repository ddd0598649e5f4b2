"""The objects of an nf_tables table as values, and the bytes and texts of their keys.

A key of several fields is their bytes in a row, each filled up to four, so that such keys can be
put together by ``+``. A key of one field is just its bytes. Linux: net/netfilter/nf_tables_api.c.
Long, because it is the whole vocabulary, a few lines for each word, that all who use it import.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from ipaddress import IPv6Address
from socket import AF_INET, AF_INET6, inet_pton
from typing import Literal, NamedTuple

from msgspec import Struct

from pyproxy.model import Address, Family, Network, Proto

HookType = Literal["filter", "nat"]
HookName = Literal["prerouting", "input", "forward", "output", "postrouting"]
SetFlag = Literal["interval", "dynamic", "timeout"]
AddressField = Literal["saddr", "daddr"]
Field = Literal["saddr", "daddr", "l4proto", "sport", "dport", "id"]  # id: of fragments
EtherField = Literal["ether saddr", "ether daddr"]
CtState = Literal["new", "invalid"]
VerdictKind = Literal["goto", "jump", "accept", "drop", "return"]
PickKind = Literal["random", "turn", "source"]

# ``slot`` is a number in the host's byte order: which of the endpoints. It has no name among nft's
# types: a set that has one is declared with ``typeof``, and there it is a processor's number,
# the only such number that nft 1.0.6 reads and lists. ``mark`` it would list, but not read again.
TypeName = Literal[
    "ipv4_addr", "ipv6_addr", "inet_proto", "inet_service", "slot", "ether_addr", "mark"
]
Types = tuple[TypeName, ...]
Value = str | int

PROTO_NUMBERS: dict[Proto, int] = {"TCP": 6, "UDP": 17, "SCTP": 132}
DYNAMIC_SIZE = 65535  # what nft gives a dynamic set, which without a limit would grow for ever
COMMENT_LENGTH = 127  # nft refuses more
_WIDTHS: dict[TypeName, int] = {
    "ipv4_addr": 4,
    "ipv6_addr": 16,
    "inet_proto": 1,
    "inet_service": 2,
    "slot": 4,
    "ether_addr": 6,
    "mark": 4,
}
_PROTOS: dict[int, Proto] = {number: proto for proto, number in PROTO_NUMBERS.items()}
_SLOT_KEYS = tuple(number.to_bytes(4, sys.byteorder) for number in range(256))
_PROTO_KEYS: dict[Value, bytes] = {proto: bytes([n]) for proto, n in PROTO_NUMBERS.items()}


class Table(NamedTuple):
    """A table, which holds everything else. Its comment is for who lists it."""

    family: Family
    name: str
    comment: str = ""
    bridge: bool = False  # it sees frames inside of bridges, with packets of the family


class Hook(NamedTuple):
    """Where in the kernel's packet path a chain begins."""

    type: HookType
    hook: HookName
    priority: int


class Chain(NamedTuple):
    """A chain; without a hook it is entered by verdicts only."""

    name: str
    hook: Hook | None = None


class Set(Struct, frozen=True):
    """A set, or a map when it has ``data``. Only a set of several fields may have intervals."""

    name: str
    key: Types
    data: Types | Literal["verdict"] | None = None
    flags: tuple[SetFlag, ...] = ()
    timeout_seconds: int | None = None
    size: int | None = None  # None: no limit, but DYNAMIC_SIZE for a dynamic set
    counted: bool = False  # each element counts the packets that find it


# --- Statements -----------------------------------------------------------------------------------


class Verdict(Struct, frozen=True, gc=False):
    """What becomes of the packet. Only ``goto`` and ``jump`` have a chain."""

    kind: VerdictKind
    chain: str = ""


class MatchNetwork(Struct, frozen=True):
    """``ip saddr 10.244.0.0/16``; with ``inside`` false, ``!=``."""

    field: AddressField
    network: Network
    inside: bool = True


class MatchSet(Struct, frozen=True):
    """``ip daddr . meta l4proto @name``; with ``inside`` false, ``!= @name``."""

    fields: tuple[Field, ...]
    set: str
    inside: bool = True


class MatchInput(Struct, frozen=True):
    """``iifname "cni0"``, or with a star at the end, all whose name begins so."""

    interface: str
    same: bool = True


class MatchLocal(Struct, frozen=True):
    """``fib daddr type local``: the address is the node's own."""

    field: AddressField


class MatchState(Struct, frozen=True):
    """``ct state new``."""

    state: CtState


class MatchDnat(Struct, frozen=True):
    """``ct status dnat``: the connection's destination was rewritten."""


class MatchMark(Struct, frozen=True):
    """``meta mark and 0x4000 == 0x4000``: all these bits are set."""

    bits: int


class MatchProto(Struct, frozen=True):
    """``meta l4proto tcp``."""

    proto: Proto


class MatchTransparent(Struct, frozen=True):
    """``socket transparent 1``: a socket that may have others' addresses wants the packet."""


class MatchSyn(Struct, frozen=True):
    """``tcp flags & (syn | ack) == syn``: somebody asks for a connection."""


class MatchFamily(Struct, frozen=True):
    """``meta protocol ip``: the frame carries a packet of the table's family."""


class MatchPriority(Struct, frozen=True):
    """``meta priority 7079:0``: the socket that the packet is from has this priority."""

    priority: int


class MatchFragment(Struct, frozen=True):
    """``ip frag-off & 0x1fff != 0``: the first fragment of several, or one after it."""

    place: Literal["first", "later"]


class SetMark(Struct, frozen=True):
    """``meta mark set mark or 0x4000``."""

    bits: int


class ToggleMark(Struct, frozen=True):
    """``meta mark set mark xor 0x4000``."""

    bits: int


class VerdictMap(Struct, frozen=True):
    """``ip daddr . meta l4proto . th dport vmap @name``; a packet of no element goes on."""

    fields: tuple[Field, ...]
    map: str


class Pick(Struct, frozen=True):
    """A number below ``count``: at random, each in turn, or always the same for one source."""

    kind: PickKind
    count: int
    seed: int = 0  # of the hash of the source


class PickVerdict(Struct, frozen=True):
    """``numgen random mod 2 vmap { 0 : goto a, 1 : goto b }``: as many verdicts as picks."""

    pick: Pick
    verdicts: tuple[Verdict, ...]


class Dnat(Struct, frozen=True):
    """``dnat to 10.0.0.1:80``; the rule must have matched the protocol."""

    address: Address


class DnatPick(Struct, frozen=True):
    """``dnat ip to ip daddr . numgen random mod 3 map @name``: the element's address and port."""

    fields: tuple[Field, ...]
    pick: Pick
    map: str


class UpdateSet(Struct, frozen=True):
    """``update @name { ip saddr }``: add it, or begin its timeout anew."""

    set: str
    field: AddressField


class UpdateMap(Struct, frozen=True):
    """``update @name { ip saddr timeout 90s : ether saddr }``, or begin its timeout anew."""

    fields: tuple[Field, ...]
    map: str
    data: EtherField
    timeout_seconds: int


class Readdress(Struct, frozen=True):
    """``ether daddr set ip saddr map @name``: to the element's; a frame of none goes on."""

    fields: tuple[Field, ...]
    map: str


class TakeFrame(Struct, frozen=True):
    """``meta pkttype set host``: this machine wants the frame."""


class Reject(Struct, frozen=True):
    """``reject``: answer that the port is unreachable; or reset, if it is TCP for sure."""

    reset: bool = False


class Masquerade(Struct, frozen=True):
    """``masquerade fully-random``."""


class Tproxy(Struct, frozen=True):
    """``tproxy to 127.0.0.1:80``: to the connection there is, else to who listens there."""

    address: Address


class Counter(Struct, frozen=True):
    """``counter``: count packets and bytes that come by."""


AddressMatch = MatchNetwork | MatchSet | MatchInput | MatchLocal
StateMatch = MatchState | MatchDnat | MatchMark | MatchProto | MatchTransparent | MatchSyn
FrameMatch = MatchFamily | MatchPriority | MatchFragment
FrameChange = UpdateMap | Readdress | TakeFrame
Change = SetMark | ToggleMark | Dnat | DnatPick | UpdateSet
Ending = Reject | Masquerade | Tproxy | Counter | VerdictMap | PickVerdict | Verdict
Statement = AddressMatch | StateMatch | FrameMatch | FrameChange | Change | Ending


class Rule(Struct, frozen=True):
    """The statements that a packet meets in a chain, until one does not match it."""

    chain: str
    statements: tuple[Statement, ...]
    comment: str = ""


class Element(Struct, frozen=True, gc=False):
    """What a set contains. ``key_end`` is the last key of an interval, itself included.

    One that counts has a comment, too: of all others, no reader looks whether they do.
    """

    key: bytes
    key_end: bytes | None = None
    data: bytes | Verdict | None = None
    comment: str = ""
    counted: bool = False  # packets that find it, in a set whose elements do not count all


def clipped(comment: str) -> str:
    """Return as much of a comment as nft takes, in a form it can quote."""
    text = comment.replace('"', "'")
    return text.encode()[:COMMENT_LENGTH].decode(errors="ignore")


def width(table: Table, field: Field) -> int:
    """Return the bytes of a field of the packet."""
    return _WIDTHS[field_type(table, field)]


def field_type(table: Table, field: Field) -> TypeName:
    match field:
        case "saddr" | "daddr":
            return "ipv4_addr" if table.family == 4 else "ipv6_addr"
        case "l4proto":
            return "inet_proto"
        case "sport" | "dport":
            return "inet_service"
        case "id":  # has no type among nft's: these are as wide
            return "inet_service" if table.family == 4 else "mark"


# --- Keys -----------------------------------------------------------------------------------------


def packed_ip(ip: str) -> bytes:
    """Return the bytes of a canonical address of either family."""
    return inet_pton(AF_INET6 if ":" in ip else AF_INET, ip)


def packed_slot(number: int) -> bytes:
    """Return the bytes of a slot's number, in the byte order of the host."""
    return _SLOT_KEYS[number] if number < len(_SLOT_KEYS) else number.to_bytes(4, sys.byteorder)


def packed_key(types: Types, values: Sequence[Value]) -> bytes:
    """Return the bytes of a key, or of a map's data, from addresses, protocols and numbers."""
    if len(types) == 1:
        return _packed_value(types[0], values[0])
    packed = [_packed_value(t, v) for t, v in zip(types, values, strict=True)]
    return b"".join([value.ljust(len(value) + 3 & ~3, b"\0") for value in packed])


def unpacked_key(types: Types, key: bytes) -> tuple[Value, ...]:
    """Return what ``packed_key`` was given. A protocol we do not know is its number."""
    pairs = zip(types, fields_of(types, key), strict=True)
    return tuple(_unpacked_value(kind, field) for kind, field in pairs)


def key_text(types: Types, key: bytes, key_end: bytes | None = None) -> str:
    """Return a key as nft writes it, such as ``10.96.0.1 . tcp . 80 . 3``."""
    if key_end is None:
        return " . ".join(str(value).lower() for value in unpacked_key(types, key))
    pairs = zip(types, fields_of(types, key), fields_of(types, key_end), strict=True)
    return " . ".join(_interval_text(kind, first, last) for kind, first, last in pairs)


def key_length(types: Types) -> int:
    """Return the bytes of a key of these types."""
    return _layout(types)[-1][1] if len(types) == 1 else _layout(types)[-1][1] + 3 & ~3


def key_order(types: Types, key: bytes) -> tuple[int, ...]:
    """Return what sorts keys by the numbers in them."""
    return tuple(
        int.from_bytes(field, sys.byteorder if kind in ("slot", "mark") else "big")
        for kind, field in zip(types, fields_of(types, key), strict=True)
    )


def fields_of(types: Types, key: bytes) -> Iterator[bytes]:
    for first, end in _layout(types):
        yield key[first:end]


def type_widths(types: Types) -> tuple[int, ...]:
    return tuple(_WIDTHS[kind] for kind in types)


@lru_cache(maxsize=64)
def _layout(types: Types) -> tuple[tuple[int, int], ...]:
    at = 0
    places = []
    for kind in types:
        places.append((at, at + _WIDTHS[kind]))
        at += _WIDTHS[kind] + 3 & ~3
    return tuple(places)


def _packed_value(kind: TypeName, value: Value) -> bytes:
    match kind:
        case "ipv4_addr" | "ipv6_addr":
            return packed_ip(str(value))
        case "inet_proto":
            return _PROTO_KEYS[value] if value in _PROTO_KEYS else bytes([int(value)])
        case "inet_service":
            return int(value).to_bytes(2, "big")
        case "slot" | "mark":
            return packed_slot(int(value))
        case "ether_addr":
            return bytes.fromhex(str(value).replace(":", ""))


def _unpacked_value(kind: TypeName, data: bytes) -> Value:
    match kind:
        case "ipv4_addr" | "ipv6_addr":
            return _ip_text(data)
        case "inet_proto":
            return _PROTOS.get(data[0], data[0])
        case "inet_service":
            return int.from_bytes(data, "big")
        case "slot" | "mark":
            return int.from_bytes(data, sys.byteorder)
        case "ether_addr":
            return data.hex(":")


def _value_text(kind: TypeName, data: bytes) -> str:
    return str(_unpacked_value(kind, data)).lower()


def _interval_text(kind: TypeName, first: bytes, last: bytes) -> str:
    if first == last:
        return _value_text(kind, first)
    start, end = int.from_bytes(first, "big"), int.from_bytes(last, "big")
    size = end - start + 1
    if kind in ("ipv4_addr", "ipv6_addr") and not size & (size - 1) and not start & (size - 1):
        return f"{_value_text(kind, first)}/{8 * len(first) - size.bit_length() + 1}"
    return f"{_value_text(kind, first)}-{_value_text(kind, last)}"


def _ip_text(data: bytes) -> str:
    return ".".join(map(str, data)) if len(data) == 4 else str(IPv6Address(data))
