"""A connection to nf_tables: transactions, and what is there now.

The kernel does all its work within the call that asks for it, so that nothing here waits; a
transaction of 100,000 elements takes half a second of that call, without the interpreter's lock.
"""

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pyproxy.proxier._netlink import (
    HEADER,
    NETLINK_CAP_ACK,
    NETLINK_NETFILTER,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    SO_RCVBUFFORCE,
    SOL_NETLINK,
    aligned,
)
from pyproxy.proxier._nfexpr import string
from pyproxy.proxier._nfform import normal_form, plain_attributes
from pyproxy.proxier._nfpack import (
    GETCHAIN,
    GETGEN,
    GETRULE,
    GETSET,
    GETSETELEM,
    NEWGEN,
    SUBSYSTEM,
    RuleForm,
    SetForm,
    get_elements,
    nfproto,
    normal_set,
    packed_request,
)
from pyproxy.proxier._nfread import (
    GENERIC,
    Generation,
    anonymous_names,
    answers,
    chain_in,
    comment_in,
    counters_in,
    described,
    elements_in,
    error_in,
    generation_in,
    text_in,
)
from pyproxy.rules.nft import Chain, Element, Table, Verdict

NETLINK_ADD_MEMBERSHIP = 1
NETLINK_EXT_ACK = 11
SO_ATTACH_FILTER = 26
SO_SNDBUFFORCE = 32
NFNLGRP_NFTABLES = 7

BATCH_BEGIN, BATCH_END = 0x10, 0x11
RECEIVE = 1 << 17
RECEIVE_BUFFER = 1 << 22
SEND_BUFFER = 1 << 20
SLACK = 1 << 16  # the kernel counts its own overhead
DUMP_ATTEMPTS = 10
NUMBER = struct.Struct("=I")
FLAGS = struct.Struct("=H")
FLAGS_AT, SEQUENCE_AT = 6, 8  # in the header of a message


class NfError(Exception):
    """The kernel refused a transaction, or a dump. Nothing was changed.

    ``index`` is that of the first message it refused; None when it refused them all unread.
    """

    def __init__(self, code: int, index: int | None, message: str, text: str) -> None:
        name = f"{errno.errorcode.get(code, code)} ({os.strerror(code)})"
        super().__init__(f"nf_tables: {message}: {name}{text and f': {text}'}")
        self.errno = code
        self.index = index


class DumpedRule(NamedTuple):
    """A rule that is there. Its form equals ``rule_form`` of the rule that it was made from."""

    handle: int
    form: RuleForm


class CountedElement(NamedTuple):
    """An element, and how many packets found it."""

    key: bytes
    data: bytes | Verdict | None
    packets: int


