"""Keeps the ports of a Service address that no Service uses silent.

An address is made local for the sake of a few ports. Connections to its other ports are none of
our business: without this they would be answered, with a reset, by a node that does not own the
address. A program at the kernel's socket lookup hands them to sockets that admit nobody. Linux:
Documentation/bpf/prog_sk_lookup.rst; kernel 5.9 or newer and CAP_BPF with CAP_NET_ADMIN.
"""

import os
import socket
import struct

from pyproxy.model import Family, Frontend
from pyproxy.proxier import _bpf
from pyproxy.proxier._sockets import attach_guard
from pyproxy.rules.ebpf import FP, R0, R1, R2, R3, R6, R7, Assembler
from pyproxy.rules.guard import DROP_ALL

MAP_LOOKUP, SK_ASSIGN, SK_RELEASE = 1, 124, 86  # helper functions
PROTOCOLS = {"TCP": socket.IPPROTO_TCP, "UDP": socket.IPPROTO_UDP}
MAX_ENTRIES = 1 << 18
INDEX = -64  # on the stack: which sink

# struct bpf_sk_lookup: the offsets of its fields
FAMILY, PROTOCOL, LOCAL_IP4, LOCAL_IP6, LOCAL_PORT = 8, 12, 40, 44, 60


class Unsupported(Exception):
    """This kernel, or this process's privileges, do not allow it."""


class Unclaimed:
    """The claimed ports of addresses, for one family, in the network namespace of the process."""

    def __init__(self, family: Family) -> None:
        """Load and attach the program. Raises ``Unsupported``."""
        self._family = socket.AF_INET if family == 4 else socket.AF_INET6
        self._sinks: list[socket.socket] = []
        self._handles: list[_bpf.Handle] = []
        try:
            self._sinks += map(self._sink, (socket.SOCK_STREAM, socket.SOCK_DGRAM))
            size = 4 if family == 4 else 16
            self._addresses = self._map(_bpf.HASH, size, 1, MAX_ENTRIES, flags=_bpf.GROWS)
            self._claims = self._map(_bpf.HASH, size + 8, 1, MAX_ENTRIES, flags=_bpf.GROWS)
            sinks = self._map(_bpf.SOCKMAP, 4, 4, 2)
            for index, sink in enumerate(self._sinks):
                sinks[struct.pack("=I", index)] = struct.pack("=I", sink.fileno())
            program = _bpf.load_program(
                _bpf.SK_LOOKUP,
                code(self._family, self._addresses.fd, self._claims.fd, sinks.fd),
                attach=_bpf.ATTACH_SK_LOOKUP,
                name="pyproxy",
            )
            self._handles.append(program)
            namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
            try:
                self._handles.append(_bpf.create_link(program, namespace, _bpf.ATTACH_SK_LOOKUP))
            finally:
                os.close(namespace)
        except OSError as error:
            self.close()
            raise Unsupported(error.strerror) from error

    def close(self) -> None:
        """Detach the program: its link ends with its descriptor."""
        for handle in self._handles:
            handle.close()
        for sink in self._sinks:
            sink.close()

    def watch(self, ip: str) -> None:
        """Silence the ports of this address that are not claimed."""
        self._addresses[socket.inet_pton(self._family, ip)] = b"\1"

    def unwatch(self, ip: str) -> None:
        del self._addresses[socket.inet_pton(self._family, ip)]

    def claim(self, frontend: Frontend) -> None:
        self._claims[self._key(frontend)] = b"\1"

    def release(self, frontend: Frontend) -> None:
        del self._claims[self._key(frontend)]

    def _key(self, frontend: Frontend) -> bytes:
        packed = socket.inet_pton(self._family, frontend.ip)
        return packed + struct.pack("=II", frontend.port, PROTOCOLS[frontend.proto])

    def _sink(self, kind: socket.SocketKind) -> socket.socket:
        sink = socket.socket(self._family, kind)
        attach_guard(sink, DROP_ALL)
        sink.bind(("127.0.0.1" if self._family == socket.AF_INET else "::1", 0))
        if kind is socket.SOCK_STREAM:
            sink.listen(1)
        return sink

    def _map(
        self, kind: int, key_size: int, value_size: int, entries: int, *, flags: int = 0
    ) -> _bpf.Map:
        created = _bpf.create_map(kind, key_size, value_size, entries, flags=flags)
        self._handles.append(created)
        return created


def code(family: int, addresses: int, claims: int, sinks: int) -> bytes:
    """Assemble: is the address watched, and the port not claimed? Then assign the sink."""
    words = 1 if family == socket.AF_INET else 4
    source = LOCAL_IP4 if family == socket.AF_INET else LOCAL_IP6
    key = -(4 * words + 8)  # on the stack: address, port, protocol
    fields = [source + 4 * word for word in range(words)] + [LOCAL_PORT, PROTOCOL]
    asm = Assembler()
    asm.set(R6, R1)
    asm.load(R2, R6, FAMILY, 4)
    asm.jump_if(R2, "!=", family, "pass")
    for index, field in enumerate(fields):
        asm.load(R3, R6, field, 4)
        asm.store(FP, key + 4 * index, R3, 4)
    look_up(asm, addresses, key)
    asm.jump_if(R0, "==", 0, "pass")  # not watched
    look_up(asm, claims, key)
    asm.jump_if(R0, "!=", 0, "pass")  # claimed
    asm.load(R3, R6, PROTOCOL, 4)
    asm.store(FP, INDEX, 0, 4)
    asm.jump_if(R3, "==", socket.IPPROTO_TCP, "indexed")
    asm.store(FP, INDEX, 1, 4)
    asm.label("indexed")
    look_up(asm, sinks, INDEX)
    asm.jump_if(R0, "==", 0, "pass")
    asm.set(R7, R0)
    asm.set(R1, R6)
    asm.set(R2, R7)
    asm.set(R3, 0)
    asm.call(SK_ASSIGN)
    asm.set(R1, R7)
    asm.call(SK_RELEASE)
    asm.label("pass")
    asm.exit(1)
    return asm.code()


def look_up(asm: Assembler, map_fd: int, key: int) -> None:
    asm.map(R1, map_fd)
    asm.set(R2, FP)
    asm.compute(R2, "+", key)
    asm.call(MAP_LOOKUP)
