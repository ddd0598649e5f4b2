"""What the process that plans and its workers say to each other, and how: over a Unix socket.

Both are of one version, and each trusts the other. What one says arrives in order. The worker
answers each question, also in order; what it has seen it tells by itself.
"""

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence

import msgspec
from msgspec import Struct

from pyproxy.config import Logging
from pyproxy.counters import Counts
from pyproxy.model import Address, Frontend, Proto
from pyproxy.proxier._dataplane import Manner
from pyproxy.proxier._given import Parcel, content_of, file_with
from pyproxy.rules.listener_bytes import PackedOwner, PackedSurroundings

LARGEST = 1 << 16  # bytes of a message; a longer one is in a file
DESCRIPTORS = 253  # that the kernel passes at a time
AT_ONCE = 16  # messages, until others have their turn
PLAIN, IN_FILE = b"m", b"f"  # before a message, and instead of one


class Begin(Struct, frozen=True, tag=True, array_like=True):
    """Become a worker. Descriptors: the lock, and the pairs of shared sockets."""

    version: str
    number: int  # of the worker, from one
    pairs: int
    place: str  # where successors look for the process that plans
    manner: Manner
    logging: Logging
    collector: tuple[int, int, int]  # thresholds of the garbage collector


class Look(Struct, frozen=True, tag=True, array_like=True):
    """Addresses are those by now."""

    around: PackedSurroundings


class Update(Struct, frozen=True, tag=True, array_like=True):
    """These owners have these frontends from now on, and no others."""

    owners: tuple[PackedOwner, ...]


class Admit(Struct, frozen=True, tag=True, array_like=True):
    """Let clients in. Descriptors: what must be kept for packets to come as they do."""


class Connections(Struct, frozen=True, tag=True, array_like=True):
    """Go on with connections of another process; as in a message of ``_given``."""

    described: bytes


class Flows(Struct, frozen=True, tag=True, array_like=True):
    """Likewise with flows."""

    described: bytes


class Count(Struct, frozen=True, tag=True, array_like=True):
    """Say what was carried."""


class Leave(Struct, frozen=True, tag=True, array_like=True):
    """The process that plans ends, as it was told to: serve on for so many seconds."""

    seconds: float


class Locate(Struct, frozen=True, tag=True, array_like=True):
    """Say which addresses of this node open connections are at."""


class Stop(Struct, frozen=True, tag=True, array_like=True):
    """End."""


class Done(Struct, frozen=True, tag=True, array_like=True):
    """It is done."""


class Counted(Struct, frozen=True, tag=True, array_like=True):
    """What was carried, as far as it is not nothing."""

    entries: tuple[tuple[Frontend, Address | None, Counts], ...]


class Located(Struct, frozen=True, tag=True, array_like=True):
    """Addresses that clients of open connections talk to."""

    ips: frozenset[str]


class Observed(Struct, frozen=True, tag=True, array_like=True):
    """Results of connections, since this was said last."""

    results: tuple[tuple[Proto, str, int], ...]


Order = Begin | Look | Update | Admit | Connections | Flows | Count | Locate | Leave | Stop
Answer = Done | Counted | Located
Report = Answer | Observed

ORDERS: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
REPORTS: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


class Channel:
    """One end. ``heard`` is told what comes, and ``ended`` once that nothing more will."""

    def __init__(
        self,
        sock: socket.socket,
        heard: Callable[[bytes, list[int]], None],
        ended: Callable[[], None],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._heard = heard
        self._ended = ended
        self._waiting: deque[Parcel] = deque()  # until the other end has read what came before
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._read)

    @property
    def is_open(self) -> bool:
        return self._sock.fileno() >= 0

    def send(self, message: Struct, fds: Sequence[int] = ()) -> None:
        """Send a message, with copies of descriptors. To an end that is gone nothing is said."""
        body = msgspec.msgpack.encode(message)
        if not self.is_open:
            return
        if len(body) < LARGEST:
            self._send(PLAIN + body, fds)
        else:
            with file_with(body) as file:
                self._send(IN_FILE, (file.fileno(), *fds))

    def close(self) -> None:
        if not self.is_open:
            return
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _data, fds in self._waiting:
            close_all(fds)
        self._waiting.clear()

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        if not self._waiting and self._sent(data, fds):
            return
        self._waiting.append((data, [os.dup(fd) for fd in fds]))
        self._loop.add_writer(self._sock.fileno(), self._write)

    def _sent(self, data: bytes, fds: Sequence[int]) -> bool:
        try:
            socket.send_fds(self._sock, [data], fds)
        except BlockingIOError:
            return False
        except OSError:
            pass  # the other end is gone, which reading will tell
        return True

    def _write(self) -> None:
        while self._waiting and self._sent(*self._waiting[0]):
            close_all(self._waiting.popleft()[1])
        if not self._waiting:
            self._loop.remove_writer(self._sock.fileno())

    def _read(self) -> None:
        for _ in range(AT_ONCE):
            try:
                data, fds, _flags, _peer = socket.recv_fds(self._sock, LARGEST, DESCRIPTORS)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if not data:
                self.close()
                self._ended()
                return
            body = content_of(fds.pop(0)) if data == IN_FILE else data[1:]
            self._heard(body, fds)
            if not self.is_open:
                return


def receive_first(sock: socket.socket) -> tuple[Order, list[int]]:
    """Wait for the first order, before there is an event loop. Raises ``OSError``."""
    data, fds, _flags, _peer = socket.recv_fds(sock, LARGEST, DESCRIPTORS)
    return ORDERS.decode(data[1:]), fds


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
