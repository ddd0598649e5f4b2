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

WRITE_LIMIT = 256 * 1024
LINGER_RESET = struct.pack("=ii", 1, 0)
KEEPALIVE = ((socket.TCP_KEEPIDLE, 300), (socket.TCP_KEEPINTVL, 30), (socket.TCP_KEEPCNT, 5))


class Half(asyncio.Protocol):
    """One side of a relay: reads from its own transport, writes to the other's.

    Bytes may come before the other side is connected to its transport: uvloop ignores
    ``pause_reading`` while a connection is being made. They wait in ``_early``.
    """

    __slots__ = ("_early", "_ended", "_on_close", "other", "transport")

    other: "Half"

    def __init__(self, on_close: Callable[[], None] | None = None) -> None:
        self.transport: asyncio.Transport | None = None
        self._early: list[bytes] = []
        self._ended = False
        self._on_close = on_close

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        writer = cast(asyncio.Transport, transport)  # uvloop's only looks like one
        writer.set_write_buffer_limits(high=WRITE_LIMIT)
        self.transport = writer
        for data in self.other.early():
            writer.write(data)
        if self.other.has_ended():
            writer.write_eof()

    def early(self) -> list[bytes]:
        data, self._early = self._early, []
        return data

    def has_ended(self) -> bool:
        return self._ended

    def data_received(self, data: bytes) -> None:
        writer = self.other.transport
        if writer is None:
            self._early.append(data)
        else:
            writer.write(data)

    def eof_received(self) -> bool:
        """Pass the end on; keep our transport open for what the other side still says."""
        self._ended = True
        writer = self.other.transport
        if writer is None or not self.other.has_ended():
            if writer is not None and not writer.is_closing():
                with suppress(OSError, RuntimeError):  # it was reset at this moment
                    writer.write_eof()
            return True
        writer.close()
        return False

    def pause_writing(self) -> None:
        reader = self.other.transport
        if reader is not None and not reader.is_closing():
            reader.pause_reading()

    def resume_writing(self) -> None:
        reader = self.other.transport
        if reader is not None and not reader.is_closing():
            reader.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        on_close, self._on_close = self._on_close, None
        peer = self.other.transport
        if peer is not None and not peer.is_closing():
            if error is None:
                peer.close()
            else:
                abort(peer)
        if on_close is not None:
            on_close()


def abort(transport: asyncio.Transport) -> None:
    """Close at once, so that the other side sees a reset."""
    sock = transport.get_extra_info("socket")
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    transport.abort()


async def join(
    loop: asyncio.AbstractEventLoop,
    client: socket.socket,
    backend: socket.socket,
    on_close: Callable[[], None],
) -> asyncio.Transport:
    """Relay between two connected sockets; return the client's transport.

    ``on_close`` is called once, when the client's side has ended. The sockets belong to the relay
    from the call on. Raises ``OSError``, after closing both, when one is lost meanwhile.
    """
    near, far = Half(on_close), Half()
    near.other, far.other = far, near
    for sock in (client, backend):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    await loop.connect_accepted_socket(lambda: far, backend)
    transport, _protocol = await loop.connect_accepted_socket(lambda: near, client)
    return transport
