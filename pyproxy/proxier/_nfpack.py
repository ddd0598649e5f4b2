"""Requests to nf_tables as bytes, to be joined to transactions. No I/O.

Long, because each object of a table has its few lines; expressions are in ``_nfexpr``.
"""

import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count
from typing import NamedTuple

from pyproxy.model import Family
from pyproxy.proxier._netlink import HEADER, NLM_F_CREATE, NLM_F_REQUEST, aligned, attribute
from pyproxy.proxier._nfexpr import (
    LIST_ELEM,
    NFPROTO,
    NFPROTO_BRIDGE,
    host32,
    statement_expressions,
    string,
    u32,
    value_data,
    verdict_data,
)
from pyproxy.proxier._nfform import Form, normal_form, plain_attributes
from pyproxy.rules.nft import (
    DYNAMIC_SIZE,
    Chain,
    Element,
    HookName,
    PickVerdict,
    Rule,
    Set,
    SetFlag,
    Table,
    TypeName,
    Types,
    Verdict,
    clipped,
    key_length,
    packed_slot,
    type_widths,
)

SUBSYSTEM = 10 << 8  # NFNL_SUBSYS_NFTABLES
NEWTABLE, GETTABLE, DELTABLE = range(3)
NEWCHAIN, GETCHAIN, DELCHAIN = range(3, 6)
NEWRULE, GETRULE, DELRULE = range(6, 9)
NEWSET, GETSET, DELSET = range(9, 12)
NEWSETELEM, GETSETELEM, DELSETELEM = range(12, 15)
NEWGEN, GETGEN = 15, 16
APPEND = 0x800
SET_EXPRESSION = 17  # that each element of a set gets
ELEMENT_EXPRESSION = 7  # that one element has
COUNTER = string(1, "counter")

HOOKS: tuple[HookName, ...] = ("prerouting", "input", "forward", "output", "postrouting")
ACCEPT = 1
SET_ANONYMOUS, SET_CONSTANT, SET_MAP, SET_CONCATENATION = 0x1, 0x2, 0x8, 0x80
SET_FLAGS: dict[SetFlag, int] = {"interval": 0x4, "timeout": 0x10, "dynamic": 0x20}
VERDICT_TYPE = 0xFFFFFF00
VERDICT_LENGTH = 16
TYPE_NUMBERS: dict[TypeName, int] = {  # nft's own: the kernel only keeps them
    "ipv4_addr": 7,
    "ipv6_addr": 8,
    "inet_proto": 12,
    "inet_service": 13,
    "slot": 4,
    "ether_addr": 9,
    "mark": 19,
}
CHUNK = 65_000  # an attribute is at most 65,535 bytes, and all elements of a message are in one

_GENERIC = struct.Struct("=BBH")
_set_ids = count(1)  # of sets that a transaction makes: each needs its own


# --- Tables, chains, rules ------------------------------------------------------------------------


def new_table(table: Table) -> bytes:
    body = string(1, table.name) + attribute(2, u32(0))
    return _request(NEWTABLE, table, body + _comment(6, table.comment), NLM_F_CREATE)


def set_dormant(table: Table, *, dormant: bool) -> bytes:
    """Take a table that is there out of the way of packets, or put it back, with all it has."""
    return _request(NEWTABLE, table, string(1, table.name) + attribute(2, u32(int(dormant))))


def delete_table(table: Table) -> bytes:
    """Delete a table with all that is in it.

    To delete what is not there fails, here and below. What may be there or not is made first,
    in the same transaction, unless a dump has told.
    """
    return _request(DELTABLE, table, string(1, table.name))


def new_chain(table: Table, chain: Chain) -> bytes:
    body = string(1, table.name) + string(3, chain.name)
    if chain.hook:
        place = attribute(1, u32(HOOKS.index(chain.hook.hook)))
        place += attribute(2, struct.pack(">i", chain.hook.priority))
        body += attribute(4, place) + attribute(5, u32(ACCEPT)) + string(7, chain.hook.type)
    return _request(NEWCHAIN, table, body, NLM_F_CREATE)


def delete_chain(table: Table, name: str) -> bytes:
    """Delete a chain with its rules. Nothing may point to it any more."""
    return _request(DELCHAIN, table, string(1, table.name) + string(3, name))


