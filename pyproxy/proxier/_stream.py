"""A busy UDP flow: moves datagrams between two connected sockets, in batches if they are many.

A flow that has earned it has a socket of its own towards its client, bound to the frontend's
address beside the frontend's socket. The kernel prefers it for the datagrams of its client, and
nobody here has to look at an address any more.
"""

import socket
from collections.abc import Callable
from contextlib import suppress
from errno import EMSGSIZE
from socket import IPPROTO_IP, IPPROTO_IPV6, MSG_DONTWAIT, SocketType
from typing import Any

from pyproxy.proxier._batch import CANNOT, Batch
from pyproxy.proxier._poller import Poller
from pyproxy.proxier._sockets import OPTIONS, enlarge_queue

LARGEST = 65536
THICK = 4  # rounds of the poller with a datagram in each, until batches are tried
THICKEST = 8

BUFFER = memoryview(bytearray(LARGEST))  # nothing stays in it: one thread, no waiting in between


class Way:
    """One direction of a flow.

    ``refused`` is called when a socket has an error to tell.
    """

    __slots__ = (
        "_batch",
        "_count",
        "_poller",
        "_refused",
        "_round",
        "_sends_whole",
        "_sink",
        "_source",
        "_thick",
    )

    def __init__(
        self,
        poller: Poller,
        batch: Batch,
        source: SocketType,
        sink: SocketType,
        refused: Callable[[SocketType], None],
        count: Callable[[int, int], None],
    ) -> None:
        """``count`` hears how many datagrams came, and their bytes."""
        self._poller = poller
        self._batch = batch
        self._source = source
        self._sink = sink
        self._refused = refused
        self._count = count
        self._round = 0
        self._sends_whole = True  # until the kernel says that it cannot
        self._thick = 0

    def ready(self, _events: int) -> None:
        """Move one datagram, or a batch of them once they come thick."""
        is_thick = self._thick >= THICK
        try:
            count = self._receive(in_batch=is_thick)
        except BlockingIOError:
            return
        except OSError:
            self._refused(self._source)
            return
        self._measure(count if is_thick else None)
        try:
            if is_thick:
                self._send(count)
            else:
                self._sink.send(BUFFER[:count], MSG_DONTWAIT)
        except BlockingIOError:
            pass  # the queue is full: UDP loses it, as a network would
        except OSError as error:
            if error.errno != EMSGSIZE:  # that is about one datagram only
                self._refused(self._sink)

    def _receive(self, *, in_batch: bool) -> int:
        """Return how many datagrams came; without ``in_batch``, how many bytes the one has."""
        if not in_batch:
            size = self._source.recv_into(BUFFER, LARGEST, MSG_DONTWAIT)
            self._count(1, size)
            return size
        count = self._batch.receive(self._source.fileno())
        self._count(count, self._batch.bytes_of(count))
        return count

    def _send(self, count: int) -> None:
        """Send on a batch, as one packet where that can be: it costs half as much."""
        fd = self._sink.fileno()
        if self._sends_whole and count > 1 and self._batch.is_alike(count):
            try:
                self._batch.send_whole(fd, count)
            except OSError as error:
                if error.errno not in CANNOT:
                    raise
                self._sends_whole = False
            else:
                return
        self._batch.send(fd, count)

    def _measure(self, batch: int | None) -> None:
        """Find out how thick datagrams come: from round to round, then by the size of batches."""
        if batch is not None:
            self._thick = THICKEST if batch > 1 else self._thick - 1
            return
        rounds = self._poller.rounds
        self._thick = self._thick + 1 if rounds == self._round + 1 else 0
        self._round = rounds


def beside(front: socket.socket, local: tuple[str, int], peer: tuple[Any, ...]) -> SocketType:
    """Return a socket at a frontend's address, connected to one of its clients.

    Between binding and connecting it may be given datagrams of others. Raises ``OSError``.
    """
    sock = SocketType(front.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 0)
    level = IPPROTO_IPV6 if front.family == socket.AF_INET6 else IPPROTO_IP
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        for name in ("freebind", "transparent"):
            if front.getsockopt(level, OPTIONS[name, level]):
                sock.setsockopt(level, OPTIONS[name, level], 1)
        enlarge_queue(sock)
        sock.bind(local)
        sock.connect(peer)
    except OSError:
        sock.close()
        raise
    return sock


def strays(sock: SocketType) -> list[tuple[bytes, tuple[Any, ...]]]:
    """Return the datagrams that a new socket was given before it was connected, with senders."""
    found = []
    with suppress(OSError):
        while True:
            found.append(sock.recvfrom(LARGEST, MSG_DONTWAIT))
    return found
