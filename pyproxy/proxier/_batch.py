"""Many datagrams with one system call: recvmmsg(2) and sendmmsg(2) between connected sockets.

The bytes stay in buffers that both calls share; of each datagram only its length is copied, all
of them with one assignment. Those of one size go out as one, and the kernel takes them apart where
they leave, or where they arrive (UDP_SEGMENT, udp(7)).
"""

import ctypes
import errno
import os
import struct
from socket import IPPROTO_UDP, MSG_DONTWAIT

DATAGRAMS = 32
LARGEST = 65536

WORD = 8
IOVEC_WORDS = 2  # struct iovec: address, length
HEADER_WORDS = 8  # struct mmsghdr: a struct msghdr of seven words, and the length of the datagram
IOVEC_AT, IOVEC_COUNT_AT, LENGTH_AT = 2, 3, 7
UDP_SEGMENT = 103
CONTROL = struct.Struct("@NiiH6x")  # struct cmsghdr: length, level, type; the value, and padding
CONTROL_LENGTH = 18  # without the padding
SIZE_AT = 8  # where the value is, in units of its size
WHOLE = 65_000  # bytes that fit into one packet in any case
# Kernels before 4.18, datagrams that would leave in fragments, devices that leave checksums to us.
CANNOT = frozenset({errno.EINVAL, errno.EIO, errno.EMSGSIZE})

_libc = ctypes.CDLL(None, use_errno=True)
_recvmmsg, _sendmmsg, _sendmsg = _libc.recvmmsg, _libc.sendmmsg, _libc.sendmsg


class Batch:
    """Room for some datagrams. Nothing stays in it from one call to the next but one."""

    def __init__(self) -> None:
        self._bytes = ctypes.create_string_buffer(DATAGRAMS * LARGEST)
        self._incoming, self._lengths, self._kept = self._headers()
        self._outgoing, first, self._sizes = self._headers()
        control = ctypes.create_string_buffer(CONTROL.size)
        CONTROL.pack_into(control, 0, CONTROL_LENGTH, IPPROTO_UDP, UDP_SEGMENT, 0)
        self._size = memoryview(control).cast("B").cast("H")
        self._whole = (ctypes.c_uint64 * LENGTH_AT)(
            0, 0, first[IOVEC_AT], 0, ctypes.addressof(control), CONTROL.size, 0
        )

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
        self._take_sizes(count)
        sent = 0
        while sent < count:
            at = ctypes.byref(self._outgoing, sent * HEADER_WORDS * WORD)
            more: int = _sendmmsg(fd, at, count - sent, MSG_DONTWAIT)
            if more < 0:
                raise failure()
            sent += more

    def is_alike(self, count: int) -> bool:
        """Say whether all that was received has one size but for the last, which may be smaller."""
        lengths = self._lengths[LENGTH_AT : HEADER_WORDS * count : HEADER_WORDS].tolist()
        size, last = lengths[0], lengths[-1]
        alike = lengths.count(size) == count - (last != size)
        return alike and 0 < last <= size and size * count <= WHOLE

    def send_whole(self, fd: int, count: int) -> None:
        """Send on what was received, and is alike, as one packet that the kernel takes apart.

        Raises ``OSError``; then all are lost, or with one of ``CANNOT`` none is sent.
        """
        self._take_sizes(count)
        self._whole[IOVEC_COUNT_AT] = count
        self._size[SIZE_AT] = self._sizes[1]
        if _sendmsg(fd, self._whole, MSG_DONTWAIT) < 0:
            raise failure()

    def _take_sizes(self, count: int) -> None:
        lengths = self._lengths[LENGTH_AT : HEADER_WORDS * count : HEADER_WORDS]
        self._sizes[1 : IOVEC_WORDS * count : IOVEC_WORDS] = lengths

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
