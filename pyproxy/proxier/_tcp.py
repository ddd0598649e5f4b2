"""The TCP connections of the userspace mode, and who waits for one."""

import asyncio
import logging
import resource
from collections.abc import Callable, Iterator
from contextlib import suppress
from socket import SOCK_NONBLOCK, SOCK_STREAM, SocketType
from typing import Protocol

from pyproxy.balancer import Picker
from pyproxy.host import EXHAUSTED
from pyproxy.model import Address
from pyproxy.proxier._given import Given
from pyproxy.proxier._meter import Carried, Meter
from pyproxy.proxier._poller import Poller, tell_of
from pyproxy.proxier._relay import Connection, Side
from pyproxy.proxier._sockets import (
    Shortage,
    congestion_control,
    control_congestion,
    keep_alive,
)
from pyproxy.proxier._splice import Pipes
from pyproxy.proxier._transparent import Transparent
from pyproxy.rules.listeners import Surroundings, origin_of

STREAM = SOCK_STREAM | SOCK_NONBLOCK
TICK_SECONDS = 0.05  # how exactly the timeouts are kept
PIPE_SHARE = 8  # pipes may be one in so many file descriptors
SWEEP_SECONDS = 10.0

log = logging.getLogger(__name__)

Observe = Callable[[str], None]  # the result of a connection, for the metrics


class Dialling(Protocol):
    """A client whose backend is being connected to."""

    client: SocketType
    until: float  # when it is to be looked after

    def late(self) -> None:
        """Go on, although nobody has answered."""

    def give_up(self) -> None:
        """Reset the client."""


class TcpRelay:
    """All TCP connections of one family."""

    def __init__(
        self,
        surroundings: Callable[[], Surroundings],
        observe: Observe,
        transparent: Transparent | None = None,
    ) -> None:
        self.transparent = transparent
        self.is_crowded = False  # clients come so thick that many are accepted at once
        self.loop = asyncio.get_running_loop()
        self.surroundings = surroundings
        self.observe = observe
        self.poller = Poller.of_loop()
        self.congestion = congestion_control()
        self.pipes = Pipes(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // PIPE_SHARE)
        self.starving: set[Dialling] = set()  # while there are any, nobody is accepted
        self._open: set[TcpConnection] = set()
        self._dials: set[Dialling] = set()
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

    async def surrender(self) -> list[Given]:
        """Give all connections away, once those that are being made are there."""
        while self._dials:
            self._over.clear()
            await self._over.wait()
        return [connection.given() for connection in list(self._open)]

    def take_over(self, given: Given) -> None:
        """Go on with a connection that another process has given away."""
        client, backend = given.sockets
        # Whose backend it was is counted no more.
        connection = self.join(client, backend, given.backend, Meter(), None)
        connection.near.is_lost = given.broken
        connection.resume(given.near, given.far)

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

    def new_socket(self, family: int, now: float) -> SocketType | None:
        """Return a socket that does not block; None if there is none to be had."""
        try:
            sock = SocketType(family, STREAM, 0)
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

    def dialling(self, dial: Dialling) -> None:
        """Watch over a dial that takes some time."""
        self._dials.add(dial)
        if self._tick is None:
            self._tick = self.loop.call_later(TICK_SECONDS, self._look_at_dials)

    def dialled(self, dial: Dialling) -> None:
        """Take note that a dial is over that took some time."""
        self._dials.discard(dial)
        self._over.set()

    def join(
        self,
        client: SocketType,
        backend: SocketType,
        address: Address,
        meter: Meter,
        counter: Picker | None,
    ) -> "TcpConnection":
        """Return a new connection, which nobody watches yet.

        ``counter`` has counted that it was opened.
        """
        near = Side(client, client.fileno())
        near.other = far = Side(backend, backend.fileno(), near)
        sums = meter.opened(address)
        connection = TcpConnection(
            self.poller, self.pipes, near, far, self, address, meter, sums, counter
        )
        near.connection = far.connection = connection
        self._open.add(connection)
        self.observe("forwarded")
        if self._sweep is None:
            self._sweep = self.loop.call_later(SWEEP_SECONDS, self._look_after)
        return connection

    def pace(self, client: SocketType) -> None:
        """Have what is written to a client paced as is usual here, unless it is the node itself.

        Until now it was not: see ``listen``. Which pods are on this node is not known here.
        """
        if self.congestion is None:
            return
        with suppress(OSError):
            if origin_of(client.getpeername()[0], self.surroundings()) != "node":
                control_congestion(client.fileno(), self.congestion.usual)

    def parted(self, connection: "TcpConnection") -> None:
        """Take note that a connection is over."""
        self._open.discard(connection)
        if not self._open:
            self._over.set()
            self.pipes.close()
        self.observe("closed")

    def _look_at_dials(self) -> None:
        self._tick = None
        now = self.loop.time()
        try:
            for dial in [dial for dial in self._dials if dial.until <= now]:
                self._go_on(dial)
        finally:
            if self._dials and self._tick is None:
                self._tick = self.loop.call_later(TICK_SECONDS, self._look_at_dials)

    def _go_on(self, dial: Dialling) -> None:
        """Have a dial try again; one that stumbles loses its client, and no other does."""
        try:
            dial.late()
        except Exception as error:
            tell_of(error)
            if dial in self._dials:
                dial.give_up()

    def _look_after(self) -> None:
        """See that the kernel finds out when a backend is gone without a word.

        Most connections are over before they are seen here, and never pay for it.
        """
        for connection in self._open:
            if not connection.is_probed:
                connection.is_probed = True
                keep_alive(connection.far.sock)
        more = bool(self._open)
        self._sweep = self.loop.call_later(SWEEP_SECONDS, self._look_after) if more else None


class TcpConnection(Connection):
    """A connection, and to whom it goes."""

    relay: TcpRelay
    address: Address
    meter: Meter
    sums: Carried  # of what went to this address
    counter: Picker | None  # has counted that it was opened
    is_probed: bool = False  # the kernel looks whether the backend is still there

    def carried(self) -> Carried:
        return Carried(bytes_in=self.near.carried, bytes_out=self.far.carried)

    def lasts(self, side: Side) -> None:
        if side is self.near:
            self.relay.pace(side.sock)

    def closed(self) -> None:
        if self.counter is not None:
            self.counter.closed(self.address)
        sums = self.sums
        sums.bytes_in += self.near.carried
        sums.bytes_out += self.far.carried
        self.relay.parted(self)

    def given(self) -> Given:
        """Let go of it, for another process."""
        sockets = self.near.sock, self.far.sock
        is_broken = self.is_broken()
        near, far = self.release()
        return Given(self.address, near, far, is_broken, sockets)
