"""Relays bytes between two connected sockets until both sides have ended.

Few bytes are read and written here. Many go through a pipe, from socket to socket inside the
kernel: a read that fills the buffer changes to that, a small one changes back. What one side
does, the other sees: an end of stream becomes an end of stream, a reset becomes a reset. A reader
that stalls stops the writer, at a cost of one buffer or one pipe for a direction.

Why a read that is not filled needs no other after it: the socket was empty then, and what comes
later is told anew. Except for the end of the stream, which may have been told already.
"""

import struct
from contextlib import suppress
from socket import (
    IPPROTO_TCP,
    MSG_DONTWAIT,
    SHUT_WR,
    SO_LINGER,
    SOL_SOCKET,
    TCP_NODELAY,
    SocketType,
)

from msgspec import Struct

from pyproxy.proxier._poller import EDGE, ENDED, ERROR, HUP, IN, OUT, Poller
from pyproxy.proxier._splice import Pipe, Pipes

SMALL = 16 * 1024  # bytes that are copied at a time
TURNS = 4  # pipes or buffers full, until others have their turn
READS = IN | ENDED | EDGE
READS_AND_WRITES = READS | OUT
PATIENCE = 2  # writes to a side, until it is told to wait with none
SOMETHING = IN | ENDED | HUP | ERROR
LAST = ENDED | HUP | ERROR
LINGER_RESET = struct.pack("=ii", 1, 0)

BUFFER = memoryview(bytearray(SMALL))  # nothing stays in it: one thread, no waiting in between
SHORT = [BUFFER[:count] for count in range(513)]  # made once: that takes as long as half a call


class Held(Struct, frozen=True):
    """What a process knows of one side of a connection, beyond the socket."""

    ended: bool
    left: bytes  # read from this side, and not taken by the other yet


class Connection:
    """Two sides that are joined, and what becomes of the connection as a whole."""

    __slots__ = ("broken", "far", "near", "pipes", "poller")

    def __init__(
        self, poller: Poller, pipes: Pipes, client: SocketType, backend: SocketType
    ) -> None:
        self.poller = poller
        self.pipes = pipes
        self.broken = False  # a side does not take what the other has said
        self.near = near = Side(self, client)
        self.far = far = Side(self, backend)
        near.other, far.other = far, near

    def close(self) -> None:
        """End both sides in order, or with a reset where something was lost."""
        if self.broken:
            self.abort()
        else:
            self._over()

    def abort(self) -> None:
        """End both sides at once, so that they see a reset."""
        for side in (self.near, self.far):
            with suppress(OSError):
                side.sock.setsockopt(SOL_SOCKET, SO_LINGER, LINGER_RESET)
        self._over()

    def release(self) -> tuple[Held, Held]:
        """Relay no more, and leave both sockets open; return what was held of each side."""
        held = self.near.release(), self.far.release()
        del self.near.other, self.far.other, self.near.connection, self.far.connection
        self.closed()
        return held

    def resume(self, near: Held, far: Held) -> None:
        """Relay from where somebody else has released both sockets."""
        self.near.ended, self.near.left = near.ended, near.left or None
        self.far.ended, self.far.left = far.ended, far.left or None
        for side in (self.near, self.far):
            side.watches_writing = side.other.left is not None
            events = READS_AND_WRITES if side.watches_writing else READS
            self.poller.add(side.fd, events, side)

    def closed(self) -> None:
        """Take note that both sockets are no longer ours."""

    def _over(self) -> None:
        for side in (self.near, self.far):
            side.is_over = side.ended = True
            self.poller.close_socket(side.sock)
            if side.pipe is not None:
                self.pipes.give_back(side.pipe)
            del side.other, side.connection  # no cycles for the garbage collector
        self.closed()