def flush_chain(table: Table, name: str) -> bytes:
    """Delete the rules of a chain."""
    return _request(DELRULE, table, string(1, table.name) + string(2, name))


def new_rule(table: Table, rule: Rule) -> bytes:
    """Append a rule to its chain: one message for it, and several for each map of its own."""
    before, expressions = b"", b""
    for statement in rule.statements:
        map_id = 0
        if isinstance(statement, PickVerdict):
            map_id = next(_set_ids) & 0xFFFFFFFF
            before += _anonymous_map(table, statement, map_id)
        expressions += statement_expressions(table, statement, map_id)
    body = string(1, table.name) + string(2, rule.chain) + attribute(4, expressions)
    body += _comment(7, rule.comment)
    return before + _request(NEWRULE, table, body, NLM_F_CREATE | APPEND)


class RuleForm(NamedTuple):
    """A rule in the kernel's terms: equal for a rule and for its dump, see ``normal_form``."""

    chain: str
    expressions: Form
    maps: tuple[frozenset[Element], ...]  # of its own, in order
    comment: str


def rule_form(table: Table, rule: Rule) -> RuleForm:
    """Return what ``NfTables.rules`` returns for this rule when it is in the kernel."""
    picks = [s for s in rule.statements if isinstance(s, PickVerdict)]
    expressions = b"".join(statement_expressions(table, s, 1) for s in rule.statements)
    maps = tuple(frozenset(_choices(pick)) for pick in picks)
    return RuleForm(rule.chain, normal_form(expressions), maps, clipped(rule.comment))


def _anonymous_map(table: Table, statement: PickVerdict, map_id: int) -> bytes:
    choices = _choices(statement)
    body = string(1, table.name) + string(2, "__map%d") + attribute(10, u32(map_id))
    body += attribute(3, u32(SET_ANONYMOUS | SET_CONSTANT | SET_MAP))
    body += attribute(4, u32(TYPE_NUMBERS["slot"])) + attribute(5, u32(4))
    body += attribute(6, u32(VERDICT_TYPE)) + attribute(7, u32(VERDICT_LENGTH))
    body += attribute(9, attribute(1, u32(len(choices))))
    body += attribute(13, _note(0, host32(HOST_ORDER)) + _note(1, host32(MIXED_ORDER)))
    head = string(1, table.name) + string(2, "__map%d") + attribute(4, u32(map_id))
    chunks = _chunks([_packed_element(choice) for choice in choices])
    return _request(NEWSET, table, body, NLM_F_CREATE) + b"".join(
        _request(NEWSETELEM, table, head + attribute(3, chunk), NLM_F_CREATE) for chunk in chunks
    )


def _choices(statement: PickVerdict) -> list[Element]:
    return [Element(packed_slot(i), data=v) for i, v in enumerate(statement.verdicts)]


# --- Sets -----------------------------------------------------------------------------------------


def new_set(table: Table, a_set: Set) -> bytes:
    body = (
        string(1, table.name)
        + string(2, a_set.name)
        + attribute(10, u32(next(_set_ids) & 0xFFFFFFFF))
    )
    body += attribute(3, u32(_set_flags(a_set)))
    body += attribute(4, u32(_type_number(a_set.key))) + attribute(5, u32(key_length(a_set.key)))
    if a_set.data == "verdict":
        body += attribute(6, u32(VERDICT_TYPE)) + attribute(7, u32(VERDICT_LENGTH))
    elif a_set.data is not None:
        body += attribute(6, u32(_type_number(a_set.data)))
        body += attribute(7, u32(key_length(a_set.data)))
    if a_set.timeout_seconds is not None:
        body += attribute(11, struct.pack(">Q", 1000 * a_set.timeout_seconds))
    if a_set.counted:
        body += attribute(SET_EXPRESSION, COUNTER)
    body += attribute(9, _description(a_set)) + attribute(13, _set_notes(table, a_set))
    return _request(NEWSET, table, body, NLM_F_CREATE)


def delete_set(table: Table, name: str) -> bytes:
    """Delete a set with its elements. No rule may use it any more."""
    return _request(DELSET, table, string(1, table.name) + string(2, name))


def new_elements(table: Table, name: str, elements: Sequence[Element]) -> list[bytes]:
    """Add elements. One that is there already may be added again, but not with other data."""
    return _element_requests(NEWSETELEM, table, name, elements)