class NfTables:
    """A socket to nf_tables. One thread at a time may use it."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        _force(self._socket, SO_RCVBUFFORCE, socket.SO_RCVBUF, RECEIVE_BUFFER)
        self._send_buffer = 0
        self._reserve(SEND_BUFFER)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def commit(self, messages: Sequence[bytes]) -> None:
        """Carry out all messages or none. Raises ``NfError``."""
        if not messages:
            return
        first = self._next_sequence(len(messages) + 2) + 1
        batch = _batch(messages, first)
        self._send(batch)
        done = False
        failure: tuple[int, int, str] | None = None
        for sequence, code, text in self._verdicts():
            if code and failure is None:
                failure = (sequence, code, text)
            done |= sequence == first + len(messages) - 1 and not code
        if failure is None and done:
            return
        sequence, code, text = failure or (first - 1, errno.ENOBUFS, "no answer")
        if not first <= sequence < first + len(messages):
            raise NfError(code, None, "transaction as a whole", text)
        index = sequence - first
        raise NfError(code, index, f"message {index}, {described(messages[index])}", text)

    def generation(self) -> Generation:
        """Return the generation. The process is this one: who made it is not kept."""
        ours = self._ask(packed_request(GETGEN, 0, b""))
        for answer in answers(self._socket.recv(RECEIVE)):
            if answer.sequence == ours and answer.kind == SUBSYSTEM | NEWGEN:
                return generation_in(answer.payload)
        raise NfError(errno.EPROTO, None, "get generation", "no answer")

    def chains(self, table: Table) -> list[Chain]:
        """Return the chains of a table; none when there is no such table."""
        bodies = self._dump(GETCHAIN, table, b"")
        parts = (dict(plain_attributes(body)) for body in bodies)
        return [chain_in(part) for part in parts if text_in(part[1]) == table.name]

    def sets(self, table: Table) -> dict[str, SetForm]:
        """Return the sets and maps of a table by name; see ``set_form``. Not those of one rule."""
        found = {}
        for body in self._dump(GETSET, table, string(1, table.name), missing_is_empty=True):
            name = text_in(dict(plain_attributes(body))[2])
            if not name.startswith("__"):
                found[name] = normal_set(body)
        return found

    def rules(self, table: Table) -> list[DumpedRule]:
        """Return the rules of a table, in order within each chain."""
        parts = [
            dict(plain_attributes(body))
            for body in self._dump(GETRULE, table, string(1, table.name))
        ]
        return [self._rule(table, part) for part in parts if text_in(part[1]) == table.name]

    def elements(self, table: Table, name: str) -> list[Element]:
        """Return the elements of a set. Raises ``NfError`` when there is no such set.

        Some 0.1 s after many were added, the kernel moves them to a larger hash table. A dump goes
        by position, so that it may then have some elements twice and lack as many others.
        """
        for _attempt in range(DUMP_ATTEMPTS):
            found: list[Element] = []
            for body in self._dump(GETSETELEM, table, string(1, table.name) + string(2, name)):
                for kind, value in plain_attributes(body):
                    if kind == 3:
                        found += elements_in(value)
            if len({element.key for element in found}) == len(found):
                return found
        raise NfError(errno.EAGAIN, None, f"get elements of set {name}", "they keep moving")

    def counters(
        self, table: Table, name: str, keys: Sequence[bytes] | None = None
    ) -> list[CountedElement]:
        """Return what the elements of a set have counted: all, or those with these keys.

        Raises ``NfError``, also when one of them is not there. While a set is moved to a larger
        hash table, a dump may lack some, or have some twice.
        """
        if keys is None:
            bodies = self._dump(GETSETELEM, table, string(1, table.name) + string(2, name))
        else:
            requests = map(acknowledged, get_elements(table, name, keys))
            bodies = [body for request in requests for body in self._dump_once(request)[0]]
        lists = (value for body in bodies for kind, value in plain_attributes(body) if kind == 3)
        return [CountedElement(*found) for value in lists for found in counters_in(value)]

    def _rule(self, table: Table, part: dict[int, bytes]) -> DumpedRule:
        expressions = part.get(4, b"")
        maps = tuple(frozenset(self.elements(table, name)) for name in anonymous_names(expressions))
        form = RuleForm(
            text_in(part[2]), normal_form(expressions), maps, comment_in(part.get(7, b""))
        )
        return DumpedRule(int.from_bytes(part[3], "big"), form)

    def _dump(
        self, message: int, table: Table, body: bytes, *, missing_is_empty: bool = False
    ) -> list[bytes]:
        """Return the attributes of each answer. A dump that a change interrupted begins anew."""
        request = packed_request(message, nfproto(table), body, NLM_F_DUMP)
        for _attempt in range(DUMP_ATTEMPTS):
            try:
                bodies, whole = self._dump_once(request)
            except NfError as error:
                if missing_is_empty and error.errno == errno.ENOENT:
                    return []
                raise
            if whole:
                return bodies
        raise NfError(errno.EINTR, None, described(request), "the rule set keeps changing")

    def _dump_once(self, request: bytes) -> tuple[list[bytes], bool]:
        ours = self._ask(request)
        bodies: list[bytes] = []
        whole = True
        while True:
            for answer in answers(self._socket.recv(RECEIVE)):
                if answer.sequence != ours:
                    continue
                whole &= not answer.flags & NLM_F_DUMP_INTR
                if answer.kind in (NLMSG_ERROR, NLMSG_DONE):
                    code, text = error_in(answer)
                    if code:
                        raise NfError(code, None, described(request), text)
                    return bodies, whole
                bodies.append(answer.payload[GENERIC:])

    def _ask(self, request: bytes) -> int:
        """Send one request outside a transaction; return its number."""
        sequence = self._next_sequence(1)
        numbered = bytearray(request)
        NUMBER.pack_into(numbered, SEQUENCE_AT, sequence)
        self._socket.send(numbered)
        return sequence

    def _verdicts(self) -> Iterator[tuple[int, int, str]]:
        """Yield sequence, errno and explanation of all answers there are to a transaction."""
        while True:
            try:
                data = self._socket.recv(RECEIVE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                # Some answers did not fit in. Those before them are there, and come first.
                if error.errno != errno.ENOBUFS:
                    raise
                continue
            for answer in answers(data):
                if answer.kind == NLMSG_ERROR:
                    yield answer.sequence, *error_in(answer)

    def _send(self, batch: bytearray) -> None:
        try:
            self._reserve(len(batch) + SLACK)
            self._socket.send(batch)
        except OSError as error:
            # Too long for the system's limits, which only the first user namespace may exceed.
            code = error.errno or errno.EIO
            raise NfError(code, None, f"transaction of {len(batch)} bytes", "") from error

    def _next_sequence(self, length: int) -> int:
        """Set apart this many sequence numbers; return the first."""
        first = self._sequence if self._sequence + length < 1 << 31 else 1
        self._sequence = first + length
        return first

    def _reserve(self, size: int) -> None:
        if size > self._send_buffer:
            _force(self._socket, SO_SNDBUFFORCE, socket.SO_SNDBUF, size)
            self._send_buffer = size


class Generations:
    """A socket that is told of every new generation, by its own process or another.

    While it is open, the kernel writes down each element of each transaction, only for the filter
    to drop it: 10,000 elements take 0.19 s instead of 0.013. To look once a second, rather ask
    ``NfTables.generation``, which takes 8 us.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._socket.setblocking(False)
        self._socket.bind((0, 0))
        _let_through_generations(self._socket)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES)

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> list[Generation]:
        """Return the new generations since the last call, without waiting.

        Some may be missing when there were very many; the newest never are alone.
        """
        found: list[Generation] = []
        while True:
            try:
                data = self._socket.recv(RECEIVE)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                continue
            new = SUBSYSTEM | NEWGEN
            found += [generation_in(a.payload) for a in answers(data) if a.kind == new]


