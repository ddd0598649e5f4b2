"""Takes in the clients of TCP frontends."""

import socket
from collections.abc import Iterable
from socket import SocketType
from typing import Protocol

from pyproxy.balancer import Picker
from pyproxy.model import Action, Reject
from pyproxy.proxier._dial import PAUSE_SECONDS, Dial, Front
from pyproxy.proxier._meter import Meter
from pyproxy.proxier._poller import IN
from pyproxy.proxier._sockets import control_congestion, reset
from pyproxy.proxier._tcp import TcpRelay
from pyproxy.rules.listeners import Listener, Surroundings, action_for, action_for_all

AT_ONCE = 64


class Entrance(Protocol):
    """Listening sockets, and which frontend a client wants who came in by one of them."""

    sockets: list[socket.socket]

    def front_of(self, client: SocketType) -> Front | None: ...


def listen(relay: TcpRelay, sock: socket.socket, entrance: Entrance) -> None:
    """Accept from now on, until the socket is not one of the entrance's any more.

    Clients inherit how congestion is controlled. One from elsewhere gets what is usual at the
    second write to it; until then nothing is paced.
    """
    if relay.congestion is not None:
        control_congestion(sock.fileno(), relay.congestion.local)
    relay.poller.add(sock.fileno(), IN, Acceptor(relay, sock, entrance))


def unlisten(relay: TcpRelay, sock: socket.socket) -> None:
    """Stop accepting; who waits in the backlog is still served."""
    relay.poller.discard(sock.fileno())


class Acceptor:
    """Takes in those who connect to a listening socket."""

    __slots__ = ("_entrance", "_family", "_relay", "_round", "_sock")

    def __init__(self, relay: TcpRelay, sock: socket.socket, entrance: Entrance) -> None:
        self._relay = relay
        self._sock = sock
        self._entrance = entrance
        self._family = sock.family
        self._round = 0  # of the poller, when somebody was accepted last

    def ready(self, _events: int) -> None:
        """Accept one client; many if they come so thick that they are met round after round."""
        relay = self._relay
        rounds = relay.poller.rounds
        is_busy = rounds == self._round + 1
        self._round = rounds
        relay.is_crowded = is_busy
        for _ in range(AT_ONCE if is_busy else 1):
            if relay.starving:
                self._pause()
                return
            try:
                # accept() would ask twice for what is known.
                fd, peer = self._sock._accept()  # type: ignore[attr-defined]
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                relay.refused(error)
                self._pause()
                return
            client = SocketType(self._family, socket.SOCK_STREAM, 0, fd)
            front = self._entrance.front_of(client)
            if front is None:
                reset(client)
            else:
                Dial(relay, front, client, peer[0]).begin()

    def _pause(self) -> None:
        """Leave the backlog alone for a while: an unreadable listener would spin the loop."""
        unlisten(self._relay, self._sock)
        self._relay.loop.call_later(PAUSE_SECONDS, self._resume)

    def _resume(self) -> None:
        if self._sock.fileno() >= 0 and self._sock in self._entrance.sockets:
            listen(self._relay, self._sock, self._entrance)


class TcpFront:
    """One TCP frontend: what is to happen to who connects, and its own sockets, if it has any."""

    listener: Listener
    picker: Picker
    always: Action | None

    def __init__(
        self, relay: TcpRelay, sockets: Iterable[socket.socket], listener: Listener, picker: Picker
    ) -> None:
        self.is_open = True
        self.sockets = list(sockets)
        self.meter = Meter()
        self._relay = relay
        self.update(listener, picker)
        for sock in self.sockets:
            listen(relay, sock, self)

    def action(self, ip: str, around: Surroundings) -> Action:
        """Return what becomes of a connection from ``ip``. One that is closed serves nobody."""
        return action_for(self.listener.route, ip, around) if self.is_open else Reject()

    def front_of(self, _client: SocketType) -> "TcpFront":
        return self

    def update(self, listener: Listener, picker: Picker) -> None:
        """Treat new connections so from now on; those that exist are left alone."""
        self.listener = listener
        self.picker = picker
        self.always = action_for_all(listener.route)

    def close(self) -> None:
        self.is_open = False
        self.always = None
        sockets, self.sockets = self.sockets, []
        for sock in sockets:
            unlisten(self._relay, sock)
            sock.close()
