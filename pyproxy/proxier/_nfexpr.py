"""Statements of nf_tables rules as the kernel's expressions. No I/O.

Expressions work on sixteen registers of four bytes. Here a rule's first key begins in register 0,
fields follow each other as in a set's key, and what a number is hashed from lies behind the key.
"""

import struct
from collections.abc import Sequence

from pyproxy.model import Address, Family
from pyproxy.proxier._netlink import attribute
from pyproxy.rules.nft import (
    PROTO_NUMBERS,
    AddressMatch,
    Change,
    Counter,
    CtState,
    Dnat,
    DnatPick,
    Ending,
    EtherField,
    Field,
    FrameChange,
    FrameMatch,
    Masquerade,
    MatchDnat,
    MatchFamily,
    MatchFragment,
    MatchInput,
    MatchLocal,
    MatchMark,
    MatchNetwork,
    MatchPriority,
    MatchProto,
    MatchSet,
    MatchState,
    MatchSyn,
    MatchTransparent,
    Pick,
    PickVerdict,
    Readdress,
    Reject,
    SetMark,
    StateMatch,
    Statement,
    Table,
    TakeFrame,
    ToggleMark,
    Tproxy,
    UpdateMap,
    UpdateSet,
    Verdict,
    VerdictKind,
    VerdictMap,
    packed_ip,
    width,
)

NFPROTO: dict[Family, int] = {4: 2, 6: 10}
NFPROTO_BRIDGE = 7

LIST_ELEM = 1
DATA_VALUE, DATA_VERDICT = 1, 2
VERDICT_CODE, VERDICT_CHAIN = 1, 2
VERDICTS: dict[VerdictKind, int] = {"drop": 0, "accept": 1, "jump": -3, "goto": -4, "return": -5}

EQUAL, NOT_EQUAL = 0, 1
LINK_HEADER, NETWORK_HEADER, TRANSPORT_HEADER = 0, 1, 2
META_PROTOCOL, META_PRIORITY, META_MARK, META_IIFNAME = 1, 2, 3, 6
META_L4PROTO, META_PKTTYPE = 16, 19
PACKET_HOST = 0
ETHERTYPE: dict[Family, bytes] = {4: b"\x08\x00", 6: b"\x86\xdd"}
ETHER_AT: dict[EtherField, int] = {"ether daddr": 0, "ether saddr": 6}
ETHER_LENGTH = 6
IPPROTO_FRAGMENT = 44
FRAGMENT_AT: dict[Family, int] = {4: 6, 6: 42}  # its offset and flags
FRAGMENT_OFFSET: dict[Family, int] = {4: 0x1FFF, 6: 0xFFF8}
MORE_FRAGMENTS: dict[Family, int] = {4: 0x2000, 6: 0x0001}
TCP_FLAGS_AT, SYN, ACK = 13, 0x02, 0x10
CT_STATE, CT_STATUS = 0, 2
SOCKET_TRANSPARENT = 0
CT_STATES: dict[CtState, int] = {"invalid": 1, "new": 8}
DNAT_DONE = 0x20  # IPS_DST_NAT
FIB_ADDRESS_TYPE = 3
FIB_FROM: dict[str, int] = {"saddr": 1, "daddr": 2}
LOCAL = 2  # RTN_LOCAL
NUMBERS_IN_TURN, NUMBERS_AT_RANDOM = 0, 1
NAT_DESTINATION = 1
NAT_WITH_PORT = 3  # NF_NAT_RANGE_MAP_IPS | NF_NAT_RANGE_PROTO_SPECIFIED
NAT_FULLY_RANDOM = 0x10
PORT_UNREACHABLE: dict[Family, int] = {4: 3, 6: 4}
INTERFACE_NAME = 16  # IFNAMSIZ
UPDATE = 1
ANONYMOUS_MAP = "__map%d"  # the kernel puts the number in

_ADDRESS_AT: dict[Family, dict[str, int]] = {
    4: {"saddr": 12, "daddr": 16, "id": 4},
    6: {"saddr": 8, "daddr": 24, "id": 44},  # of the fragment header, if it is the first
}
_PORT_AT: dict[Field, int] = {"sport": 0, "dport": 2}
_ALL_BITS = 0xFFFFFFFF