# --- Sending --------------------------------------------------------------------------------------


def _batch(messages: Sequence[bytes], first: int) -> bytearray:
    """Return one transaction. What belongs to ``messages[i]`` has the number ``first + i``.

    Only the last message is acknowledged; errors are reported without being asked for.
    """
    batch = bytearray(_bracket(BATCH_BEGIN, first - 1))
    at = last = len(batch)
    batch += b"".join(messages)
    for index, message in enumerate(messages):
        end = at + len(message)
        while at < end:
            last = at
            NUMBER.pack_into(batch, at + SEQUENCE_AT, first + index)
            at += aligned(NUMBER.unpack_from(batch, at)[0])
    flags = FLAGS.unpack_from(batch, last + FLAGS_AT)[0]
    FLAGS.pack_into(batch, last + FLAGS_AT, flags | NLM_F_ACK)
    batch += _bracket(BATCH_END, first + len(messages))
    return batch


def acknowledged(request: bytes) -> bytes:
    """Return a request whose answers end with a word of the kernel."""
    changed = bytearray(request)
    FLAGS.pack_into(changed, FLAGS_AT, FLAGS.unpack_from(changed, FLAGS_AT)[0] | NLM_F_ACK)
    return bytes(changed)


def _bracket(kind: int, sequence: int) -> bytes:
    head = HEADER.pack(HEADER.size + GENERIC, kind, NLM_F_REQUEST, sequence, 0)
    return head + struct.pack("=BB", 0, 0) + struct.pack(">H", SUBSYSTEM >> 8)


def _force(sock: socket.socket, force: int, ask: int, size: int) -> None:
    """Set the size of a buffer, above the system's limit if we may."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, force, size)
    except PermissionError:  # root of a user namespace only
        sock.setsockopt(socket.SOL_SOCKET, ask, size)


def _let_through_generations(sock: socket.socket) -> None:
    """Attach a filter that drops all but messages of the type NEWGEN."""
    # A filter reads numbers as the network orders them; the header has the order of the host.
    wanted = int.from_bytes(struct.pack("=H", SUBSYSTEM | NEWGEN), "big")
    program = [(0x28, 0, 0, 4), (0x15, 0, 1, wanted), (0x06, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, 0)]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    pointer = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, pointer)