def get_elements(table: Table, name: str, keys: Sequence[bytes]) -> list[bytes]:
    """Ask for single elements. Not for a transaction."""
    return _element_requests(GETSETELEM, table, name, [Element(key) for key in keys])


def delete_elements(table: Table, name: str, elements: Sequence[Element]) -> list[bytes]:
    """Delete elements: all of them have to be there. Only their keys matter."""
    return _element_requests(DELSETELEM, table, name, elements)


SetForm = tuple[tuple[int, bytes], ...]
# What the dump has besides is ours for nft, or the kernel's.
_SET_MEANING = {3, 4, 5, 6, 7, 9, 11, SET_EXPRESSION}


def set_form(table: Table, a_set: Set) -> SetForm:
    """Return what ``NfTables.sets`` returns for this set when it is in the kernel."""
    return normal_set(new_set(table, a_set)[HEADER.size + _GENERIC.size :])


def normal_set(body: bytes) -> SetForm:
    parts = (
        (kind, expression_name(value) if kind == SET_EXPRESSION else value)
        for kind, value in plain_attributes(body)
        if kind in _SET_MEANING
    )
    return tuple(sorted((kind, value) for kind, value in parts if any(value)))


def expression_name(value: bytes) -> bytes:
    """Return what kind of expression this is; the kernel adds its state."""
    return dict(plain_attributes(value))[1]


def _set_flags(a_set: Set) -> int:
    flags = sum(SET_FLAGS[flag] for flag in a_set.flags)
    if a_set.data is not None:
        flags |= SET_MAP
    if "interval" in a_set.flags:
        assert len(a_set.key) > 1, "an interval of one field needs pairs of elements"
        flags |= SET_CONCATENATION
    return flags


def _type_number(types: Types) -> int:
    number = 0
    for kind in types:
        number = number << 6 | TYPE_NUMBERS[kind]
    return number


def _description(a_set: Set) -> bytes:
    size = DYNAMIC_SIZE if a_set.size is None and "dynamic" in a_set.flags else a_set.size
    body = attribute(1, u32(size)) if size else b""
    if "interval" in a_set.flags:
        lengths = (attribute(1, u32(length)) for length in type_widths(a_set.key))
        body += attribute(2, b"".join(attribute(LIST_ELEM, length) for length in lengths))
    return body


# --- Notes: what nft keeps in the kernel for itself -----------------------------------------------

MIXED_ORDER, HOST_ORDER, NETWORK_ORDER = 0, 1, 2
KEY_ORDER, DATA_ORDER, KEY_TYPEOF, DATA_TYPEOF, DATA_INTERVAL = 0, 1, 3, 4, 6
CONCATENATION, PAYLOAD, META = 13, 7, 9
TRANSPORT = 11
IP_HEADER: dict[Family, tuple[int, int]] = {4: (12, 12), 6: (13, 9)}  # the protocol, its daddr
PORT_FIELD = 2
META_KEYS: dict[TypeName, int] = {"inet_proto": 16, "slot": 20}


def _set_notes(table: Table, a_set: Set) -> bytes:
    """Say what ``nft list`` needs to print keys and data: byte orders, and types without a name."""
    notes = _note(KEY_ORDER, host32(_order(a_set.key)))
    if a_set.data is None:
        return notes
    data_order = MIXED_ORDER if a_set.data == "verdict" else _order(a_set.data)
    notes += _note(DATA_ORDER, host32(data_order))
    if "slot" in a_set.key and isinstance(a_set.data, tuple):
        notes += _note(KEY_TYPEOF, _example(table, a_set.key))
        notes += _note(DATA_TYPEOF, _example(table, a_set.data))
    return notes + _note(DATA_INTERVAL, host32(0))


def _order(types: Types) -> int:
    return NETWORK_ORDER if len(types) == 1 else MIXED_ORDER


def _example(table: Table, types: Types) -> bytes:
    """Describe fields of a packet that have these types, as ``typeof`` does in the text."""
    fields = b"".join(_note(i, _field_example(table, kind)) for i, kind in enumerate(types))
    return _note(0, host32(CONCATENATION)) + _note(1, fields)


