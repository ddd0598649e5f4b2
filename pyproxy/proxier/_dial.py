"""Calls backends for a client of TCP, one after another, until one answers."""

import socket
from contextlib import suppress
from errno import EADDRNOTAVAIL, EALREADY, EINPROGRESS, EINVAL
from socket import SocketType
from time import monotonic
from typing import Protocol

from msgspec import Struct

from pyproxy.balancer import Picker
from pyproxy.model import Action, Address, Forward
from pyproxy.proxier._meter import Meter
from pyproxy.proxier._poller import ERROR, HUP, IN
from pyproxy.proxier._relay import LINGER_RESET, NOBODY, READS, READS_AND_WRITES
from pyproxy.proxier._sockets import control_congestion
from pyproxy.proxier._tcp import TcpRelay
from pyproxy.proxier._transparent import Transparent, dress, take_any_port
from pyproxy.rules.listeners import Surroundings

TIMEOUTS = (0.25, 0.5, 1.0, 2.0)  # seconds; kube-proxy's userspace mode had the same
ATTEMPTS = len(TIMEOUTS)
PAUSE_SECONDS = 0.2  # without file descriptors, until the next attempt
PAUSES = 20  # until a connection without a file descriptor for its backend is given up


class Front(Protocol):
    """What the plan says by now of the frontend that a client came to."""

    picker: Picker
    meter: Meter
    always: Action | None  # what becomes of all; None: action() knows

    def action(self, ip: str, around: Surroundings) -> Action: ...


class Dial(Struct, eq=False):
    """A client whose backend is being connected to: each attempt to another one.

    Backends of this node answer while they are called, and the client need not be watched.
    """

    relay: TcpRelay
    front: Front
    client: SocketType
    ip: str
    until: float = 0.0  # when it is to be looked after
    pauses: int = 0
    tried: tuple[Address, ...] = ()
    backend: SocketType | None = None  # the last tried, while it is called
    counter: Picker | None = None  # has counted the call
    is_dressed: bool = False  # the backend sees the client's address
    waiting: "Waiting | None" = None

    def begin(self) -> None:
        """Call a backend, with what the plan says by now."""
        relay, front = self.relay, self.front
        now = monotonic()
        while len(self.tried) < ATTEMPTS:
            action = front.always or front.action(self.ip, relay.surroundings())
            if not isinstance(action, Forward):
                front.meter.rejected += not self.tried
                self._lose("no_endpoint" if self.tried else None)
                return
            sock = relay.new_socket(self.client.family, now)
            if sock is None:
                relay.starving.add(self)
                self._wait(now + PAUSE_SECONDS)
                return
            picker = front.picker
            address, _weight, is_local = picker.pick(action.pool, self.ip, now, self.tried)
            if is_local and relay.congestion is not None:
                control_congestion(sock.fileno(), relay.congestion.local)
            error_number = (
                called(sock, address)
                if relay.transparent is None
                else self._call(relay.transparent, sock, action, address, now)
            )
            if picker.counts and error_number in (0, EALREADY):
                self.counter = picker
                picker.opened(address)  # others that dial meanwhile shall know
            if not error_number:
                self._join(sock, address)
                return
            self.tried += (address,)
            if error_number == EALREADY:
                self._await(sock, now)
                return
            sock.close()
        self._lose("dial_failed")

    def ready(self, events: int) -> None:
        """Join the two sides, or try another backend."""
        assert self.backend is not None, "it was registered"
        if events & (ERROR | HUP):
            self._drop()
            self.begin()
        else:
            self._join(self.backend, self.tried[-1], events)

    def late(self) -> None:
        """Try another backend, or once more to have a socket."""
        if self.backend is not None:
            self._drop()
            if self.is_dressed and self.relay.transparent is not None:
                # Once more, as this node: perhaps the answers go another way.
                self.relay.transparent.distrust(self.tried[-1], monotonic())
                self.tried = self.tried[:-1]
        else:
            self.relay.starving.discard(self)
            self.pauses += 1
            if self.pauses > PAUSES:
                self._lose("dial_failed")
                return
        self.begin()

    def give_up(self) -> None:
        self._drop()
        self._lose(None)

    def _await(self, sock: SocketType, now: float) -> None:
        self.backend = sock
        self.relay.poller.add(sock.fileno(), READS_AND_WRITES, self)
        self._wait(now + TIMEOUTS[len(self.tried) - 1])

    def _wait(self, until: float) -> None:
        self.until = until
        self.relay.dialling(self)
        if self.waiting is None:
            self.waiting = Waiting(self)
            self.relay.poller.add(self.client.fileno(), READS, self.waiting)

    def _join(self, backend: SocketType, address: Address, events: int = 0) -> None:
        relay = self.relay
        if self.waiting is not None:
            relay.dialled(self)
        connection = relay.join(self.client, backend, address, self.front.meter, self.counter)
        near, far = connection.near, connection.far
        if events:
            far.watches_writing = True
            relay.poller.lead(far.fd, far)
        else:
            relay.poller.add(far.fd, READS, far)
        if self.waiting is not None:
            relay.poller.lead(near.fd, near)
            near.catch_up(self.waiting.events)
        else:
            if not relay.is_crowded:  # else what they have said is read together, in the next round
                near.catch_up(IN)  # most clients have spoken by now
            if near.other is not NOBODY:
                relay.poller.add(near.fd, READS, near)
        if events and far.other is not NOBODY:
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
        guise = transparent.guise(action, self.ip, address, now)
        self.is_dressed = guise is not None
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
        if self.backend is not None:
            if self.counter is not None:
                self.counter.closed(self.tried[-1])
                self.counter = None
            self.relay.poller.close_sockets(self.backend)
            self.backend = None

    def _lose(self, result: str | None) -> None:
        """Reset the client, for it has no backend."""
        self.relay.starving.discard(self)
        if self.waiting is not None:
            self.relay.dialled(self)
        with suppress(OSError):
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        self.relay.poller.close_sockets(self.client)
        if result is not None:
            self.relay.observe(result)


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
