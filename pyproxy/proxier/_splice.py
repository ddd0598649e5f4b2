"""Pipes through which the kernel moves bytes from socket to socket, without a copy here."""

import os
from contextlib import suppress
from fcntl import F_SETPIPE_SZ, fcntl

PIPE_BYTES = 1 << 20
SPARE = 32  # pipes kept for the next who needs one
FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Pipe:
    """A pipe, and how many bytes are in it."""

    __slots__ = ("held", "reads", "writes")

    def __init__(self) -> None:
        self.reads, self.writes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.held = 0
        with suppress(OSError):  # above what an unprivileged user may have in all
            fcntl(self.writes, F_SETPIPE_SZ, PIPE_BYTES)

    def fill(self, fd: int) -> int:
        """Take what the socket has; 0 at its end. Raises ``BlockingIOError``, ``OSError``."""
        self.held = os.splice(fd, self.writes, PIPE_BYTES, flags=FLAGS)
        return self.held

    def empty(self, fd: int) -> None:
        """Pass all on to the socket. Raises ``BlockingIOError``, ``OSError``."""
        while self.held:
            self.held -= os.splice(self.reads, fd, self.held, flags=FLAGS)

    def drained(self) -> bytes:
        """Return all that is in it, which is empty then."""
        parts = []
        while self.held:
            parts.append(os.read(self.reads, self.held))
            self.held -= len(parts[-1])
        return b"".join(parts)

    def close(self) -> None:
        os.close(self.reads)
        os.close(self.writes)


class Pipes:
    """Lends pipes; at most so many at a time, as each costs two file descriptors."""

    def __init__(self, most: int) -> None:
        self._left = most
        self._spare: list[Pipe] = []

    def take(self) -> Pipe | None:
        """Return an empty pipe; None if there is none to be had."""
        if self._spare:
            return self._spare.pop()
        if not self._left:
            return None
        try:
            pipe = Pipe()
        except OSError:
            return None
        self._left -= 1
        return pipe

    def give_back(self, pipe: Pipe) -> None:
        if pipe.held or len(self._spare) >= SPARE:
            pipe.close()
            self._left += 1
        else:
            self._spare.append(pipe)

    def close(self) -> None:
        """Close those that nobody uses."""
        self._left += len(self._spare)
        while self._spare:
            self._spare.pop().close()