def _field_example(table: Table, kind: TypeName) -> bytes:
    match kind:
        case "ipv4_addr" | "ipv6_addr":
            protocol, field = IP_HEADER[table.family]
        case "inet_service":
            protocol, field = TRANSPORT, PORT_FIELD
        case "ether_addr" | "mark":
            raise AssertionError("sets with slots have neither")
        case "inet_proto" | "slot":
            return _note(0, host32(META)) + _note(1, _note(0, host32(META_KEYS[kind])))
    where = _note(0, host32(protocol)) + _note(1, host32(field))
    return _note(0, host32(PAYLOAD)) + _note(1, where)


def _comment(kind: int, comment: str) -> bytes:
    """Return a comment as nft keeps it: note 0 of the object's user data."""
    return attribute(kind, _note(0, clipped(comment).encode() + b"\0")) if comment else b""


def _note(kind: int, value: bytes) -> bytes:
    return bytes([kind, len(value)]) + value


# --- Elements -------------------------------------------------------------------------------------

_HEAD = struct.Struct("=HH")


def _element_requests(
    message: int, table: Table, name: str, elements: Sequence[Element]
) -> list[bytes]:
    head = string(1, table.name) + string(2, name)
    flags = NLM_F_CREATE if message == NEWSETELEM else 0
    packed = _uniform(elements) or [_packed_element(element) for element in elements]
    return [
        _request(message, table, head + attribute(3, chunk), flags) for chunk in _chunks(packed)
    ]


def _chunks(packed: Sequence[bytes]) -> Iterator[bytes]:
    at, size = 0, 0
    for index, element in enumerate(packed):
        if size + len(element) > CHUNK:
            yield b"".join(packed[at:index])
            at, size = index, 0
        size += len(element)
    if packed:
        yield b"".join(packed[at:])


def _uniform(elements: Sequence[Element]) -> list[bytes] | None:
    """Pack elements that all are a key and plain data of the same lengths, as most are.

    100,000 take 0.05 s with a template, and a second one attribute at a time.
    """
    if not elements or not isinstance(elements[0].data, bytes):
        return None
    key_size, data_size = len(elements[0].key), len(elements[0].data)
    for e in elements:
        if e.comment or e.key_end is not None or len(e.key) != key_size:
            return None
        if not isinstance(e.data, bytes) or len(e.data) != data_size:
            return None
    template, head, middle = uniform_template(key_size, data_size)
    pack = template.pack
    return [pack(head, e.key, middle, e.data) for e in elements]


@lru_cache(maxsize=32)
def uniform_template(key_size: int, data_size: int) -> tuple[struct.Struct, bytes, bytes]:
    """Return the layout of an element that is key and data, and the heads of its attributes."""
    key, data = aligned(key_size), aligned(data_size)
    head = _HEAD.pack(key + data + 20, LIST_ELEM) + _HEAD.pack(key + 8, 1)
    head += _HEAD.pack(key_size + 4, 1)
    middle = _HEAD.pack(data + 8, 2) + _HEAD.pack(data_size + 4, 1)
    layout = (
        f"={len(head)}s{key_size}s{key - key_size}x{len(middle)}s{data_size}s{data - data_size}x"
    )
    return struct.Struct(layout), head, middle


def _packed_element(element: Element) -> bytes:
    body = value_data(1, element.key)
    if element.key_end is not None:
        body += value_data(10, element.key_end)
    match element.data:
        case Verdict():
            body += _packed_verdict(element.data)
        case bytes():
            body += value_data(2, element.data)
        case None:
            pass
    if element.counted:
        body += attribute(ELEMENT_EXPRESSION, COUNTER)
    return attribute(LIST_ELEM, body + _comment(6, element.comment))


@lru_cache(maxsize=1024)
def _packed_verdict(verdict: Verdict) -> bytes:
    return verdict_data(2, verdict)


def _request(message: int, table: Table, body: bytes, flags: int = 0) -> bytes:
    return packed_request(message, nfproto(table), body, flags)


def nfproto(table: Table) -> int:
    return NFPROTO_BRIDGE if table.bridge else NFPROTO[table.family]


def packed_request(message: int, nfproto: int, body: bytes, flags: int = 0) -> bytes:
    size = HEADER.size + _GENERIC.size + len(body)
    head = HEADER.pack(size, SUBSYSTEM | message, NLM_F_REQUEST | flags, 0, 0)
    return (head + _GENERIC.pack(nfproto, 0, 0) + body).ljust(aligned(size), b"\0")
