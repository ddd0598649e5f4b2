"""The TCP side of the userspace mode: accept, dial a backend, relay."""

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable

from pyproxy.balancer import Picker
from pyproxy.model import Address, Forward
from pyproxy.proxier._relay import abort, join
from pyproxy.proxier._sockets import EXHAUSTED, reset
from pyproxy.rules.listeners import Listener, Surroundings, action_for

DIAL_TIMEOUTS = (0.25, 0.5, 1.0, 2.0)  # seconds; kube-proxy's userspace mode had the same
ACCEPTS_AT_ONCE = 64
PAUSE_SECONDS = 0.2  # without file descriptors, until the next attempt to accept

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
        self._open: dict[socket.socket, asyncio.Transport] = {}
        self._idle = asyncio.Event()
        self._exhausted = False

    @property
    def open_count(self) -> int:
        return len(self._open)

    async def drained(self) -> None:
        """Return when no connection is open any more."""
        while self._open:
            self._idle.clear()
            await self._idle.wait()

    def close_all(self) -> None:
        for transport in list(self._open.values()):
            abort(transport)

    def listen(self, sock: socket.socket, front: "TcpFront") -> None:
        self._loop.add_reader(sock.fileno(), self._accept, sock, front)

    def unlisten(self, sock: socket.socket) -> None:
        """Stop accepting; who waits in the backlog is still served."""
        self._loop.remove_reader(sock.fileno())

    def _accept(self, sock: socket.socket, front: "TcpFront") -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                client, peer = sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause(sock, front, error)
                return
            self._exhausted = False
            client.setblocking(False)
            self._welcome(client, peer[0], front)

    def _welcome(self, client: socket.socket, ip: str, front: "TcpFront") -> None:
        match action_for(front.listener.route, ip, self._surroundings()):
            case Forward():
                self._tasks.create_task(self._serve(client, ip, front), name="connection")
            case _:  # the guard lets nobody in who is to meet silence, but for an instant
                reset(client)

    def _pause(self, sock: socket.socket, front: "TcpFront", error: OSError) -> None:
        """Leave the backlog alone for a while: an unreadable listener would spin the loop."""
        if error.errno not in EXHAUSTED:
            log.warning("accept failed", extra={"error": str(error)})
        elif not self._exhausted:
            self._exhausted = True
            log.error(
                "out of file descriptors: new connections wait",
                extra={"error": error.strerror, "open": len(self._open)},
            )
        self.unlisten(sock)
        self._loop.call_later(PAUSE_SECONDS, self._resume, sock, front)

    def _resume(self, sock: socket.socket, front: "TcpFront") -> None:
        if sock.fileno() >= 0 and sock in front.sockets:
            self.listen(sock, front)

    async def _serve(self, client: socket.socket, ip: str, front: "TcpFront") -> None:
        try:
            dialled = await self._dial(ip, front)
        except BaseException:
            client.close()
            raise
        if dialled is None:
            reset(client)
            return
        backend, address = dialled
        picker = front.picker
        picker.opened(address)

        def closed() -> None:
            picker.closed(address)
            self._open.pop(client, None)
            self._idle.set()
            self._observe("closed")

        try:
            transport = await join(self._loop, client, backend, closed)
        except OSError:
            client.close()
            backend.close()
            picker.closed(address)
            return
        self._observe("forwarded")
        if not transport.is_closing():
            self._open[client] = transport

    async def _dial(self, ip: str, front: "TcpFront") -> tuple[socket.socket, Address] | None:
        """Connect to a backend, each attempt to another one and with what the plan says by then."""
        tried: set[Address] = set()
        for seconds in DIAL_TIMEOUTS:
            action = action_for(front.listener.route, ip, self._surroundings())
            if not isinstance(action, Forward):
                self._observe("no_endpoint")
                return None
            address = front.picker.pick(action.pool, ip, self._loop.time(), tried)
            tried.add(address)
            sock = await self._connected(address, seconds)
            if sock is not None:
                return sock, address
        self._observe("dial_failed")
        return None

    async def _connected(self, address: Address, seconds: float) -> socket.socket | None:
        family = socket.AF_INET6 if ":" in address.ip else socket.AF_INET
        sock = None
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setblocking(False)
            async with asyncio.timeout(seconds):
                await self._loop.sock_connect(sock, address)
        except (OSError, TimeoutError):
            if sock is not None:
                sock.close()
            return None
        except BaseException:
            if sock is not None:
                sock.close()
            raise
        return sock


class TcpFront:
    """One TCP frontend: its sockets, and what is to happen to who connects."""

    def __init__(
        self, relay: TcpRelay, sockets: Iterable[socket.socket], listener: Listener, picker: Picker
    ) -> None:
        self.sockets = list(sockets)
        self.listener = listener
        self.picker = picker
        self._relay = relay
        for sock in self.sockets:
            relay.listen(sock, self)

    def update(self, listener: Listener, picker: Picker) -> None:
        """Treat new connections so from now on; those that exist are left alone."""
        self.listener = listener
        self.picker = picker

    def close(self) -> None:
        sockets, self.sockets = self.sockets, []
        for sock in sockets:
            self._relay.unlisten(sock)
            sock.close()
