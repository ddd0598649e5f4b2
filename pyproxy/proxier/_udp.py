"""The UDP side of the userspace mode: one connected socket to a backend for each client.

A flow keeps its backend until it is idle for too long or the backend serves no more (kube-proxy:
stale conntrack entries are deleted, so that a client with a fixed port follows its Service).
"""

import asyncio
import logging
import resource
import socket
from collections.abc import Callable, Collection, Iterable
from errno import EMSGSIZE
from heapq import nsmallest
from socket import SocketType

from msgspec import Struct

from pyproxy.balancer import NOBODY, Picker
from pyproxy.model import Address, Forward
from pyproxy.proxier._batch import Batch
from pyproxy.proxier._datagrams import Key, Peer, Requests, ancillary
from pyproxy.proxier._meter import Carried, Meter
from pyproxy.proxier._poller import IN, Poller
from pyproxy.proxier._sockets import EXHAUSTED, Shortage, answering, destination
from pyproxy.proxier._stream import Way, beside, strays
from pyproxy.proxier._transparent import Transparent, dress
from pyproxy.rules.listeners import Listener, Surroundings, action_for

DATAGRAMS_AT_ONCE = 64
LARGEST = 65535
SWEEP_SECONDS = 1.0
STREAM_SECONDS = 2.0  # a flow that lives longer than an exchange of this length is a stream
THICK = 16  # datagrams close after others, until a flow has a socket of its own
OWN_SHARE = 2  # one in so many flows may
FLOW_SHARE = 4  # flows may take one in so many file descriptors: connections need some too

log = logging.getLogger(__name__)

Observe = Callable[[str], None]


class IdleTimeouts(Struct, frozen=True):
    """Seconds that a flow may be silent, as in connection tracking.

    A flow is a stream when it is in use for some seconds and its backend has answered: one question
    with one answer is not.
    """

    single: float = 30.0
    stream: float = 120.0


class UdpRelay:
    """All UDP flows of one family."""

    def __init__(
        self,
        poller: Poller,
        surroundings: Callable[[], Surroundings],
        timeouts: IdleTimeouts,
        observe: Observe,
        transparent: Transparent | None = None,
    ) -> None:
        self.transparent = transparent
        self.loop = asyncio.get_running_loop()
        self.poller = poller
        self.surroundings = surroundings
        self.observe = observe
        self.batch = Batch()
        self.shortage = Shortage()
        self._timeouts = timeouts
        self._flows: set[Flow] = set()
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // FLOW_SHARE
        self._own_sockets_left = self._most // OWN_SHARE
        self._sweep: asyncio.TimerHandle | None = None

    @property
    def open_count(self) -> int:
        return len(self._flows)

    def add(self, flow: "Flow") -> None:
        self._flows.add(flow)
        if len(self._flows) > self._most:
            self._close_oldest()
        if self._sweep is None:
            self._sweep = self.loop.call_later(SWEEP_SECONDS, self._expire)

    def discard(self, flow: "Flow") -> None:
        self._flows.discard(flow)
        self._own_sockets_left += flow.has_own_socket

    def may_have_socket(self) -> bool:
        """Say whether one more flow may have a socket of its own, and count it."""
        may = self._own_sockets_left > 0
        self._own_sockets_left -= may
        return may

    def make_room(self, error: OSError) -> None:
        """Give file descriptors back, because there are none."""
        self.shortage.met(error, self.loop.time(), len(self._flows))
        self._close_oldest()

    def _close_oldest(self) -> None:
        """Close the flows that were silent longest; many at once, for finding them takes long."""
        count = len(self._flows) // 16 + 1
        for flow in nsmallest(count, self._flows, key=lambda flow: flow.heard_at):
            flow.close()

    def close_all(self) -> None:
        for flow in list(self._flows):
            flow.close()
        if self._sweep is not None:
            self._sweep.cancel()

    def _expire(self) -> None:
        now = self.loop.time()
        for flow in list(self._flows):
            limit = self._timeouts.stream if flow.is_stream() else self._timeouts.single
            if now - flow.heard_at >= limit:
                flow.close()
        self._sweep = self.loop.call_later(SWEEP_SECONDS, self._expire) if self._flows else None


