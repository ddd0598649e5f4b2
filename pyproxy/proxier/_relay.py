"""Relays bytes between two connected sockets until both sides have ended.

Two protocols of asyncio, each writing into the other's transport. What one side does, the other
side sees: an end of stream becomes an end of stream, a reset becomes a reset, and a reader that
stalls stops the writer, at a cost of ``WRITE_LIMIT`` bytes of this process for a direction.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import cast

from pyproxy.proxier._sockets import keep_alive

WRITE_LIMIT = 256 * 1024
LINGER_RESET = struct.pack("=ii", 1, 0)
TCP_CLOSE = 7  # the state of a connection that was reset or timed out, of linux/tcp.h


class Half(asyncio.Protocol):
    """One side of a relay: reads from its own transport, writes to the other's.

    The two are connected to their transports one after the other, and much may happen between:
    bytes that come wait in ``_early`` (uvloop ignores ``pause_reading`` while a connection is
    being made), an end and a loss are remembered.
    """

    __slots__ = ("_early", "_on_close", "ended", "lost", "other", "transport", "watched")

    other: "Half"

    def __init__(self, on_close: Callable[[], None] | None = None) -> None:
        self.transport: asyncio.Transport | None = None
        self.ended = False  # nothing more will come from this side
        self.lost = False
        self.watched = False
        self._early: list[bytes] = []
        self._on_close = on_close

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        writer = cast(asyncio.Transport, transport)  # uvloop's only looks like one
        writer.set_write_buffer_limits(high=WRITE_LIMIT)
        self.transport = writer
        if self.other.lost:
            abort(writer)
            return
        for data in self.other.early():
            writer.write(data)
        if self.other.ended:
            end(writer)

    def early(self) -> list[bytes]:
        data, self._early = self._early, []
        return data

    def data_received(self, data: bytes) -> None:
        writer = self.other.transport
        if writer is None:
            self._early.append(data)
        else:
            writer.write(data)

    def eof_received(self) -> bool:
        """Pass the end on; keep our transport open for what the other side still says."""
        self.ended = True
        writer = self.other.transport
        if writer is None:
            return True
        if self.other.ended:
            writer.close()
            return False
        end(writer)
        return True

    def pause_writing(self) -> None:
        reader = self.other.transport
        if reader is not None and not reader.is_closing():
            reader.pause_reading()

    def resume_writing(self) -> None:
        reader = self.other.transport
        if reader is not None and not reader.is_closing():
            reader.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        on_close, self._on_close = self._on_close, None
        peer = self.other.transport
        if peer is not None and not peer.is_closing():
            if error is None:
                peer.close()
            else:
                abort(peer)
        if on_close is not None:
            on_close()

    def abort(self) -> None:
        """End both sides at once."""
        for half in (self, self.other):
            if half.transport is not None:
                abort(half.transport)

    def is_dead(self) -> bool:
        """Say whether one of the two sides was lost after it had ended.

        The event loop does not look at a side any more that has ended.
        """
        return any(half.ended and half.is_reset() for half in (self, self.other))

    def watch(self) -> None:
        """Have the kernel find out when the other side's peer is gone without a word."""
        self.watched = True
        if self.other.transport is not None and not self.other.transport.is_closing():
            keep_alive(self.other.transport.get_extra_info("socket"))

    def is_reset(self) -> bool:
        if self.transport is None or self.transport.is_closing():
            return False
        sock = self.transport.get_extra_info("socket")
        try:
            state: bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        except OSError:
            return False
        return state[0] == TCP_CLOSE


def end(writer: asyncio.Transport) -> None:
    if not writer.is_closing():
        with suppress(OSError, RuntimeError):  # it was reset at this moment
            writer.write_eof()


def abort(transport: asyncio.Transport) -> None:
    """Close at once, so that the other side sees a reset."""
    sock = transport.get_extra_info("socket")
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    transport.abort()


async def join(
    loop: asyncio.AbstractEventLoop, near: Half, client: socket.socket, backend: socket.socket
) -> None:
    """Relay between two connected sockets, ``near`` being the client's side.

    The sockets belong to the relay from the call on. Raises ``OSError``, after closing both.
    """
    far = Half()
    near.other, far.other = far, near
    try:
        await loop.connect_accepted_socket(lambda: far, backend)
        await loop.connect_accepted_socket(lambda: near, client)
    except BaseException:
        near.abort()
        for half, sock in ((near, client), (far, backend)):
            if half.transport is None:
                sock.close()
                half.connection_lost(None)
        raise