class Side:
    """One side of a connection, and what is on its way from it to the other."""

    __slots__ = (
        "carried",
        "connection",
        "ended",
        "fd",
        "has_last",
        "is_over",
        "left",
        "other",
        "patience",
        "pipe",
        "sock",
        "watches_writing",
    )

    other: "Side"
    connection: Connection

    def __init__(self, connection: Connection, sock: SocketType) -> None:
        self.connection = connection
        self.sock = sock
        self.fd = sock.fileno()
        self.carried = 0  # bytes that this side has said
        self.is_over = False  # the connection is closed
        self.ended = False  # nothing more will be read from this side
        self.has_last = False  # its end has been told, and may have to be read yet
        self.left: bytes | None = None  # was read from this side, and the other has not taken it
        self.pipe: Pipe | None = None
        self.patience = PATIENCE
        self.watches_writing = False

    def release(self) -> Held:
        """Read nothing more, and return what was read from this side."""
        left = self.left or b""
        if self.pipe is not None:
            left = self.pipe.drained()
            self.connection.pipes.give_back(self.pipe)
            self.pipe = None
        held = Held(self.ended, left)
        self.connection.poller.discard(self.fd)
        self.is_over = self.ended = True
        return held

    def ready(self, events: int) -> None:
        """Take note of events of this side's socket."""
        if events == IN and self.pipe is None and self.left is None and not self.ended:
            self._copy()
            return
        if events & OUT and self.other.is_held_up():
            self.other.pump()
            if self.is_over:
                return
        if events & LAST:
            self.has_last = True
            if events & ERROR and (self.ended or self.is_held_up()):
                self.connection.abort()
                return
        if events & SOMETHING and not self.ended:
            self.pump()

    def is_held_up(self) -> bool:
        """Say whether the other side must take something, before more is read from this one."""
        return self.left is not None or (self.pipe is not None and self.pipe.held > 0)

    def pump(self) -> None:
        """Pass on what this side has said, until there is no more or the other takes no more."""
        if self.pipe is not None:
            self._splice(self.pipe)
        elif self.left is None or self._flush(self.left):
            self._copy()

    def _copy(self) -> None:
        """Read and write. Nothing more is called for a small message, which most are."""
        other = self.other
        turns = TURNS
        while turns:
            count = -1
            try:
                count = self.sock.recv_into(BUFFER, SMALL, MSG_DONTWAIT)
                if not count:
                    self._end()
                    return
                self.carried += count
                data = SHORT[count] if count < len(SHORT) else BUFFER[:count]
                taken = other.sock.send(data, MSG_DONTWAIT)
            except OSError as error:
                self._stopped(error, count)
                return
            if taken != count:
                self._keep(BUFFER[taken:count])
                return
            if other.patience:
                other.lose_patience()
            if count < SMALL and not self.has_last:
                return
            if count == SMALL and self._goes_through_pipe():
                return
            turns -= 1
        self._soon()

    def _stopped(self, error: OSError, count: int) -> None:
        """See why nothing can be read, or else why so many bytes that were read are not taken."""
        if isinstance(error, BlockingIOError):
            if count > 0:
                self._keep(BUFFER[:count])
        elif count > 0:
            self._refused()
        else:
            self.connection.abort()

    def _flush(self, left: bytes) -> bool:
        """Give the other side what is left; say if it took all."""
        try:
            taken = self.other.sock.send(left, MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            self._refused()
            return False
        self.left = left[taken:] or None
        return self.left is None

    def _keep(self, data: memoryview) -> None:
        """Keep what the other side does not take now."""
        self.left = bytes(data)
        self.other.watch_writing()

    def _goes_through_pipe(self) -> bool:
        """Go on through a pipe; False if there is none to be had."""
        self.pipe = self.connection.pipes.take()
        if self.pipe is None:
            return False
        for side in (self, self.other):  # SPLICE_F_NONBLOCK is about the pipe alone
            side.sock.setblocking(False)
        self.other.patience = 1
        self.other.lose_patience()
        self._splice(self.pipe)
        return True

    def _splice(self, pipe: Pipe) -> None:
        moved = 0
        for _ in range(TURNS):
            try:
                pipe.empty(self.other.fd)
            except BlockingIOError:
                self.other.watch_writing()
                return
            except OSError:
                self._refused()
                return
            try:
                count = pipe.fill(self.fd)
            except BlockingIOError:
                if moved < SMALL:
                    self.connection.pipes.give_back(pipe)
                    self.pipe = None
                return
            except OSError:
                self.connection.abort()
                return
            if not count:
                self._end()
                return
            moved += count
            self.carried += count
        self._soon()

    def _soon(self) -> None:
        """Go on when others have had their turn."""
        self.connection.poller.again(self._resume)

    def _resume(self) -> None:
        if not self.ended:
            self.pump()

    def _end(self) -> None:
        """Pass the end on; the other side may still have something to say."""
        self.ended = True
        if self.other.ended:
            self.connection.close()
            return
        try:
            self.other.sock.shutdown(SHUT_WR)
        except OSError:
            self.connection.abort()

    def _refused(self) -> None:
        """The other side takes nothing more. What it has said before is still passed on."""
        self.connection.broken = True
        self.ended = True
        self.left = None
        if self.pipe is not None:
            self.connection.pipes.give_back(self.pipe)
            self.pipe = None
        if self.other.ended:
            self.connection.abort()

    def lose_patience(self) -> None:
        """Have small writes to this side go out at once, from the second on.

        The first waits for nothing in any case, and many connections have no other.
        """
        self.patience -= 1
        if not self.patience:
            with suppress(OSError):
                self.sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)

    def watch_writing(self) -> None:
        """Tell when this side can be written to again."""
        if not self.watches_writing:
            self.watches_writing = True
            self.connection.poller.change(self.fd, READS_AND_WRITES)
