"""The TCP side of the userspace mode: accept, dial a backend, relay."""

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from errno import EALREADY, EINPROGRESS
from typing import Protocol

from pyproxy.balancer import Picker
from pyproxy.model import Action, Address, Forward, Reject
from pyproxy.proxier._relay import Half, join
from pyproxy.proxier._sockets import EXHAUSTED, Shortage, reset
from pyproxy.rules.listeners import Listener, Surroundings, action_for

DIAL_TIMEOUTS = (0.25, 0.5, 1.0, 2.0)  # seconds; kube-proxy's userspace mode had the same
ACCEPTS_AT_ONCE = 64
PAUSE_SECONDS = 0.2  # without file descriptors, until the next attempt
PAUSES = 20  # until a connection without a file descriptor for its backend is given up
SWEEP_SECONDS = 10.0

log = logging.getLogger(__name__)

Observe = Callable[[str], None]  # the result of a connection, for the metrics


class TcpRelay:
    """All TCP connections of one family."""

    def __init__(
        self, tasks: asyncio.TaskGroup, surroundings: Callable[[], Surroundings], observe: Observe
    ) -> None:
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._surroundings = surroundings
        self._observe = observe
        self._open: set[Half] = set()
        self._dialling: dict[socket.socket, str] = {}  # clients, and the address they came to
        self._idle = asyncio.Event()
        self._shortage = Shortage()
        self._starving = 0  # connections that wait for a file descriptor
        self._sweep: asyncio.TimerHandle | None = None

    @property
    def open_count(self) -> int:
        return len(self._open)

    async def drained(self) -> None:
        """Return when no connection is open any more."""
        while self._open:
            self._idle.clear()
            await self._idle.wait()

    def local_ips(self) -> set[str]:
        """Return the addresses of this side that clients of open connections talk to."""
        near = (half.transport for half in self._open)
        ips = {side.get_extra_info("sockname")[0] for side in near if side is not None}
        return ips | set(self._dialling.values())

    def close_all(self) -> None:
        for relay in list(self._open):
            relay.abort()

    def listen(self, sock: socket.socket, entrance: "Entrance") -> None:
        """Accept from now on, until the socket is not one of the entrance's any more."""
        self._loop.add_reader(sock.fileno(), self._accept, sock, entrance)

    def unlisten(self, sock: socket.socket) -> None:
        """Stop accepting; who waits in the backlog is still served."""
        self._loop.remove_reader(sock.fileno())

    def _accept(self, sock: socket.socket, entrance: "Entrance") -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            if self._starving:
                self._pause(sock, entrance)
                return
            try:
                client, peer = sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                self._refused(error)
                self._pause(sock, entrance)
                return
            client.setblocking(False)
            self._welcome(client, peer[0], entrance.front_of(client))

    def _welcome(self, client: socket.socket, ip: str, front: "TcpFront | None") -> None:
        if front is None or not isinstance(front.action(ip, self._surroundings()), Forward):
            reset(client)  # the guard lets nobody in who is to meet silence, but for an instant
            return
        # A file descriptor for the backend, before the next client takes it.
        spare = self._socket(ip)
        self._dialling[client] = client.getsockname()[0]
        self._tasks.create_task(self._serve(client, spare, ip, front), name="connection")

    def _refused(self, error: OSError) -> None:
        if error.errno in EXHAUSTED:
            self._shortage.met(error, self._loop.time(), len(self._open))
        else:
            log.warning("no socket", extra={"error": str(error)})

    def _pause(self, sock: socket.socket, entrance: "Entrance") -> None:
        """Leave the backlog alone for a while: an unreadable listener would spin the loop."""
        self.unlisten(sock)
        self._loop.call_later(PAUSE_SECONDS, self._resume, sock, entrance)

    def _resume(self, sock: socket.socket, entrance: "Entrance") -> None:
        if sock.fileno() >= 0 and sock in entrance.sockets:
            self.listen(sock, entrance)

    async def _serve(
        self, client: socket.socket, spare: socket.socket | None, ip: str, front: "TcpFront"
    ) -> None:
        try:
            await self._forward(client, spare, ip, front)
        finally:
            self._dialling.pop(client, None)

    async def _forward(
        self, client: socket.socket, spare: socket.socket | None, ip: str, front: "TcpFront"
    ) -> None:
        try:
            dialled = await self._dial(spare, ip, front)
        except BaseException:
            client.close()
            raise
        if dialled is None:
            reset(client)
            return
        backend, address, picker = dialled

        def closed() -> None:
            picker.closed(address)
            self._open.discard(near)
            self._idle.set()
            self._observe("closed")

        near = Half(closed)
        self._observe("forwarded")
        with suppress(OSError):
            await join(self._loop, near, client, backend)
        self._add(near)

    def _add(self, near: Half) -> None:
        if near.lost:
            return
        self._open.add(near)
        if self._sweep is None:
            self._sweep = self._loop.call_later(SWEEP_SECONDS, self._look_after)

    def _look_after(self) -> None:
        """End what is dead without the event loop noticing; see that the kernel watches the rest.

        Most connections are over before they are seen here, and never pay for being watched.
        """
        for near in list(self._open):
            if near.is_dead():
                near.abort()
            elif not near.watched:
                near.watch()
        self._sweep = None
        if self._open:
            self._sweep = self._loop.call_later(SWEEP_SECONDS, self._look_after)

    async def _dial(
        self, spare: socket.socket | None, ip: str, front: "TcpFront"
    ) -> tuple[socket.socket, Address, Picker] | None:
        """Connect to a backend, each attempt to another one and with what the plan says by then."""
        tried: set[Address] = set()
        for seconds in DIAL_TIMEOUTS:
            sock = spare or await self._awaited_socket(ip)
            spare = None
            if sock is None:
                break
            action, picker = front.action(ip, self._surroundings()), front.picker
            if not isinstance(action, Forward):
                sock.close()
                self._observe("no_endpoint")
                return None
            address = picker.pick(action.pool, ip, self._loop.time(), tried)
            tried.add(address)
            picker.opened(address)  # others that dial meanwhile shall know
            if await self._connected(sock, address, seconds):
                return sock, address, picker
            picker.closed(address)
        self._observe("dial_failed")
        return None

    async def _connected(self, sock: socket.socket, address: Address, seconds: float) -> bool:
        """Connect the socket, or close it."""
        try:
            error = sock.connect_ex(address)
            if error == EINPROGRESS:  # a pod of this node has answered by now: it costs no waiting
                error = sock.connect_ex(address)
            if error == EALREADY:
                async with asyncio.timeout(seconds):
                    await self._loop.sock_connect(sock, address)
            elif error:
                sock.close()
                return False
        except (OSError, TimeoutError):
            sock.close()
            return False
        except BaseException:
            sock.close()
            raise
        return True

    def _socket(self, ip: str) -> socket.socket | None:
        """Return a socket of the client's family, which is also that of the backends."""
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            self._refused(error)
            return None
        self._shortage.passed(self._loop.time())
        return sock

    async def _awaited_socket(self, ip: str) -> socket.socket | None:
        """Return a socket, when there is a file descriptor for it; meanwhile nobody is accepted."""
        self._starving += 1
        try:
            for _ in range(PAUSES):
                sock = self._socket(ip)
                if sock is not None:
                    return sock
                await asyncio.sleep(PAUSE_SECONDS)
        finally:
            self._starving -= 1
        return None


