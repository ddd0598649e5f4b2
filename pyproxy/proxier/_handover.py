"""Hands sockets, connections and flows to the process that comes next, over a Unix socket.

The successor asks twice: for the sockets by which clients come in before it would open its own,
and for connections and flows when all its frontends are there. In between both serve, from the
same sockets, so that there is no moment without somebody to accept. A successor that ends in
between changes nothing.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path

from pyproxy.proxier._given import (
    AT_ONCE,
    Entrances,
    Given,
    GivenFlow,
    Parcel,
    connection_messages,
    connections_of,
    entrance_messages,
    entrances_of,
    flow_messages,
    flows_of,
)

ASK_SOCKETS, ASK_CONNECTIONS, END = b"sockets", b"connections", b"end"
MESSAGE = 1 << 16  # bytes
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
LATEST_SECONDS = 10.0  # until an answer is not waited for any more

log = logging.getLogger(__name__)


class Handover:
    """Waits for a successor, and gives it what it asks for."""

    def __init__(
        self,
        path: Path,
        entrances: Callable[[], Entrances],
        retire: Callable[[], list[GivenFlow]],
        surrender: Callable[[], Awaitable[list[Given]]],
    ) -> None:
        """``retire`` lets nobody in any more; ``surrender`` then lets go of connections."""
        self.done = asyncio.Event()
        self.has_begun = False  # the successor serves
        self.is_near = False  # a successor has asked for sockets, and has not gone since
        self.path = path
        self._entrances = entrances
        self._retire = retire
        self._surrender = surrender
        self._server: socket.socket | None = None
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_open(self) -> bool:
        return self._server is not None

    def open(self) -> None:
        """Wait from now on, in the place of whoever did before. Raises ``OSError``."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(self.path.parent)
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            new = self.path.with_suffix(f".{os.getpid()}")
            new.unlink(missing_ok=True)
            server.bind(str(new))
            server.listen(1)
            new.rename(self.path)
        except OSError:
            server.close()
            raise
        self._server = server
        self._loop.add_reader(server.fileno(), self._accept, server)

    def close(self) -> None:
        if self._server is not None:
            self._loop.remove_reader(self._server.fileno())
            self._server.close()
            self._server = None
            if not self.has_begun:  # else it is the successor's
                self.path.unlink(missing_ok=True)
        for task in self._tasks:
            task.cancel()

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            peer, _ = server.accept()
            peer.setblocking(False)
            task = self._loop.create_task(self._serve(peer), name="handover")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, peer: socket.socket) -> None:
        try:
            with peer:
                if uid_of(peer) != os.geteuid():
                    return
                while question := await self._loop.sock_recv(peer, MESSAGE):
                    if question == ASK_SOCKETS:
                        self.is_near = True
                        # We go on using them ourselves.
                        await send(peer, list(entrance_messages(self._entrances())))
                    elif question == ASK_CONNECTIONS:
                        await self._give(peer)
                        return
        except OSError as error:
            log.warning("a successor is gone", extra={"error": str(error)})
        finally:
            self.is_near = False

    async def _give(self, peer: socket.socket) -> None:
        self.has_begun = True
        flows = self._retire()
        given: Sequence[Given] = ()
        try:
            await send(peer, flow_messages(flows))
            given = await self._surrender()
            await send(peer, connection_messages(given))
        finally:
            gone: list[Given | GivenFlow] = [*flows, *given]
            for one in gone:
                one.close()  # the successor has it too
            self.done.set()
        fields = {"connections": len(given), "flows": len(flows)}
        log.info("a successor has taken over", extra=fields)


class Predecessor:
    """A process that serves until now; its answers take no longer than it needs to give them."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer

    def entrances(self) -> Entrances:
        """Return what it accepts by. Raises ``OSError``."""
        self._peer.send(ASK_SOCKETS)
        return entrances_of(self._answers())

    def flows(self) -> list[GivenFlow]:
        """Return its flows: it lets nobody in from now on. Raises ``OSError``."""
        self._peer.send(ASK_CONNECTIONS)
        return [one for message, fds in self._answers() for one in flows_of(message, fds)]

    def connections(self) -> list[Given]:
        """Return, after the flows, its open connections. Raises ``OSError``."""
        return [one for message, fds in self._answers() for one in connections_of(message, fds)]

    def _answers(self) -> Iterator[Parcel]:
        while True:
            message, fds, _flags, _address = socket.recv_fds(self._peer, MESSAGE, 3 * AT_ONCE)
            if message == END:
                return
            if not message:
                raise ConnectionResetError(errno.ECONNRESET, "it has ended")
            yield message, fds

    def close(self) -> None:
        self._peer.close()


def predecessor(path: Path) -> Predecessor | None:
    """Return who serves now; None if there is nobody, or somebody whom another user started."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.settimeout(LATEST_SECONDS)
    try:
        peer.connect(str(path))
        uid = uid_of(peer)
    except OSError:
        peer.close()
        return None
    if uid != os.geteuid():
        peer.close()
        log.warning("a stranger listens", extra={"path": str(path), "uid": uid})
        return None
    return Predecessor(peer)


def check_private(folder: Path) -> None:
    """Raise ``PermissionError`` for a folder where another user may put something in our name."""
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, f"the folder is user {found.st_uid}'s")
    if found.st_mode & OTHERS_WRITE:
        raise PermissionError(errno.EPERM, "other users may write to the folder")


async def send(peer: socket.socket, messages: Iterable[Parcel]) -> None:
    """Send messages, and the end. Raises ``OSError``."""
    peer.settimeout(LATEST_SECONDS)
    try:
        await asyncio.to_thread(send_messages, peer, messages)
    finally:
        peer.setblocking(False)


def send_messages(peer: socket.socket, messages: Iterable[Parcel]) -> None:
    for message, fds in messages:
        socket.send_fds(peer, [message], fds)
    peer.send(END)


def uid_of(peer: socket.socket) -> int:
    size = struct.calcsize("=iII")
    _pid, uid, _gid = struct.unpack(
        "=iII", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    return int(uid)
