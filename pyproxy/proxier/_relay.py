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
from collections.abc import Iterable
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
from typing import cast

from msgspec import Struct

from pyproxy.proxier._poller import EDGE, ENDED, ERROR, HUP, IN, OUT, Poller
from pyproxy.proxier._splice import Pipe, Pipes

SMALL = 16 * 1024  # bytes that are copied at a time
FEW = 448  # bytes that most messages are below; Python has memory for them at hand, up to 479
TURNS = 4  # pipes or reads full, until others have their turn
READS = IN | ENDED | EDGE
READS_AND_WRITES = READS | OUT
SOMETHING = IN | ENDED | HUP | ERROR
LAST = ENDED | HUP | ERROR
RARE = OUT | ERROR  # what a side does not do that goes in order
LINGER_RESET = struct.pack("=ii", 1, 0)


class Held(Struct, frozen=True):
    """What a process knows of one side of a connection, beyond the socket."""

    ended: bool
    left: bytes  # read from this side, and not taken by the other yet


NOBODY = cast("Side", None)  # the other side of one whose connection is over, or has not begun


class Connection(Struct, eq=False):
    """Two sides that are joined, and what becomes of the connection as a whole."""

    poller: Poller
    pipes: Pipes
    near: "Side"
    far: "Side"

    def is_broken(self) -> bool:
        """Say whether something that one side has said is lost."""
        return self.near.is_lost or self.far.is_lost

    def close(self) -> None:
        """End both sides in order, or with a reset where something was lost."""
        if self.is_broken():
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
        self._part()
        return held

    def resume(self, near: Held, far: Held) -> None:
        """Relay from where somebody else has released both sockets."""
        self.near.ended, self.near.held = near.ended, near.left or None
        self.far.ended, self.far.held = far.ended, far.left or None
        for side in (self.near, self.far):
            side.watches_writing = side.other.held is not None
            events = READS_AND_WRITES if side.watches_writing else READS
            self.poller.add(side.fd, events, side)

    def lasts(self, side: "Side") -> None:
        """Take note that more than one thing is written to a side."""

    def closed(self) -> None:
        """Take note that both sockets are no longer ours."""

    def _over(self) -> None:
        near, far = self.near, self.far
        if near.held is not None:
            near.drop()
        if far.held is not None:
            far.drop()
        self.poller.close_sockets(near.sock, far.sock)
        self._part()

    def _part(self) -> None:
        self.closed()
        self.near.other = self.far.other = NOBODY
        del self.near, self.far  # no cycles for the garbage collector


class Side(Struct, eq=False):
    """One side of a connection, and what is on its way from it to the other."""

    sock: SocketType
    fd: int
    other: "Side" = NOBODY
    at_once: int = FEW  # bytes that are read first
    carried: int = 0  # bytes that this side has said
    held: bytes | Pipe | None = None  # read from this side, and not taken by the other yet
    ended: bool = False  # nothing more will be read from this side
    has_last: bool = False  # its end has been told, and may have to be read yet
    is_lost: bool = False  # the other side does not take what this one has said; counts for both
    is_slow: bool = True  # it was not written to twice; the kernel may keep small writes back
    watches_writing: bool = False
    connection: Connection = cast("Connection", None)

    def release(self) -> Held:
        """Read nothing more, and return what was read from this side."""
        left = self.held or b""
        if isinstance(left, Pipe):
            pipe, left = left, left.drained()
            self.connection.pipes.give_back(pipe)
        self.held = None
        self.connection.poller.discard(self.fd)
        return Held(self.ended, left)

    def drop(self) -> None:
        """Forget what was read from this side."""
        if isinstance(self.held, Pipe):
            self.connection.pipes.give_back(self.held)
        self.held = None

    def ready(self, events: int) -> bytes | None:
        """Take note of events of this side's socket. A short message is but read: see Poller."""
        if events & RARE and not self._goes_on(events):
            return None
        if self.held is not None or self.ended:
            self.has_last |= events & LAST != 0
            self.pump()
            return None
        try:
            data = self.sock.recv(self.at_once, MSG_DONTWAIT)
            count = len(data)
            if count >= FEW:
                data = self._whole(data)
                count = len(data)
        except OSError as error:
            self._stopped(error)
            return None
        if not count:
            self._end()
            return None
        if events & LAST:
            self.has_last = True
        self.carried += count
        return data

    def catch_up(self, events: int) -> None:
        """Act on events that were told to another watcher, or to none."""
        data = self.ready(events)
        if data is not None and self.write_all(((self, data),)):
            self.pump()

    def abort(self) -> None:
        """End the connection at once, if that is not over."""
        if self.other is not NOBODY:
            self.connection.abort()

    def _goes_on(self, events: int) -> bool:
        """Take note of rare events; say whether there is something to read, too."""
        if events & OUT and self.other.is_held_up():
            self.other.pump()
            if self.other is NOBODY:
                return False
        if events & ERROR and (self.ended or self.is_held_up()):
            self.connection.abort()
            return False
        return events & SOMETHING != 0

    def is_held_up(self) -> bool:
        """Say whether the other side must take something, before more is read from this one."""
        return self.held is not None and (not isinstance(self.held, Pipe) or self.held.held > 0)

    def pump(self) -> None:
        """Pass on what this side has said, until there is no more or the other takes no more."""
        held = self.held
        if self.ended or self.other is NOBODY:
            return
        if isinstance(held, Pipe):
            self._splice(held)
            return
        if held is not None:
            self.held = None
            self.write_all(((self, held),))
        if self.held is None and not self.ended:
            self._copy()

    @staticmethod
    def write_all(said: "Iterable[tuple[Side, bytes]]") -> "list[Side]":
        """Give the others what each of these has said; return those that may have more to say."""
        more = []
        for side, data in said:
            other = side.other
            if other is NOBODY:
                continue
            try:
                taken = other.sock.send(data, MSG_DONTWAIT)
            except BlockingIOError:
                taken = 0
            except OSError:
                side._refused()
                continue
            if taken != len(data):
                side.held = data[taken:]
                other.watch_writing()
                continue
            if other.is_slow and side.carried != taken:
                other.write_at_once()
            if taken >= SMALL or side.has_last:
                more.append(side)
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
            if not self.write_all(((self, data),)):
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
        self.held = pipe = self.connection.pipes.take()
        if pipe is None:
            return False
        for side in (self, self.other):  # SPLICE_F_NONBLOCK is about the pipe alone
            side.sock.setblocking(False)
        if self.other.is_slow:
            self.other.write_at_once()
        self._splice(pipe)
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
                    self.drop()
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
        self.is_lost = self.ended = True
        self.drop()
        if self.other.ended:
            self.connection.abort()

    def write_at_once(self) -> None:
        """Have small writes to this side go out at once.

        The first waits for nothing in any case, and many connections have no other.
        """
        self.is_slow = False
        with suppress(OSError):
            self.sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        self.connection.lasts(self)

    def watch_writing(self) -> None:
        """Tell when this side can be written to again."""
        if not self.watches_writing:
            self.watches_writing = True
            self.connection.poller.change(self.fd, READS_AND_WRITES)