class Flow:
    """The datagrams between one client and its backend."""

    __slots__ = (
        "_born_at",
        "_far",
        "_front",
        "_key",
        "_near",
        "_picker",
        "_replied",
        "_round",
        "_thick",
        "backend",
        "carried",
        "heard_at",
    )

    def __init__(self, front: "UdpFront", key: Key, sock: SocketType, backend: Address) -> None:
        self._front = front
        self._key = key
        self._far = sock
        self._near: SocketType | None = None  # of its own, if it has earned it
        self._picker = front.picker
        self._replied = False
        self._round = 0  # of the poller, when the last reply came
        self._thick = 0  # datagrams that came in one round with another
        self.backend = backend
        self.carried = Carried()
        self._born_at = self.heard_at = front.relay.loop.time()
        self._picker.opened(backend)
        front.meter.opened(backend)
        front.relay.poller.add(sock.fileno(), IN, self)
        front.relay.add(self)

    @property
    def has_own_socket(self) -> bool:
        return self._near is not None

    @property
    def client_ip(self) -> str:
        ip: str = self._key[0][0]
        return ip

    def is_stream(self) -> bool:
        return self._replied and self.heard_at - self._born_at > STREAM_SECONDS

    def send(self, data: bytes) -> bool:
        """Pass a datagram on; False, and the flow is closed, if its backend takes none."""
        self.heard()
        try:
            self._far.send(data)
            self._asked(1, len(data))
        except BlockingIOError:
            pass  # the queue is full: UDP loses it, as a network would
        except OSError as error:
            if error.errno != EMSGSIZE:  # that is about this datagram only
                self.close()
                return False
        return True

    def close(self) -> None:
        if self._front.flows.pop(self._key, None) is None:
            return
        relay = self._front.relay
        relay.discard(self)
        for sock in (self._far, self._near):
            if sock is not None:
                relay.poller.close_socket(sock)
        self._picker.closed(self.backend)
        self._front.meter.closed(self.backend, self.carried)
        relay.observe("closed")

    def ready(self, _events: int) -> None:
        """Pass on a reply; all there are if they come thick."""
        rounds = self._front.relay.poller.rounds
        at_once = DATAGRAMS_AT_ONCE if rounds == self._round + 1 else 1
        self._round = rounds
        self.replied()
        for count in range(at_once):
            try:
                data = self._far.recv(LARGEST)
            except BlockingIOError:
                return
            except OSError:  # port unreachable: the next datagram may find another backend
                self.close()
                return
            self._answered(1, len(data))
            self._front.reply(data, self._key)
            if count:
                self.thicken()

    def _asked(self, count: int, size: int) -> None:
        self.carried.packets_in += count
        self.carried.bytes_in += size

    def _answered(self, count: int, size: int) -> None:
        self.carried.packets_out += count
        self.carried.bytes_out += size

    def heard(self) -> None:
        self.heard_at = self._front.relay.loop.time()

    def replied(self) -> None:
        self._replied = True
        self.heard()

    def thicken(self) -> None:
        """Take note that a datagram came close after another; many are worth a socket."""
        self._thick += 1
        if self._thick == THICK and self._front.relay.may_have_socket():
            self._take_socket()

    def _take_socket(self) -> None:
        relay, front, key = self._front.relay, self._front, self._key
        try:
            near = beside(front.socket_of(key), front.local(key), key[0])
        except OSError as error:
            log.debug("no socket of its own", extra={"client": key[0][0], "error": str(error)})
            return
        self._near = near
        for data, peer in strays(near):
            front.pass_on(data, (peer, key[1]))
        if key not in front.flows:
            return  # one of them was refused
        poller, batch, refused = relay.poller, relay.batch, self._refused
        there = Way(poller, batch, near, self._far, self.heard, refused, self._asked)
        back = Way(poller, batch, self._far, near, self.replied, refused, self._answered)
        poller.add(near.fileno(), IN, there)
        poller.lead(self._far.fileno(), back)

    def _refused(self, sock: SocketType) -> None:
        if sock is self._far:  # a client that is gone for now may come back
            self.close()


