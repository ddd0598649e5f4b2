"""The TCP side of the userspace mode: accept, dial a backend, relay."""

import asyncio
import logging
import resource
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from errno import EALREADY, EINPROGRESS, EINVAL
from socket import SocketType
from typing import Protocol

from pyproxy.balancer import Picker
from pyproxy.model import Action, Address, Forward, Reject
from pyproxy.proxier._meter import Carried, Meter
from pyproxy.proxier._poller import ERROR, HUP, IN, Poller
from pyproxy.proxier._relay import LINGER_RESET, READS, READS_AND_WRITES, Connection
from pyproxy.proxier._sockets import EXHAUSTED, Shortage, keep_alive, reset
from pyproxy.proxier._splice import Pipes
from pyproxy.proxier._transparent import Transparent, dress
from pyproxy.rules.listeners import Listener, Surroundings, action_for

DIAL_TIMEOUTS = (0.25, 0.5, 1.0, 2.0)  # seconds; kube-proxy's userspace mode had the same
TICK_SECONDS = 0.05  # how exactly the timeouts are kept
ACCEPTS_AT_ONCE = 64
PIPE_SHARE = 8  # pipes may be one in so many file descriptors
PAUSE_SECONDS = 0.2  # without file descriptors, until the next attempt
PAUSES = 20  # until a connection without a file descriptor for its backend is given up
SWEEP_SECONDS = 10.0

log = logging.getLogger(__name__)

Observe = Callable[[str], None]  # the result of a connection, for the metrics


