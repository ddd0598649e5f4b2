"""Hands sockets and open connections to the process that comes next, over a Unix socket.

The successor asks twice: for the shared sockets before it would open its own, and for the open
connections when all its frontends are there. In between both serve, from the same sockets, so
that there is no moment without somebody to accept. A successor that ends in between changes
nothing.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from socket import SocketType
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

import msgspec
from msgspec import Struct

from pyproxy.model import Address, Family, Proto
from pyproxy.proxier._relay import Held
from pyproxy.proxier._sockets import Shared

ASK_SOCKETS, ASK_CONNECTIONS, END = b"sockets", b"connections", b"end"
MESSAGE = 1 << 16  # bytes
AT_ONCE = 50  # connections in a message: the kernel passes 253 descriptors at a time
LATEST_SECONDS = 10.0  # until an answer is not waited for any more
RUN = Path("/run/pyproxy")

log = logging.getLogger(__name__)


class Given(Struct, frozen=True):
    """A connection that changes hands, with both its sockets."""

    backend: Address
    near: Held
    far: Held
    broken: bool
    sockets: tuple[SocketType, SocketType]  # of the client, of the backend


class Bound(NamedTuple):
    """Where a socket of a frontend's own is."""

    ip: str
    port: int
    proto: Proto


SHARED_TCP, SHARED_UDP = Bound("", 0, "TCP"), Bound("", 0, "UDP")


class Entrances(NamedTuple):
    """All sockets by which clients come in."""

    shared: Shared | None = None
    own: Mapping[Bound, socket.socket] = MappingProxyType({})


class Described(Struct, frozen=True, array_like=True):
    """A connection in a message. Its descriptors: two sockets, and a file for what is left."""

    backend: Address
    ended: tuple[bool, bool]
    left: tuple[int, int]  # bytes
    broken: bool


class Handover:
    """Waits for a successor, and gives it what it asks for."""

    def __init__(
        self,
        path: Path,
        entrances: Callable[[], Entrances],
        surrender: Callable[[], Awaitable[list[Given]]],
    ) -> None:
        self.done = asyncio.Event()
        self.has_begun = False  # the successor serves
        self._path = path
        self._entrances = entrances
        self._surrender = surrender
        self._server: socket.socket | None = None
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_open(self) -> bool:
        return self._server is not None

    def open(self) -> None:
        """Wait from now on, in the place of whoever did before. Raises ``OSError``."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            new = self._path.with_suffix(f".{os.getpid()}")
            new.unlink(missing_ok=True)
            server.bind(str(new))
            server.listen(1)
            new.rename(self._path)
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
                self._path.unlink(missing_ok=True)
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
                        await self._lend(peer)
                    elif question == ASK_CONNECTIONS:
                        await self._give(peer)
                        return
        except OSError as error:
            log.warning("a successor is gone", extra={"error": str(error)})

    async def _lend(self, peer: socket.socket) -> None:
        """Give it what we go on using ourselves. Raises ``OSError``."""
        messages = list(entrance_messages(self._entrances()))
        peer.settimeout(LATEST_SECONDS)
        await asyncio.to_thread(send_messages, peer, messages)
        peer.setblocking(False)

    async def _give(self, peer: socket.socket) -> None:
        self.has_begun = True
        given = await self._surrender()
        peer.settimeout(LATEST_SECONDS)
        try:
            await asyncio.to_thread(send_all, peer, given)
        finally:
            for connection in given:
                for sock in connection.sockets:
                    sock.close()  # the successor has it too
            self.done.set()
        log.info("a successor has taken over", extra={"connections": len(given)})


class Predecessor:
    """The process that serves until now; its answers take no longer than it needs to give them."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer

    def entrances(self) -> Entrances:
        """Return what it accepts by. Raises ``OSError``."""
        self._peer.send(ASK_SOCKETS)
        found: dict[Bound, socket.socket] = {}
        for message, fds in self._answers():
            places = msgspec.json.decode(message, type=list[Bound])
            opened = (socket.socket(fileno=fd) for fd in fds)
            found |= dict(zip(places, opened, strict=True))
        tcp, udp = found.pop(SHARED_TCP, None), found.pop(SHARED_UDP, None)
        return Entrances(Shared(tcp, udp) if tcp and udp else None, found)

    def connections(self) -> list[Given]:
        """Return its open connections: it has stopped to serve. Raises ``OSError``."""
        self._peer.send(ASK_CONNECTIONS)
        return [one for message, fds in self._answers() for one in received(message, fds)]

    def _answers(self) -> Iterator[tuple[bytes, list[int]]]:
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
    """Return who serves now; None if there is nobody."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.settimeout(LATEST_SECONDS)
    try:
        peer.connect(str(path))
    except OSError:
        peer.close()
        return None
    return Predecessor(peer)


class Succession:
    """Both ends of a process's time: whom it follows, and who follows it."""

    def __init__(
        self,
        path: Path,
        entrances: Callable[[], Entrances],
        surrender: Callable[[], Awaitable[list[Given]]],
    ) -> None:
        self._path = path
        self._predecessor: Predecessor | None = None
        self._handover = Handover(path, entrances, surrender)
        self._began = False

    @property
    def is_over(self) -> bool:
        """Say whether a successor serves, or is about to."""
        return self._handover.has_begun

    async def inherited(self) -> Entrances:
        """Return what a predecessor accepts by, if there is one."""
        self._predecessor = await asyncio.to_thread(predecessor, self._path)
        if self._predecessor is None:
            return Entrances()
        try:
            return await asyncio.to_thread(self._predecessor.entrances)
        except OSError as error:
            log.warning("a predecessor does not answer", extra={"error": str(error)})
            self._drop_predecessor()
            return Entrances()

    async def begin(self, take_over: Callable[[Given], None]) -> None:
        """Go on with the connections of a predecessor, and wait for a successor: once."""
        if self._began:
            return
        self._began = True
        if self._predecessor is not None:
            try:
                given = await asyncio.to_thread(self._predecessor.connections)
            except OSError as error:
                log.warning("connections are lost", extra={"error": str(error)})
                given = []
            for connection in given:
                take_over(connection)
            self._drop_predecessor()
            log.info("took over from a predecessor", extra={"connections": len(given)})
        try:
            self._handover.open()
        except OSError as error:
            reason = f"{self._path}: {error.strerror}"
            log.info("no successor will be able to take over", extra={"reason": reason})

    async def wait(self, seconds: float) -> None:
        """Return when a successor has taken over, or after so long."""
        if self._handover.is_open:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._handover.done.wait(), seconds)

    def close(self) -> None:
        self._drop_predecessor()
        self._handover.close()

    def _drop_predecessor(self) -> None:
        if self._predecessor is not None:
            self._predecessor.close()
            self._predecessor = None


