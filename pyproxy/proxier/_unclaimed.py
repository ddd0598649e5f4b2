"""Keeps the ports of a Service address that no Service uses silent.

An address is made local for the sake of a few ports. Connections to its other ports are none of
our business: without this they would be answered, with a reset, by a node that does not own the
address. A program at the kernel's socket lookup hands them to sockets that admit nobody. Linux:
Documentation/bpf/prog_sk_lookup.rst; kernel 5.9 or newer and CAP_BPF with CAP_NET_ADMIN.
"""

import ctypes
import errno
import os
import platform
import socket
import struct
from contextlib import suppress

from pyproxy.model import Family, Frontend
from pyproxy.proxier._sockets import attach_guard
from pyproxy.rules.guard import DROP_ALL

SYSCALLS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
MAP_CREATE, MAP_UPDATE, MAP_DELETE, PROG_LOAD, LINK_CREATE = 0, 2, 3, 5, 28
MAP_HASH, MAP_SOCKMAP = 1, 15
PROG_TYPE_SK_LOOKUP, ATTACH_SK_LOOKUP = 30, 36
LOOKUP_ELEMENT, SK_ASSIGN, SK_RELEASE = 1, 124, 86  # helper functions
PROTOCOLS = {"TCP": socket.IPPROTO_TCP, "UDP": socket.IPPROTO_UDP}
MAX_ENTRIES = 1 << 18

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
        self._fds: list[int] = []
        try:
            self._sinks += map(self._sink, (socket.SOCK_STREAM, socket.SOCK_DGRAM))
            size = 4 if family == 4 else 16
            self._addresses = self._map(MAP_HASH, size, 1, flags=1)  # memory as it is used
            self._claims = self._map(MAP_HASH, size + 8, 1, flags=1)
            sinks = self._map(MAP_SOCKMAP, 4, 4, entries=2)
            for index, sink in enumerate(self._sinks):
                update(sinks, struct.pack("=I", index), struct.pack("=I", sink.fileno()))
            program = self._open(load(code(self._family, self._addresses, self._claims, sinks)))
            namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
            try:
                attributes = struct.pack("=IIII", program, namespace, ATTACH_SK_LOOKUP, 0)
                self._open(bpf(LINK_CREATE, attributes))
            finally:
                os.close(namespace)
        except OSError as error:
            self.close()
            raise Unsupported(os.strerror(error.errno or 0)) from error

    def close(self) -> None:
        """Detach the program: its link ends with its descriptor."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        for sink in self._sinks:
            sink.close()

    def watch(self, ip: str) -> None:
        """Silence the ports of this address that are not claimed."""
        update(self._addresses, socket.inet_pton(self._family, ip), b"\1")

    def unwatch(self, ip: str) -> None:
        delete(self._addresses, socket.inet_pton(self._family, ip))

    def claim(self, frontend: Frontend) -> None:
        update(self._claims, self._key(frontend), b"\1")

    def release(self, frontend: Frontend) -> None:
        delete(self._claims, self._key(frontend))

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
        self, kind: int, key: int, value: int, *, entries: int = MAX_ENTRIES, flags: int = 0
    ) -> int:
        attributes = struct.pack("=IIIII", kind, key, value, entries, flags)
        return self._open(bpf(MAP_CREATE, attributes))

    def _open(self, fd: int) -> int:
        self._fds.append(fd)
        return fd


def code(family: int, addresses: int, claims: int, sinks: int) -> bytes:
    """Assemble: is the address watched, and the port not claimed? Then assign the sink."""
    words = 1 if family == socket.AF_INET else 4
    source = LOCAL_IP4 if family == socket.AF_INET else LOCAL_IP6
    key = -(4 * words + 8)  # on the stack: address, port, protocol
    body: list[Step] = [
        *(step for w in range(words) for step in copy(key + 4 * w, source + 4 * w)),
        *copy(key + 4 * words, LOCAL_PORT),
        *copy(key + 4 * words + 4, PROTOCOL),
        *lookup(addresses, key),
        Jump(0x15, 0),  # not watched
        *lookup(claims, key),
        Jump(0x55, 0),  # claimed
        instruction(0x61, 3, 6, PROTOCOL),
        instruction(0x62, 10, 0, -64, 0),  # index 0: TCP
        instruction(0x15, 3, 0, 1, socket.IPPROTO_TCP),
        instruction(0x62, 10, 0, -64, 1),
        *lookup(sinks, -64),
        Jump(0x15, 0),
        instruction(0xBF, 7, 0),
        instruction(0xBF, 1, 6),
        instruction(0xBF, 2, 7),
        instruction(0xB7, 3, 0),
        instruction(0x85, 0, 0, 0, SK_ASSIGN),
        instruction(0xBF, 1, 7),
        instruction(0x85, 0, 0, 0, SK_RELEASE),
    ]
    start: list[Step] = [
        instruction(0xBF, 6, 1),
        instruction(0x61, 2, 6, FAMILY),
        Jump(0x55, 2, family),
    ]
    steps = start + body
    return b"".join(
        step.to(len(steps) - index - 1) if isinstance(step, Jump) else step
        for index, step in enumerate(steps)
    ) + b"".join([instruction(0xB7, 0, 0, 0, 1), instruction(0x95, 0, 0)])


class Jump:
    """A conditional jump to the end of the program, where the packet passes untouched."""

    def __init__(self, operation: int, register: int, value: int = 0) -> None:
        self._operation, self._register, self._value = operation, register, value

    def to(self, distance: int) -> bytes:
        return instruction(self._operation, self._register, 0, distance, self._value)


Step = bytes | Jump


def instruction(operation: int, to: int, source: int, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("=BBhi", operation, source << 4 | to, offset, value)


def copy(stack_offset: int, context_offset: int) -> list[bytes]:
    return [
        instruction(0x61, 3, 6, context_offset),
        instruction(0x63, 10, 3, stack_offset),
    ]


def lookup(map_fd: int, key_offset: int) -> list[bytes]:
    pseudo_map = 1
    return [  # the first instruction takes two slots, which are two steps for Jump to count
        instruction(0x18, 1, pseudo_map, 0, map_fd),
        instruction(0x00, 0, 0),
        instruction(0xBF, 2, 10),
        instruction(0x07, 2, 0, 0, key_offset),
        instruction(0x85, 0, 0, 0, LOOKUP_ELEMENT),
    ]


def load(program: bytes) -> int:
    """Load the program; return its descriptor. Raises ``OSError``."""
    buffer, licence = ctypes.create_string_buffer(program), ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "=IIQQIIQII16sII", PROG_TYPE_SK_LOOKUP, len(program) // 8, ctypes.addressof(buffer),
        ctypes.addressof(licence), 0, 0, 0, 0, 0, b"pyproxy", 0, ATTACH_SK_LOOKUP,
    )  # fmt: skip
    for _attempt in range(5):  # a signal that is pending stops the verifier
        with suppress(BlockingIOError):
            return bpf(PROG_LOAD, attributes)
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def update(map_fd: int, key: bytes, value: bytes) -> None:
    k, v = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(value)
    bpf(MAP_UPDATE, struct.pack("=IIQQQ", map_fd, 0, ctypes.addressof(k), ctypes.addressof(v), 0))


def delete(map_fd: int, key: bytes) -> None:
    k = ctypes.create_string_buffer(key, len(key))
    with suppress(FileNotFoundError):
        bpf(MAP_DELETE, struct.pack("=IIQQQ", map_fd, 0, ctypes.addressof(k), 0, 0))


def bpf(command: int, attributes: bytes) -> int:
    """Make the bpf system call. Raises ``OSError``."""
    number = SYSCALLS.get(platform.machine())
    if number is None:
        raise OSError(38, f"no bpf system call is known for {platform.machine()}")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = LIBC.syscall(number, command, buffer, len(attributes))
    if result < 0:
        code_number = ctypes.get_errno()
        raise OSError(code_number, os.strerror(code_number))
    return int(result)


LIBC = ctypes.CDLL(None, use_errno=True)
