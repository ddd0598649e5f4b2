"""Relays bytes between two connected sockets until both sides have ended.

Few bytes are read and written here. Many go through a pipe, from socket to socket inside the
kernel: a read of all that is taken at once changes to that, a small one changes back. What one
side does, the other sees: an end of stream becomes an end of stream, a reset becomes a reset. A
reader that stalls stops the writer, at a cost of one read or one pipe for a direction.

What many sides say in one round of the poller is read first and written then: the processor has
the kernel's reading at hand as long as it reads, and its writing as long as it writes.

Why a read that gets less than it may needs no other after it: the socket was empty then, and what
comes later is told anew. Except for the end of the stream, which may have been told already.
"""

import struct
from collections.abc import Sequence
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
FEW = 448  # bytes that most messages are below; Python has memory for them at hand, up to 479
TURNS = 4  # pipes or reads full, until others have their turn
READS = IN | ENDED | EDGE
READS_AND_WRITES = READS | OUT
PATIENCE = 2  # writes to a side, until it is told to wait with none
SOMETHING = IN | ENDED | HUP | ERROR
LAST = ENDED | HUP | ERROR
GOING = IN | ENDED | HUP  # what a side does that goes in order
LINGER_RESET = struct.pack("=ii", 1, 0)


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
        near, far = self.near, self.far
        for side in (near, far):
            side.is_over = side.ended = True
            side.left = None
            if side.pipe is not None:
                self.pipes.give_back(side.pipe)
            del side.other, side.connection  # no cycles for the garbage collector
        self.poller.close_sockets(near.sock, far.sock)
        self.closed()


class Side:
    """One side of a connection, and what is on its way from it to the other."""

    __slots__ = (
        "at_once",
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
        self.at_once = FEW  # bytes that are read first
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
        self.left = None
        held = Held(self.ended, left)
        self.connection.poller.discard(self.fd)
        self.is_over = self.ended = True
        return held

    def ready(self, events: int) -> "Side | None":
        """Take note of events of this side's socket. A short message is but read: see Poller."""
        if events & ~GOING:
            if not self._goes_on(events):
                return None
        elif events != IN:
            self.has_last = True
        if self.pipe is not None or self.left is not None or self.ended:
            self.pump()
            return None
        try:
            data = self.sock.recv(self.at_once, MSG_DONTWAIT)
            if len(data) >= FEW:
                data = self._whole(data)
        except OSError as error:
            self._stopped(error)
            return None
        if data:
            self.carried += len(data)
            self.left = data
            return self
        self._end()
        return None

    def catch_up(self, events: int) -> None:
        """Take note of what somebody else was told, or nobody."""
        if self.ready(events) is not None and self.write_all((self,)):
            self.pump()

    def _goes_on(self, events: int) -> bool:
        """Take note of rare events; say whether there is something to read, too."""
        if events & OUT and self.other.is_held_up():
            self.other.pump()
            if self.is_over:
                return False
        if events & LAST:
            self.has_last = True
            if events & ERROR and (self.ended or self.is_held_up()):
                self.connection.abort()
                return False
        return events & SOMETHING != 0

    def is_held_up(self) -> bool:
        """Say whether the other side must take something, before more is read from this one."""
        return self.left is not None or (self.pipe is not None and self.pipe.held > 0)

    def pump(self) -> None:
        """Pass on what this side has said, until there is no more or the other takes no more."""
        if self.ended:
            return
        if self.pipe is not None:
            self._splice(self.pipe)
            return
        if self.left is not None:
            self.write_all((self,))
        if self.left is None and not self.ended:
            self._copy()

    @staticmethod
    def write_all(sides: "Sequence[Side]") -> "list[Side]":
        """Give the others what these have said; return those that may have more to say."""
        more = []
        for side in sides:
            left = side.left
            if left is None:  # it is written, or the connection is over
                continue
            other = side.other
            try:
                taken = other.sock.send(left, MSG_DONTWAIT)
                if taken != len(left):
                    side.left = left[taken:]
                    other.watch_writing()
                    continue
                side.left = None
                if other.patience:
                    other.lose_patience()
                if taken >= SMALL or side.has_last:
                    more.append(side)
            except BlockingIOError:
                other.watch_writing()
            except OSError:
                side._refused()
        return more

    def _copy(self) -> None:
        """Read and write until there is nothing more, or enough for a pipe."""
        for _ in range(TURNS):
            try:
                data = self.sock.recv(SMALL, MSG_DONTWAIT)
            except OSError as error:
                self._stopped(error)
                return
            if not data:
                self._end()
                return
            self.carried += len(data)
            self.left = data
            if not self.write_all((self,)):
                return
            if len(data) == SMALL and self._goes_through_pipe():
                return
        self._soon()

    def _whole(self, data: bytes) -> bytes:
        """Read on after a first read that was filled. Raises ``OSError``."""
        if self.at_once == FEW:
            self.at_once = SMALL  # where a long message came, more may follow
            with suppress(BlockingIOError):
                data += self.sock.recv(SMALL - FEW, MSG_DONTWAIT)
        return data

    def _stopped(self, error: OSError) -> None:
        """See why nothing can be read."""
        if not isinstance(error, BlockingIOError):
            self.connection.abort()

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
        self.connection.poller.again(self.pump)

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