class UdpFront:
    """One UDP frontend: its sockets and the flows that came in through them."""

    def __init__(
        self,
        relay: UdpRelay,
        sockets: Iterable[socket.socket],
        listener: Listener,
        picker: Picker,
        *,
        wildcard: bool,
    ) -> None:
        self.relay = relay
        self.sockets = list(sockets)
        self.listener = listener
        self.picker = picker
        self.flows: dict[Key, Flow] = {}
        self.meter = Meter()
        self._wildcard = wildcard
        self._by_local: dict[bytes, socket.socket] = {}
        self._answering: list[socket.socket] = []  # for datagrams that came by a shared socket
        for sock in self.sockets:
            relay.poller.add(
                sock.fileno(), IN, Requests(relay.poller, sock, self.received, wildcard=wildcard)
            )

    def update(self, listener: Listener, picker: Picker) -> None:
        """Treat new flows so from now on; end those whose backend serves no more.

        A flow with a socket of its own would also pass by the frontend's guard.
        """
        self.listener = listener
        self.picker = picker
        for flow in list(self.flows.values()):
            if flow.backend not in listener.serving or not self._admits(flow):
                flow.close()

    def close(self) -> None:
        for flow in list(self.flows.values()):
            flow.close()
        for sock in self.sockets:
            self.relay.poller.discard(sock.fileno())
        for sock in self.sockets + self._answering:
            sock.close()
        self.sockets.clear()
        self._answering.clear()
        self._by_local.clear()

    def socket_of(self, key: Key) -> socket.socket:
        """Return the socket that the client's datagrams come in by."""
        return self._by_local[key[1]]

    def local(self, key: Key) -> tuple[str, int]:
        """Return the address that the client writes to."""
        sock = self.socket_of(key)
        ip, port = sock.getsockname()[:2]
        return (socket.inet_ntop(sock.family, key[1]) if self._wildcard else ip), port

    def reply(self, data: bytes, key: Key) -> None:
        """Send to the client, from the address it wrote to."""
        peer, local = key
        sock = self._by_local[local]
        try:
            if self._wildcard:
                sock.sendmsg([data], [ancillary(sock, local)], 0, peer)
            else:
                sock.sendto(data, peer)
        except OSError as error:
            log.debug("reply lost", extra={"client": peer[0], "error": str(error)})

    def received(self, data: bytes, key: Key, sock: socket.socket, *, thick: bool) -> None:
        """Take a datagram that came in by ``sock``; ``thick`` if another came just before."""
        self._by_local[key[1]] = sock
        flow = self.pass_on(data, key)
        if thick and flow is not None:
            flow.thicken()

    def take(self, data: bytes, peer: Peer, local: bytes, *, thick: bool) -> None:
        """Take a datagram that came by a shared socket, to our address and port ``local``."""
        sock = self._by_local.get(local)
        if sock is None:
            try:
                sock = answering(*destination(local))
            except OSError as error:
                log.debug("datagram lost", extra={"client": peer[0], "error": str(error)})
                return
            self._answering.append(sock)
        self.received(data, (peer, local), sock, thick=thick)

    def pass_on(self, data: bytes, key: Key) -> Flow | None:
        """Send to the backend of the flow. If that has refused an earlier datagram, to another."""
        flow = self.flows.get(key) or self._flow(key)
        if flow is not None and not flow.send(data):
            flow = self._flow(key, avoid={flow.backend})
            if flow is not None:
                flow.send(data)
        return flow

    def _admits(self, flow: Flow) -> bool:
        if not flow.has_own_socket:
            return True
        action = action_for(self.listener.route, flow.client_ip, self.relay.surroundings())
        return isinstance(action, Forward)

    def _flow(self, key: Key, avoid: Collection[Address] = NOBODY) -> Flow | None:
        peer, _local = key
        action = action_for(self.listener.route, peer[0], self.relay.surroundings())
        if not isinstance(action, Forward):
            return None
        backend = self.picker.pick(action.pool, peer[0], self.relay.loop.time(), avoid)
        sock = self._connected(backend, self._name_for(peer[0], action, backend))
        if sock is None:
            self.relay.observe("dial_failed")
            return None
        self.relay.shortage.passed(self.relay.loop.time())
        flow = self.flows[key] = Flow(self, key, sock, backend)
        self.relay.observe("forwarded")
        return flow

    def _name_for(self, ip: str, action: Forward, backend: Address) -> str | None:
        """Return the address that the backend shall see; None for this node's."""
        transparent = self.relay.transparent
        if transparent is None:
            return None
        return ip if transparent.keeps(action, ip, backend, self.relay.loop.time()) else None

    def _connected(self, backend: Address, name: str | None) -> SocketType | None:
        family = socket.AF_INET6 if ":" in backend.ip else socket.AF_INET
        for _ in range(2):
            try:
                sock = SocketType(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 0)
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self.relay.make_room(error)
                    continue
                return None
            try:
                if name is not None:
                    dress(sock, name)
                sock.connect(backend)
            except OSError:
                sock.close()
                return None
            return sock
        return None