u32 = struct.Struct(">I").pack
host32 = struct.Struct("=I").pack


def statement_expressions(table: Table, statement: Statement, map_id: int) -> bytes:
    """Return the list of expressions of one statement.

    ``map_id`` names the map of a ``PickVerdict`` within the transaction: it has to come before.
    """
    match statement:
        case MatchNetwork() | MatchSet() | MatchInput() | MatchLocal():
            return _address_match(table, statement)
        case MatchFamily() | MatchPriority() | MatchFragment():
            return _frame_match(table, statement)
        case UpdateMap() | Readdress() | TakeFrame():
            return _frame_change(table, statement)
        case (
            MatchState()
            | MatchDnat()
            | MatchMark()
            | MatchProto()
            | MatchTransparent()
            | MatchSyn()
        ):
            return _state_match(statement)
        case SetMark() | ToggleMark() | Dnat() | DnatPick() | UpdateSet():
            return _change(table, statement)
        case _:
            return _ending(table, statement, map_id)


def string(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def value_data(kind: int, value: bytes) -> bytes:
    return attribute(kind, attribute(DATA_VALUE, value))


def verdict_data(kind: int, verdict: Verdict) -> bytes:
    body = attribute(VERDICT_CODE, u32(VERDICTS[verdict.kind] & _ALL_BITS))
    if verdict.chain:
        body += string(VERDICT_CHAIN, verdict.chain)
    return attribute(kind, attribute(DATA_VERDICT, body))


def _address_match(table: Table, statement: AddressMatch) -> bytes:
    match statement:
        case MatchNetwork():
            return _network(table, statement)
        case MatchSet(fields, name, inside):
            return _load_all(table, fields) + _lookup(name, inside=inside)
        case MatchInput(interface, same):
            return _meta_load(META_IIFNAME, 0) + _compare(_interface(interface), equal=same)
        case MatchLocal(field):
            load = _numbers("fib", {1: register(0), 2: FIB_ADDRESS_TYPE, 3: FIB_FROM[field]})
            return load + _compare(host32(LOCAL))


def _state_match(statement: StateMatch) -> bytes:
    match statement:
        case MatchState(state):
            return _ct_bit(CT_STATE, CT_STATES[state])
        case MatchDnat():
            return _ct_bit(CT_STATUS, DNAT_DONE)
        case MatchMark(bits):
            load = _meta_load(META_MARK, 0)
            return load + _bitwise(host32(bits), bytes(4)) + _compare(host32(bits))
        case MatchProto(proto):
            return _meta_load(META_L4PROTO, 0) + _compare(bytes([PROTO_NUMBERS[proto]]))
        case MatchTransparent():
            load = _numbers("socket", {1: SOCKET_TRANSPARENT, 2: register(0)})
            return load + _compare(bytes([1]))
        case MatchSyn():
            load = _load_bytes(TRANSPORT_HEADER, TCP_FLAGS_AT, 1)
            return load + _masked(SYN | ACK, 1) + _compare(bytes([SYN]))


def _frame_match(table: Table, statement: FrameMatch) -> bytes:
    match statement:
        case MatchFamily():
            return _meta_load(META_PROTOCOL, 0) + _compare(ETHERTYPE[table.family])
        case MatchPriority(priority):
            return _meta_load(META_PRIORITY, 0) + _compare(host32(priority))
        case MatchFragment(place):
            load = _load_bytes(NETWORK_HEADER, FRAGMENT_AT[table.family], 2)
            if table.family == 6:
                is_fragment = _load_bytes(NETWORK_HEADER, 6, 1)
                load = is_fragment + _compare(bytes([IPPROTO_FRAGMENT])) + load
            offset, more = FRAGMENT_OFFSET[table.family], MORE_FRAGMENTS[table.family]
            if place == "later":
                return load + _masked(offset, 2) + _compare(bytes(2), equal=False)
            return load + _masked(offset | more, 2) + _compare(more.to_bytes(2, "big"))


def _frame_change(table: Table, statement: FrameChange) -> bytes:
    match statement:
        case UpdateMap(fields, name, data, seconds):
            word = sum(_words(table, field) for field in fields)
            load = _load_all(table, fields) + _load_bytes(
                LINK_HEADER, ETHER_AT[data], ETHER_LENGTH, word
            )
            numbers = {3: u32(UPDATE), 4: u32(register(0)), 5: u32(register(word))}
            timeout = {6: struct.pack(">Q", 1000 * seconds)}
            return load + _expression("dynset", numbers | timeout, string(1, name))
        case Readdress(fields, name):
            numbers = {2: u32(register(0)), 3: u32(register(0))}
            found = _load_all(table, fields) + _expression("lookup", numbers, string(1, name))
            at = {2: LINK_HEADER, 3: ETHER_AT["ether daddr"], 4: ETHER_LENGTH}
            return found + _numbers("payload", {5: register(0), **at, 6: 0, 7: 0, 8: 0})
        case TakeFrame():
            host = value_data(2, bytes([PACKET_HOST]))
            load = _expression("immediate", {1: u32(register(0))}, host)
            return load + _numbers("meta", {2: META_PKTTYPE, 3: register(0)})


def _change(table: Table, statement: Change) -> bytes:
    match statement:
        case SetMark(bits):
            return _change_mark(keep=_ALL_BITS ^ bits, toggle=bits)
        case ToggleMark(bits):
            return _change_mark(keep=_ALL_BITS, toggle=bits)
        case Dnat(address):
            return _constant(address) + _nat(table, port_word=4)
        case DnatPick(fields, pick, name):
            key_words = sum(_words(table, field) for field in fields)
            return (
                _load_all(table, fields)
                + _pick(table, pick, key_words)
                + _expression("lookup", {2: u32(register(0)), 3: u32(register(0))}, string(1, name))
                + _nat(table, port_word=_words(table, "daddr"))
            )
        case UpdateSet(name, field):
            numbers = {3: u32(UPDATE), 4: u32(register(0))}
            return _load(table, field, 0) + _expression("dynset", numbers, string(1, name))


def _ending(table: Table, statement: Ending, map_id: int) -> bytes:
    match statement:
        case Verdict():
            return _expression("immediate", {1: u32(0)}, verdict_data(2, statement))
        case VerdictMap(fields, name):
            return _load_all(table, fields) + _lookup(name, verdict=True)
        case PickVerdict(pick):
            return _pick(table, pick, 0) + _lookup(ANONYMOUS_MAP, verdict=True, set_id=map_id)
        case Reject(reset):
            code = {} if reset else {2: bytes([PORT_UNREACHABLE[table.family]])}
            return _expression("reject", {1: u32(int(reset)), **code})
        case Masquerade():
            return _numbers("masq", {1: NAT_FULLY_RANDOM})
        case Tproxy(address):
            numbers = {1: NFPROTO[table.family], 2: register(0), 3: register(4)}
            return _constant(address) + _numbers("tproxy", numbers)
        case Counter():
            return _expression("counter", {1: bytes(8), 2: bytes(8)})


def _network(table: Table, statement: MatchNetwork) -> bytes:
    """Compare the bytes of the prefix; where it ends within one, mask the rest of the address."""
    field, network, inside = statement.field, statement.network, statement.inside
    packed = network.network_address.packed
    count, odd_bits = divmod(network.prefixlen, 8)
    if count and not odd_bits:
        return _payload(table, field, 0, count) + _compare(packed[:count], equal=inside)
    mask = network.netmask.packed
    load = _load(table, field, 0) + _bitwise(mask, bytes(len(mask)))
    return load + _compare(packed, equal=inside)


def _interface(name: str) -> bytes:
    """Return what a name begins with: unless there is a star, with the zeros after it."""
    key = name.encode()
    return key[:-1] if name.endswith("*") else key.ljust(INTERFACE_NAME, b"\0")


# --- Expressions ----------------------------------------------------------------------------------


def register(word: int) -> int:
    """Return the number of the register at this word, as the kernel writes it itself.

    The first of four words has the number of the register of 16 bytes that it begins.
    """
    return 8 + word if word % 4 else 1 + word // 4


def _expression(name: str, numbers: dict[int, bytes], rest: bytes = b"") -> bytes:
    body = b"".join([attribute(kind, value) for kind, value in numbers.items()]) + rest
    return attribute(LIST_ELEM, string(1, name) + attribute(2, body))


def _numbers(name: str, numbers: dict[int, int]) -> bytes:
    return _expression(name, {kind: u32(number) for kind, number in numbers.items()})


def _load_all(table: Table, fields: Sequence[Field]) -> bytes:
    loads, word = b"", 0
    for field in fields:
        loads += _load(table, field, word)
        word += _words(table, field)
    return loads


def _load(table: Table, field: Field, word: int) -> bytes:
    if field == "l4proto":
        return _meta_load(META_L4PROTO, word)
    return _payload(table, field, word, width(table, field))


def _payload(table: Table, field: Field, word: int, length: int) -> bytes:
    if field in _PORT_AT:
        return _load_bytes(TRANSPORT_HEADER, _PORT_AT[field], length, word)
    return _load_bytes(NETWORK_HEADER, _ADDRESS_AT[table.family][field], length, word)


def _load_bytes(base: int, at: int, length: int, word: int = 0) -> bytes:
    return _numbers("payload", {1: register(word), 2: base, 3: at, 4: length})


def _words(table: Table, field: Field) -> int:
    return (width(table, field) + 3) // 4


def _meta_load(key: int, word: int) -> bytes:
    return _numbers("meta", {1: register(word), 2: key})


def _change_mark(*, keep: int, toggle: int) -> bytes:
    store = _numbers("meta", {2: META_MARK, 3: register(0)})
    return _meta_load(META_MARK, 0) + _bitwise(host32(keep), host32(toggle)) + store


def _ct_bit(key: int, bit: int) -> bytes:
    load = _numbers("ct", {1: register(0), 2: key})
    return load + _bitwise(host32(bit), bytes(4)) + _compare(bytes(4), equal=False)


def _masked(bits: int, length: int) -> bytes:
    return _bitwise(bits.to_bytes(length, "big"), bytes(length))


def _bitwise(mask: bytes, xor: bytes) -> bytes:
    numbers = {1: u32(register(0)), 2: u32(register(0)), 3: u32(len(mask))}
    return _expression("bitwise", numbers, value_data(4, mask) + value_data(5, xor))


def _compare(value: bytes, *, equal: bool = True) -> bytes:
    numbers = {1: u32(register(0)), 2: u32(EQUAL if equal else NOT_EQUAL)}
    return _expression("cmp", numbers, value_data(3, value))


def _lookup(name: str, *, inside: bool = True, verdict: bool = False, set_id: int = 0) -> bytes:
    numbers = {2: u32(register(0))}
    if verdict:
        numbers[3] = u32(0)  # the register of the verdict
    if set_id:
        numbers[4] = u32(set_id)
    if not inside:
        numbers[5] = u32(1)
    return _expression("lookup", numbers, string(1, name))


def _pick(table: Table, pick: Pick, word: int) -> bytes:
    """Put a number below ``pick.count`` into ``word``, behind the key."""
    match pick.kind:
        case "random":
            kind = NUMBERS_AT_RANDOM
        case "turn":
            kind = NUMBERS_IN_TURN
        case "source":
            free = (word + 4) & ~3
            load = _load(table, "saddr", free)
            length = width(table, "saddr")
            numbers = {1: register(free), 2: register(word), 3: length, 4: pick.count, 5: pick.seed}
            return load + _numbers("hash", numbers)
    return _numbers("numgen", {1: register(word), 2: pick.count, 3: kind})


def _constant(address: Address) -> bytes:
    """Put an address into register 0 and its port into register 4."""
    return _expression(
        "immediate", {1: u32(register(0))}, value_data(2, packed_ip(address.ip))
    ) + _expression(
        "immediate", {1: u32(register(4))}, value_data(2, address.port.to_bytes(2, "big"))
    )


def _nat(table: Table, port_word: int) -> bytes:
    address, port = register(0), register(port_word)
    numbers = {1: NAT_DESTINATION, 2: NFPROTO[table.family], 3: address, 4: address}
    return _numbers("nat", numbers | {5: port, 6: port, 7: NAT_WITH_PORT})