def meeting_place(folder: str, family: Family) -> Path:
    """Return where processes of one network namespace find one another."""
    if folder:
        place = Path(folder)
    elif os.geteuid() == 0:
        place = RUN
    else:
        place = Path(os.environ.get("XDG_RUNTIME_DIR", "/tmp"), "pyproxy")
    namespace = os.stat("/proc/self/ns/net").st_ino
    return place / f"userspace-ipv{family}-{namespace}.sock"


def send_all(peer: socket.socket, given: Sequence[Given]) -> None:
    """Send connections, and the end. Raises ``OSError``."""
    for start in range(0, len(given), AT_ONCE):
        some = given[start : start + AT_ONCE]
        with contextlib.ExitStack() as files:
            fds: list[int] = []
            for connection in some:
                fds += [sock.fileno() for sock in connection.sockets]
                left = connection.near.left + connection.far.left
                if left:
                    fds.append(files.enter_context(file_with(left)).fileno())
            message = msgspec.json.encode([described(connection) for connection in some])
            socket.send_fds(peer, [message], fds)
    peer.send(END)


def entrance_messages(entrances: Entrances) -> Iterator[tuple[bytes, list[int]]]:
    """Yield messages with their descriptors."""
    found = dict(entrances.own)
    if entrances.shared is not None:
        found |= {SHARED_TCP: entrances.shared.tcp, SHARED_UDP: entrances.shared.udp}
    places = list(found)
    for start in range(0, len(places), AT_ONCE):
        some = places[start : start + AT_ONCE]
        yield msgspec.json.encode(some), [found[place].fileno() for place in some]


def send_messages(peer: socket.socket, messages: Iterable[tuple[bytes, list[int]]]) -> None:
    """Send messages, and the end. Raises ``OSError``."""
    for message, fds in messages:
        socket.send_fds(peer, [message], fds)
    peer.send(END)


def described(given: Given) -> Described:
    return Described(
        given.backend,
        (given.near.ended, given.far.ended),
        (len(given.near.left), len(given.far.left)),
        given.broken,
    )


def received(message: bytes, fds: Iterable[int]) -> list[Given]:
    rest = iter(fds)
    given = []
    for one in msgspec.json.decode(message, type=list[Described]):
        client, backend = (SocketType(fileno=next(rest)) for _ in range(2))
        left = b""
        if any(one.left):
            with os.fdopen(next(rest), "rb") as file:
                file.seek(0)
                left = file.read()
        near = Held(one.ended[0], left[: one.left[0]])
        far = Held(one.ended[1], left[one.left[0] :])
        given.append(Given(one.backend, near, far, one.broken, (client, backend)))
    return given


def file_with(content: bytes) -> BinaryIO:
    """Return a file in memory."""
    file = os.fdopen(os.memfd_create("pyproxy"), "w+b", buffering=0)
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
    return file


def uid_of(peer: socket.socket) -> int:
    size = struct.calcsize("=iII")
    _pid, uid, _gid = struct.unpack(
        "=iII", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    return int(uid)
