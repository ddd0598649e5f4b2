"""The bpf system call: maps, programs, links, and their pins in a bpf file system.

Linux: Documentation/bpf/syscall_api.rst, bpf(2). Whoever holds a descriptor keeps the object;
closing the last one of a link detaches its program, unless the link is pinned.
"""

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

SYSCALLS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}

MAP_CREATE, MAP_LOOKUP, MAP_UPDATE, MAP_DELETE, MAP_NEXT_KEY = range(5)
PROG_LOAD, OBJ_PIN, OBJ_GET = 5, 6, 7
MAP_UPDATE_BATCH, LINK_CREATE, LINK_UPDATE, LINK_DETACH = 26, 28, 29, 34

HASH, ARRAY, LRU_HASH, SOCKMAP = 1, 2, 9, 15  # kinds of map
GROWS = 1  # a map's flag: memory is taken as it is used
SK_LOOKUP, CGROUP_SOCK_ADDR = 30, 18  # kinds of program
ATTACH_SK_LOOKUP = 36
NAME_LENGTH = 15
LOG_BYTES = 1 << 20
LOAD_ATTEMPTS = 10
ENOTSUPP = 524  # the kernel's own, which it should not tell: a kind of map without batches


class Handle:
    """An object of the kernel's, kept while this handle is open. It is a context manager."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Let go of it; more than once is allowed."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def pin(self, path: Path) -> None:
        """Give it a name in a bpf file system, which keeps it alive. Raises ``OSError``."""
        name = ctypes.create_string_buffer(os.fsencode(path))
        bpf(OBJ_PIN, struct.pack("=QII", ctypes.addressof(name), self.fd, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Map(Handle):
    """A map with keys and values of fixed size, as packed bytes."""

    def __init__(self, fd: int, key_size: int, value_size: int) -> None:
        super().__init__(fd)
        self.key_size, self.value_size = key_size, value_size
        self._key = ctypes.create_string_buffer(key_size)
        self._value = ctypes.create_string_buffer(value_size)
        key, value = ctypes.addressof(self._key), ctypes.addressof(self._value)
        self._element = struct.pack("=I4xQQQ", fd, key, value, 0)
        self._element_key = struct.pack("=I4xQ", fd, key)

    def __setitem__(self, key: bytes, value: bytes) -> None:
        """Add or replace one element, at once for whoever looks. Raises ``OSError``."""
        self._key.raw, self._value.raw = key, value
        bpf(MAP_UPDATE, self._element)

    def __delitem__(self, key: bytes) -> None:
        """Remove one element, if it is there. Raises ``OSError``."""
        self._key.raw = key
        with suppress(FileNotFoundError):
            bpf(MAP_DELETE, self._element_key)

    def get(self, key: bytes) -> bytes | None:
        self._key.raw = key
        try:
            bpf(MAP_LOOKUP, self._element)
        except FileNotFoundError:
            return None
        return self._value.raw

    def keys(self) -> Iterator[bytes]:
        """Yield the keys. If others change the map meanwhile, some may be missed or come twice."""
        following = ctypes.create_string_buffer(self.key_size)
        to = ctypes.addressof(following)
        at = 0
        while True:
            try:
                bpf(MAP_NEXT_KEY, struct.pack("=I4xQQQ", self.fd, at, to, 0))
            except FileNotFoundError:
                return
            key = following.raw
            yield key
            self._key.raw = key
            at = ctypes.addressof(self._key)

    def update(self, elements: Sequence[tuple[bytes, bytes]]) -> None:
        """Add or replace elements in this order. Raises ``OSError``."""
        keys = b"".join(key for key, _value in elements)
        values = b"".join(value for _key, value in elements)
        if not self._batch(MAP_UPDATE_BATCH, len(elements), keys, values):
            for key, value in elements:
                self[key] = value

    def discard(self, keys: Iterable[bytes]) -> None:
        """Remove elements, where they are there. Raises ``OSError``."""
        for key in keys:
            del self[key]

    def _batch(self, command: int, count: int, keys: bytes, values: bytes) -> bool:
        """Do so many elements in one system call; False where the kernel cannot (before 5.6)."""
        if count < 2:
            return False
        k, v = ctypes.create_string_buffer(keys), ctypes.create_string_buffer(values)
        attributes = struct.pack(
            "=QQQQIIQQ", 0, 0, ctypes.addressof(k), ctypes.addressof(v), count, self.fd, 0, 0
        )
        try:
            bpf(command, attributes)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, ENOTSUPP):
                return False
            raise
        return True


def create_map(
    kind: int, key_size: int, value_size: int, entries: int, *, flags: int = 0, name: str = ""
) -> Map:
    """Return a new map. Raises ``OSError``."""
    attributes = struct.pack(
        "=IIIIIII16s", kind, key_size, value_size, entries, flags, 0, 0, named(name)
    )
    return Map(bpf(MAP_CREATE, attributes), key_size, value_size)


def load_program(kind: int, code: bytes, *, attach: int = 0, name: str = "") -> Handle:
    """Return a loaded program. Raises ``OSError``, with the end of what the verifier said."""
    try:
        return Handle(try_to_load(kind, code, attach, name))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES):
            raise
    log = ctypes.create_string_buffer(LOG_BYTES)
    try:
        return Handle(try_to_load(kind, code, attach, name, log))
    except OSError as error:
        said = log.value.decode(errors="replace").strip().splitlines()
        why = " ".join([os.strerror(error.errno or 0), *said[-4:]])
        raise OSError(error.errno, why) from None


def try_to_load(
    kind: int, code: bytes, attach: int, name: str, log: "ctypes.Array[ctypes.c_char] | None" = None
) -> int:
    program, licence = ctypes.create_string_buffer(code, len(code)), ctypes.c_char_p(b"GPL")
    attributes = struct.pack(
        "=IIQQIIQII16sII",
        kind, len(code) // 8, ctypes.addressof(program),
        ctypes.cast(licence, ctypes.c_void_p).value,
        1 if log else 0, len(log) if log else 0, ctypes.addressof(log) if log else 0,
        0, 0, named(name), 0, attach,
    )  # fmt: skip
    for _attempt in range(LOAD_ATTEMPTS):  # a signal that is pending stops the verifier
        with suppress(BlockingIOError):
            return bpf(PROG_LOAD, attributes)
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def create_link(program: Handle, target: int, attach: int) -> Handle:
    """Attach a program to what ``target`` is a descriptor of: a cgroup, a network namespace.

    Raises ``OSError``.
    """
    return Handle(bpf(LINK_CREATE, struct.pack("=IIII", program.fd, target, attach, 0)))


def update_link(link: Handle, program: Handle) -> None:
    """Put another program into a link, without a moment between. Raises ``OSError``."""
    bpf(LINK_UPDATE, struct.pack("=IIII", link.fd, program.fd, 0, 0))


def detach(link: Handle) -> None:
    """Let a link's program see nothing from now on. Raises ``OSError``.

    A link that nothing refers to any more is detached, too, but not before the kernel gets to it.
    """
    bpf(LINK_DETACH, struct.pack("=I", link.fd))


def pinned(path: Path) -> Handle | None:
    """Return what has this name in a bpf file system. Raises ``OSError``."""
    fd = open_pin(path)
    return Handle(fd) if fd is not None else None


def pinned_map(path: Path, key_size: int, value_size: int) -> Map | None:
    """Return the map of this name. That its sizes are these is the caller's promise.

    Raises ``OSError``.
    """
    fd = open_pin(path)
    return Map(fd, key_size, value_size) if fd is not None else None


def open_pin(path: Path) -> int | None:
    name = ctypes.create_string_buffer(os.fsencode(path))
    with suppress(FileNotFoundError):
        return bpf(OBJ_GET, struct.pack("=QII", ctypes.addressof(name), 0, 0))
    return None


def mount_bpffs(at: Path) -> None:
    """Mount a bpf file system. Raises ``OSError``."""
    if LIBC.mount(b"bpf", os.fsencode(at), b"bpf", 0, None):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(at))


def named(name: str) -> bytes:
    return name.encode()[:NAME_LENGTH]


def bpf(command: int, attributes: bytes) -> int:
    """Make the system call; what ``attributes`` point to must live. Raises ``OSError``."""
    number = SYSCALLS.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"no bpf system call is known for {platform.machine()}")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))  # the kernel may write there
    result = LIBC.syscall(ctypes.c_long(number), command, buffer, len(attributes))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)


LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