class TcpRelay:
    """All TCP connections of one family."""

    def __init__(
        self,
        surroundings: Callable[[], Surroundings],
        observe: Observe,
        transparent: Transparent | None = None,
    ) -> None:
        self.transparent = transparent
        self.loop = asyncio.get_running_loop()
        self.surroundings = surroundings
        self.observe = observe
        self.poller = Poller()
        self.pipes = Pipes(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // PIPE_SHARE)
        self.starving: set[Dial] = set()  # while there are any, nobody is accepted
        self._open: set[TcpConnection] = set()
        self._watched: set[TcpConnection] = set()
        self._dials: set[Dial] = set()
        self._over = asyncio.Event()
        self._shortage = Shortage()
        self._tick: asyncio.TimerHandle | None = None
        self._sweep: asyncio.TimerHandle | None = None

    @property
    def open_count(self) -> int:
        return len(self._open)

    def carried(self) -> Iterator[tuple[Meter, Address, Carried]]:
        """Yield what each open connection has carried, with who counts it when it is over."""
        for connection in self._open:
            yield connection.meter, connection.address, connection.carried()

    async def drained(self) -> None:
        """Return when no connection is open any more."""
        while self._open or self._dials:
            self._over.clear()
            await self._over.wait()

    def local_ips(self) -> set[str]:
        """Return the addresses of this side that clients of open connections talk to."""
        clients = [connection.near.sock for connection in self._open]
        clients += [dial.client for dial in self._dials]
        return {client.getsockname()[0] for client in clients}

    def close_all(self) -> None:
        """Reset all connections; nothing is relayed after that."""
        for dial in list(self._dials):
            dial.give_up()
        for connection in list(self._open):
            connection.abort()
        for timer in (self._tick, self._sweep):
            if timer is not None:
                timer.cancel()
        self.pipes.close()
        self.poller.close()

    def listen(self, sock: socket.socket, entrance: "Entrance") -> None:
        """Accept from now on, until the socket is not one of the entrance's any more."""
        self.poller.add(sock.fileno(), IN, Acceptor(self, sock, entrance))

    def unlisten(self, sock: socket.socket) -> None:
        """Stop accepting; who waits in the backlog is still served."""
        self.poller.discard(sock.fileno())

    def pause(self, sock: socket.socket, entrance: "Entrance") -> None:
        """Leave the backlog alone for a while: an unreadable listener would spin the loop."""
        self.unlisten(sock)
        self.loop.call_later(PAUSE_SECONDS, self._resume, sock, entrance)

    def new_socket(self, family: int, now: float) -> SocketType | None:
        try:
            sock = SocketType(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0)
        except OSError as error:
            self.refused(error)
            return None
        self._shortage.passed(now)
        return sock

    def refused(self, error: OSError) -> None:
        if error.errno in EXHAUSTED:
            self._shortage.met(error, self.loop.time(), len(self._open))
        else:
            log.warning("no socket", extra={"error": str(error)})

    def dialling(self, dial: "Dial") -> None:
        """Watch over a dial that takes some time."""
        self._dials.add(dial)
        if self._tick is None:
            self._tick = self.loop.call_later(TICK_SECONDS, self._look_at_dials)

    def dialled(self, dial: "Dial") -> None:
        """Take note that a dial is over."""
        if self._dials:
            self._dials.discard(dial)
            self._over.set()

    def joined(self, connection: "TcpConnection") -> None:
        """Take note of a new connection."""
        self._open.add(connection)
        self.observe("forwarded")
        if self._sweep is None:
            self._sweep = self.loop.call_later(SWEEP_SECONDS, self._look_after)

    def parted(self, connection: "TcpConnection") -> None:
        """Take note that a connection is over."""
        self._open.discard(connection)
        self._watched.discard(connection)
        if not self._open:
            self._over.set()
            self.pipes.close()
        self.observe("closed")

    def _resume(self, sock: socket.socket, entrance: "Entrance") -> None:
        if sock.fileno() >= 0 and sock in entrance.sockets:
            self.listen(sock, entrance)

    def _look_at_dials(self) -> None:
        now = self.loop.time()
        for dial in [dial for dial in self._dials if dial.until <= now]:
            dial.late()
        more = bool(self._dials)
        self._tick = self.loop.call_later(TICK_SECONDS, self._look_at_dials) if more else None

    def _look_after(self) -> None:
        """See that the kernel finds out when a backend is gone without a word.

        Most connections are over before they are seen here, and never pay for it.
        """
        for connection in self._open - self._watched:
            keep_alive(connection.far.sock)
        self._watched = set(self._open)
        more = bool(self._open)
        self._sweep = self.loop.call_later(SWEEP_SECONDS, self._look_after) if more else None


class Acceptor:
    """Takes in those who connect to a listening socket."""

    __slots__ = ("_entrance", "_family", "_relay", "_round", "_sock")

    def __init__(self, relay: TcpRelay, sock: socket.socket, entrance: "Entrance") -> None:
        self._relay = relay
        self._sock = sock
        self._entrance = entrance
        self._family = sock.family
        self._round = 0  # of the poller, when somebody was accepted last

    def ready(self, _events: int) -> None:
        """Accept one client; many if they come so thick that they are met round after round."""
        relay = self._relay
        is_busy = relay.poller.rounds == self._round + 1
        self._round = relay.poller.rounds
        for _ in range(ACCEPTS_AT_ONCE if is_busy else 1):
            if relay.starving:
                relay.pause(self._sock, self._entrance)
                return
            if not self._accept():
                return

    def _accept(self) -> bool:
        """Say whether there may be more."""
        try:
            # accept() would ask twice for what is known.
            fd, peer = self._sock._accept()  # type: ignore[attr-defined]
        except (BlockingIOError, ConnectionAbortedError):
            return False
        except OSError as error:
            self._relay.refused(error)
            self._relay.pause(self._sock, self._entrance)
            return False
        client = SocketType(self._family, socket.SOCK_STREAM, 0, fd)
        front = self._entrance.front_of(client)
        if front is None:
            reset(client)
        else:
            Dial(self._relay, front, client, peer[0]).begin()
        return True


class TcpConnection(Connection):
    """A connection, and to whom it goes."""

    __slots__ = ("_picker", "_relay", "address", "meter")

    def __init__(
        self,
        relay: TcpRelay,
        client: SocketType,
        backend: SocketType,
        picker: Picker,
        address: Address,
        meter: Meter,
    ) -> None:
        super().__init__(relay.poller, relay.pipes, client, backend)
        self._relay = relay
        self._picker = picker
        self.address = address
        self.meter = meter
        meter.opened(address)
        relay.joined(self)

    def carried(self) -> Carried:
        return Carried(bytes_in=self.near.carried, bytes_out=self.far.carried)

    def closed(self) -> None:
        self._picker.closed(self.address)
        self.meter.closed(self.address, self.carried())
        self._relay.parted(self)


class Dial:
    """A client whose backend is being connected to: each attempt to another one.

    Backends of this node answer while they are called, and the client need not be watched.
    """

    __slots__ = (
        "_address",
        "_attempts",
        "_backend",
        "_front",
        "_ip",
        "_is_dressed",
        "_pauses",
        "_picker",
        "_relay",
        "_tried",
        "_waiting",
        "client",
        "until",
    )

    _address: Address
    _picker: Picker

    def __init__(self, relay: TcpRelay, front: "TcpFront", client: SocketType, ip: str) -> None:
        self._relay = relay
        self._front = front
        self._ip = ip
        self._attempts = 0
        self._pauses = 0
        self._tried: tuple[Address, ...] = ()
        self._backend: SocketType | None = None
        self._waiting: Waiting | None = None
        self._is_dressed = False  # the backend sees the client's address
        self.client = client
        self.until = 0.0  # when it is to be looked after

    def begin(self) -> None:
        """Call a backend, with what the plan says by now."""
        relay, front, ip = self._relay, self._front, self._ip
        now = relay.loop.time()
        while self._attempts < len(DIAL_TIMEOUTS):
            action, picker = front.action(ip, relay.surroundings()), front.picker
            if not isinstance(action, Forward):
                self._lose("no_endpoint" if self._attempts else None)
                return
            backend = relay.new_socket(self.client.family, now)
            if backend is None:
                relay.starving.add(self)
                self._wait(now + PAUSE_SECONDS)
                return
            address = picker.pick(action.pool, ip, now, self._tried)
            self._tried += (address,)
            seconds = DIAL_TIMEOUTS[self._attempts]
            self._attempts += 1
            error = self._call(backend, action, address, now)
            if error and error != EALREADY:
                backend.close()
                continue
            picker.opened(address)  # others that dial meanwhile shall know
            self._backend, self._picker, self._address = backend, picker, address
            if error:
                relay.poller.add(backend.fileno(), READS_AND_WRITES, self)
                self._wait(now + seconds)
            else:
                self._join(backend)
            return
        self._lose("dial_failed")

    def ready(self, events: int) -> None:
        """Join the two sides, or try another backend."""
        assert self._backend is not None, "it was registered"
        if events & (ERROR | HUP):
            self._drop()
            self.begin()
        else:
            self._join(self._backend, events)

    def late(self) -> None:
        """Try another backend, or once more to have a socket."""
        if self._backend is not None:
            if self._is_dressed and self._relay.transparent is not None:
                # Once more, as this node: perhaps the answers go another way.
                self._relay.transparent.distrust(self._address, self._relay.loop.time())
                self._attempts -= 1
                self._tried = self._tried[:-1]
            self._drop()
        else:
            self._relay.starving.discard(self)
            self._pauses += 1
            if self._pauses > PAUSES:
                self._lose("dial_failed")
                return
        self.begin()

    def give_up(self) -> None:
        self._drop()
        self._lose(None)

    def _wait(self, until: float) -> None:
        self.until = until
        self._relay.dialling(self)
        if self._waiting is None:
            self._waiting = Waiting(self)
            self._relay.poller.add(self.client.fileno(), READS, self._waiting)

    def _join(self, backend: SocketType, events: int = 0) -> None:
        relay, poller = self._relay, self._relay.poller
        relay.dialled(self)
        connection = TcpConnection(
            relay, self.client, backend, self._picker, self._address, self._front.meter
        )
        near, far = connection.near, connection.far
        if events:
            far.watches_writing = True
            poller.lead(far.fd, far)
        else:
            poller.add(far.fd, READS, far)
        if self._waiting is not None:
            poller.lead(near.fd, near)
            near.ready(self._waiting.events)
        else:
            near.pump()  # most clients have spoken by now
            if not near.is_over:
                poller.add(near.fd, READS, near)
        if events and not far.is_over:
            far.ready(events)

    def _call(self, backend: SocketType, action: Forward, address: Address, now: float) -> int:
        """Connect, as the client if it keeps its address; return the error."""
        transparent = self._relay.transparent
        self._is_dressed = transparent is not None and transparent.keeps(
            action, self._ip, address, now
        )
        if self._is_dressed:
            try:
                dress(backend, self._ip)
            except OSError as error:
                return error.errno or EINVAL
        return called(backend, address)

    def _drop(self) -> None:
        if self._backend is not None:
            self._picker.closed(self._address)
            self._relay.poller.close_socket(self._backend)
            self._backend = None

    def _lose(self, result: str | None) -> None:
        """Reset the client, for it has no backend."""
        self._relay.starving.discard(self)
        self._relay.dialled(self)
        with suppress(OSError):
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        self._relay.poller.close_socket(self.client)
        if result is not None:
            self._relay.observe(result)


class Waiting:
    """What a client does until its backend answers; if it goes, nobody is called any more."""

    __slots__ = ("_dial", "events")

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self.events = 0

    def ready(self, events: int) -> None:
        self.events |= events
        if events & ERROR:
            self._dial.give_up()


def called(sock: SocketType, address: Address) -> int:
    """Connect; return the error, which is EALREADY while the other side has not answered."""
    error = sock.connect_ex(address)
    if error == EINPROGRESS:  # a pod of this node has answered by now
        error = sock.connect_ex(address)
    return error


class Entrance(Protocol):
    """Listening sockets, and which frontend a client wants who came in by one of them."""

    sockets: list[socket.socket]

    def front_of(self, client: SocketType) -> "TcpFront | None": ...


class TcpFront:
    """One TCP frontend: what is to happen to who connects, and its own sockets, if it has any."""

    def __init__(
        self, relay: TcpRelay, sockets: Iterable[socket.socket], listener: Listener, picker: Picker
    ) -> None:
        self.is_open = True
        self.sockets = list(sockets)
        self.listener = listener
        self.picker = picker
        self.meter = Meter()
        self._relay = relay
        for sock in self.sockets:
            relay.listen(sock, self)

    def action(self, ip: str, around: Surroundings) -> Action:
        """Return what becomes of a connection from ``ip``. One that is closed serves nobody."""
        return action_for(self.listener.route, ip, around) if self.is_open else Reject()

    def front_of(self, _client: SocketType) -> "TcpFront":
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
