"""What nf_tables answers, as values. No I/O."""

import struct
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, cast

from pyproxy.proxier._netlink import HEADER, NLMSG_DONE, aligned, attributes
from pyproxy.proxier._nfexpr import (
    DATA_VALUE,
    DATA_VERDICT,
    NFPROTO,
    NFPROTO_BRIDGE,
    VERDICT_CHAIN,
    VERDICT_CODE,
    VERDICTS,
)
from pyproxy.proxier._nfform import is_anonymous, plain_attributes
from pyproxy.proxier._nfpack import ELEMENT_EXPRESSION, HOOKS, uniform_template
from pyproxy.rules.nft import Chain, Element, Hook, HookType, Verdict, VerdictKind

GENERIC = 4  # struct nfgenmsg, between the header and the attributes
SIGNED = struct.Struct("=i")
NLM_F_ACK_TLVS = 0x200
COUNTED_PACKETS = 2  # of a counter
KERNEL_TEXT = 1  # NLMSGERR_ATTR_MSG

_VERBS = ("new", "get", "delete")
_OBJECTS = ("table", "chain", "rule", "set", "elements of set")
_VERDICT_KINDS: dict[int, VerdictKind] = {code & 0xFFFFFFFF: k for k, code in VERDICTS.items()}


class Generation(NamedTuple):
    """The number of the rule set, which every transaction raises, and who asked or changed it."""

    id: int
    pid: int
    process: str


class OwnRun:
    """The latest generations in a row that were all made by this process.

    The kernel numbers the states of all tables together: of a step from one to the next, only
    who makes it knows whose it is.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held from one reading of the number to the next
        self._first = self._last = -1

    def add(self, before: int, after: int) -> None:
        if before != self._last:
            self._first = before
        self._last = after

    def since(self, generation: int) -> int:
        """Return the newest generation that nobody else had a part in since this one."""
        return self._last if self._first <= generation <= self._last else generation


OWN_RUN = OwnRun()  # the process's: the families have tables, and threads, of their own


class Answer(NamedTuple):
    kind: int
    flags: int
    sequence: int
    payload: bytes


def answers(data: bytes) -> Iterator[Answer]:
    at = 0
    while at < len(data):
        length, kind, flags, sequence, _pid = HEADER.unpack_from(data, at)
        yield Answer(kind, flags, sequence, data[at + HEADER.size : at + length])
        at += aligned(length)


def described(request: bytes) -> str:
    """Say which request this is, such as ``new rule in pick-10 of ip pyproxy``."""
    answer = list(answers(request))[-1]
    message = answer.kind & 0xFF
    family = {NFPROTO[6]: "ip6", NFPROTO_BRIDGE: "bridge"}.get(answer.payload[0], "ip")
    names = dict(plain_attributes(answer.payload[GENERIC:]))
    table = f"{family} {text_in(names.get(1, b''))}"
    verb, thing = _VERBS[message % 3], _OBJECTS[min(message // 3, len(_OBJECTS) - 1)]
    if thing == "table" or len(names) < 2:
        return f"{verb} {thing} {table}"
    name = text_in(names.get(3 if thing == "chain" else 2, b""))
    return f"{verb} {thing} {name} of {table}"


def error_in(answer: Answer) -> tuple[int, str]:
    """Return the errno and what the kernel says about it."""
    code = -SIGNED.unpack_from(answer.payload)[0]
    if answer.kind == NLMSG_DONE or not answer.flags & NLM_F_ACK_TLVS:
        return code, ""
    # The request follows, without its body because of NETLINK_CAP_ACK.
    notes = dict(plain_attributes(answer.payload[SIGNED.size + HEADER.size :]))
    return code, text_in(notes.get(KERNEL_TEXT, b""))


def generation_in(payload: bytes) -> Generation:
    parts = dict(plain_attributes(payload[GENERIC:]))
    return Generation(_number(parts[1]), _number(parts.get(2, b"")), text_in(parts.get(3, b"")))


def chain_in(part: dict[int, bytes]) -> Chain:
    name = text_in(part[3])
    if 4 not in part:
        return Chain(name)
    place = dict(plain_attributes(part[4]))
    priority = int.from_bytes(place[2], "big", signed=True)
    kind = cast(HookType, text_in(part[7]))
    return Chain(name, Hook(kind, HOOKS[_number(place[1])], priority))


def anonymous_names(expressions: bytes) -> Iterator[str]:
    for _, expression in attributes(expressions, 0):
        parts = dict(plain_attributes(expression))
        for kind, value in plain_attributes(parts.get(2, b"")):
            if is_anonymous(text_in(parts[1]), kind, value):
                yield text_in(value)


def elements_in(data: bytes) -> list[Element]:
    """Return the elements in one message of a dump."""
    return _uniform_elements(data) or list(_elements(data))


def counters_in(data: bytes) -> Iterator[tuple[bytes, bytes | Verdict | None, int]]:
    """Yield key, data and packets of the elements in one message that count."""
    for _, element in attributes(data, 0):
        parts = dict(plain_attributes(element))
        if ELEMENT_EXPRESSION in parts:
            key = dict(plain_attributes(parts[1]))[DATA_VALUE]
            expression = dict(plain_attributes(parts[ELEMENT_EXPRESSION]))
            numbers = dict(plain_attributes(expression[2]))
            yield key, _element_data(parts.get(2, b"")), _number(numbers[COUNTED_PACKETS])


def _uniform_elements(data: bytes) -> list[Element] | None:
    """Read elements that all are key and data of the lengths of the first; None if they are not."""
    first = next(_elements(data), None)
    if first is None or not isinstance(first.data, bytes):
        return None
    template, head, middle = uniform_template(len(first.key), len(first.data))
    if len(data) % template.size:
        return None
    found = []
    for its_head, key, its_middle, value in template.iter_unpack(data):
        if its_head != head or its_middle != middle:
            return None
        found.append(Element(key, None, value))
    return found


def _elements(data: bytes) -> Iterator[Element]:
    for _, element in attributes(data, 0):
        parts = dict(plain_attributes(element))
        key_end = dict(plain_attributes(parts[10]))[DATA_VALUE] if 10 in parts else None
        key = dict(plain_attributes(parts[1]))[DATA_VALUE]
        comment = comment_in(parts.get(6, b""))
        counted = bool(comment) and ELEMENT_EXPRESSION in parts
        yield Element(key, key_end, _element_data(parts.get(2, b"")), comment, counted)


@lru_cache(maxsize=1024)
def _element_data(data: bytes) -> bytes | Verdict | None:
    parts = dict(plain_attributes(data))
    if DATA_VERDICT not in parts:
        return parts.get(DATA_VALUE)
    verdict = dict(plain_attributes(parts[DATA_VERDICT]))
    chain = text_in(verdict.get(VERDICT_CHAIN, b""))
    return Verdict(_VERDICT_KINDS[_number(verdict[VERDICT_CODE])], chain)


def comment_in(user_data: bytes) -> str:
    """Return nft's note 0, which is the comment of a rule or an element."""
    at = 0
    while at + 2 <= len(user_data):
        kind, length = user_data[at : at + 2]
        if kind == 0:
            return text_in(user_data[at + 2 : at + 2 + length])
        at += 2 + length
    return ""


def _number(value: bytes) -> int:
    return int.from_bytes(value, "big")


def text_in(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")
