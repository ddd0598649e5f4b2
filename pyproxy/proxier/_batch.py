"""Many datagrams with one system call: recvmmsg(2) and sendmmsg(2) between connected sockets.

The bytes stay in buffers that both calls share; of each datagram only its length is copied, all
of them with one assignment.
"""

import ctypes
import os
from socket import MSG_DONTWAIT

DATAGRAMS = 32
LARGEST = 65536

WORD = 8
IOVEC_WORDS = 2  # struct iovec: address, length
HEADER_WORDS = 8  # struct mmsghdr: a struct msghdr of seven words, and the length of the datagram
IOVEC_AT, IOVEC_COUNT_AT, LENGTH_AT = 2, 3, 7

_libc = ctypes.CDLL(None, use_errno=True)
_recvmmsg, _sendmmsg = _libc.recvmmsg, _libc.sendmmsg


class Batch:
    """Room for some datagrams. Nothing stays in it from one call to the next but one."""

    def __init__(self) -> None:
        self._bytes = ctypes.create_string_buffer(DATAGRAMS * LARGEST)
        self._incoming, self._lengths, self._kept = self._headers()
        self._outgoing, _, self._sizes = self._headers()

    def receive(self, fd: int) -> int:
        """Take what waits, at least one datagram; return how many. Raises ``OSError``."""
        count: int = _recvmmsg(fd, self._incoming, DATAGRAMS, MSG_DONTWAIT, None)
        if count < 0:
            raise failure()
        return count

    def bytes_of(self, count: int) -> int:
        """Return the length of all datagrams that were received."""
        return sum(self._lengths[LENGTH_AT : HEADER_WORDS * count : HEADER_WORDS])

    def send(self, fd: int, count: int) -> None:
        """Send on what was received. Raises ``OSError``; then some are lost."""
        lengths = self._lengths[LENGTH_AT : HEADER_WORDS * count : HEADER_WORDS]
        self._sizes[1 : IOVEC_WORDS * count : IOVEC_WORDS] = lengths
        sent = 0
        while sent < count:
            at = ctypes.byref(self._outgoing, sent * HEADER_WORDS * WORD)
            more: int = _sendmmsg(fd, at, count - sent, MSG_DONTWAIT)
            if more < 0:
                raise failure()
            sent += more

    def _headers(self) -> tuple[ctypes.Array[ctypes.c_uint64], memoryview, memoryview]:
        """Return an array of ``struct mmsghdr``, its words, and those of its vectors.

        The kernel needs all of them to stay.
        """
        vectors = (ctypes.c_uint64 * (IOVEC_WORDS * DATAGRAMS))()
        headers = (ctypes.c_uint64 * (HEADER_WORDS * DATAGRAMS))()
        for index in range(DATAGRAMS):
            vector, header = IOVEC_WORDS * index, HEADER_WORDS * index
            vectors[vector] = ctypes.addressof(self._bytes) + LARGEST * index
            vectors[vector + 1] = LARGEST
            headers[header + IOVEC_AT] = ctypes.addressof(vectors) + vector * WORD
            headers[header + IOVEC_COUNT_AT] = 1
        return headers, words(headers), words(vectors)


def words(array: ctypes.Array[ctypes.c_uint64]) -> memoryview:
    return memoryview(array).cast("B").cast("Q")


def failure() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