class Entrance(Protocol):
    """Listening sockets, and which frontend a client wants who came in by one of them."""

    sockets: list[socket.socket]

    def front_of(self, client: socket.socket) -> "TcpFront | None": ...


class TcpFront:
    """One TCP frontend: what is to happen to who connects, and its own sockets, if it has any."""

    def __init__(
        self, relay: TcpRelay, sockets: Iterable[socket.socket], listener: Listener, picker: Picker
    ) -> None:
        self.is_open = True
        self.sockets = list(sockets)
        self.listener = listener
        self.picker = picker
        self._relay = relay
        for sock in self.sockets:
            relay.listen(sock, self)

    def action(self, ip: str, around: Surroundings) -> Action:
        """Return what becomes of a connection from ``ip``. One that is closed serves nobody."""
        return action_for(self.listener.route, ip, around) if self.is_open else Reject()

    def front_of(self, _client: socket.socket) -> "TcpFront":
        return self

    def update(self, listener: Listener, picker: Picker) -> None:
        """Treat new connections so from now on; those that exist are left alone."""
        self.listener = listener
        self.picker = picker

    def close(self) -> None:
        self.is_open = False
        sockets, self.sockets = self.sockets, []
        for sock in sockets:
            self._relay.unlisten(sock)
            sock.close()
