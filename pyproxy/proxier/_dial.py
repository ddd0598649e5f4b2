"""Calls backends for a client of TCP, one after another, until one answers."""

import socket
from contextlib import suppress
from errno import EADDRNOTAVAIL, EALREADY, EINPROGRESS, EINVAL
from socket import SocketType
from time import monotonic
from typing import Protocol

from pyproxy.balancer import Picker
from pyproxy.model import Action, Address, Forward
from pyproxy.proxier._meter import Meter
from pyproxy.proxier._poller import ERROR, HUP, IN
from pyproxy.proxier._relay import LINGER_RESET, READS, READS_AND_WRITES
from pyproxy.proxier._sockets import control_congestion
from pyproxy.proxier._tcp import TcpConnection, TcpRelay
from pyproxy.proxier._transparent import Transparent, dress, take_any_port
from pyproxy.rules.listeners import Surroundings

TIMEOUTS = (0.25, 0.5, 1.0, 2.0)  # seconds; kube-proxy's userspace mode had the same
PAUSE_SECONDS = 0.2  # without file descriptors, until the next attempt
PAUSES = 20  # until a connection without a file descriptor for its backend is given up


class Front(Protocol):
    """What the plan says by now of the frontend that a client came to."""

    picker: Picker
    meter: Meter
    always: Action | None  # what becomes of all; None: action() knows

    def action(self, ip: str, around: Surroundings) -> Action: ...


class Dial:
    """A client whose backend is being connected to: each attempt to another one.

    Backends of this node answer while they are called, and the client need not be watched.
    """

    __slots__ = (
        "_address",
        "_backend",
        "_counter",
        "_front",
        "_ip",
        "_is_dressed",
        "_pauses",
        "_relay",
        "_tried",
        "_waiting",
        "client",
        "until",
    )

    _address: Address
    _counter: Picker | None

    def __init__(self, relay: TcpRelay, front: Front, client: SocketType, ip: str) -> None:
        self._relay = relay
        self._front = front
        self._ip = ip
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
        now = monotonic()
        while len(self._tried) < len(TIMEOUTS):
            action = front.always or front.action(ip, relay.surroundings())
            if not isinstance(action, Forward):
                front.meter.rejected += not self._tried
                self._lose("no_endpoint" if self._tried else None)
                return
            backend = relay.new_socket(self.client.family, now)
            if backend is None:
                relay.starving.add(self)
                self._wait(now + PAUSE_SECONDS)
                return
            picker = front.picker
            address = picker.pick(action.pool, ip, now, self._tried)
            self._tried += (address,)
            if relay.local_congestion_control and picker.is_local(action.pool, address):
                control_congestion(backend.fileno(), relay.local_congestion_control)
            error_number = (
                called(backend, address)
                if relay.transparent is None
                else self._call(relay.transparent, backend, action, address, now)
            )
            if error_number and error_number != EALREADY:
                backend.close()
                continue
            self._counter = picker if picker.counts else None
            if self._counter is not None:
                self._counter.opened(address)  # others that dial meanwhile shall know
            self._backend, self._address = backend, address
            if error_number:
                relay.poller.add(backend.fileno(), READS_AND_WRITES, self)
                self._wait(now + TIMEOUTS[len(self._tried) - 1])
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
                self._relay.transparent.distrust(self._address, monotonic())
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
        if self._waiting is not None:
            relay.dialled(self)
        connection = TcpConnection(
            relay, self.client, backend, self._address, self._front.meter, self._counter
        )
        near, far = connection.near, connection.far
        if events:
            far.watches_writing = True
            poller.lead(far.fd, far)
        else:
            poller.add(far.fd, READS, far)
        if self._waiting is not None:
            poller.lead(near.fd, near)
            near.catch_up(self._waiting.events)
        else:
            if not relay.is_crowded:  # else what they have said is read together, in the next round
                near.catch_up(IN)  # most clients have spoken by now
            if not near.is_over:
                poller.add(near.fd, READS, near)
        if events and not far.is_over:
            far.catch_up(events)

    def _call(
        self,
        transparent: Transparent,
        backend: SocketType,
        action: Forward,
        address: Address,
        now: float,
    ) -> int:
        """Connect, as the client if it keeps its address; return the error."""
        guise = transparent.guise(action, self._ip, address, now)
        self._is_dressed = guise is not None
        if guise is None:
            return called(backend, address)
        try:
            dress(backend, guise)
        except OSError as error:
            return error.errno or EINVAL
        transparent.prefer_port(backend)
        code = called(backend, address)
        if code != EADDRNOTAVAIL:
            return code
        take_any_port(backend)
        return called(backend, address)

    def _drop(self) -> None:
        if self._backend is not None:
            if self._counter is not None:
                self._counter.closed(self._address)
            self._relay.poller.close_sockets(self._backend)
            self._backend = None

    def _lose(self, result: str | None) -> None:
        """Reset the client, for it has no backend."""
        self._relay.starving.discard(self)
        if self._waiting is not None:
            self._relay.dialled(self)
        with suppress(OSError):
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        self._relay.poller.close_sockets(self.client)
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
