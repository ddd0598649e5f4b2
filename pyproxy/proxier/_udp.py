"""The UDP side of the userspace mode: one connected socket to a backend for each client.

A flow keeps its backend until it is idle for too long or the backend serves no more (kube-proxy:
stale conntrack entries are deleted, so that a client with a fixed port follows its Service).
"""

import asyncio
import logging
import resource
import socket
import struct
from collections.abc import Callable, Collection, Iterable
from errno import EMSGSIZE
from heapq import nsmallest
from typing import Any

from msgspec import Struct

from pyproxy.balancer import NOBODY, Picker
from pyproxy.model import Address, Forward
from pyproxy.proxier._sockets import (
    EXHAUSTED,
    IP_PKTINFO,
    Shortage,
    answering,
    destination,
    original_destination,
)
from pyproxy.rules.listeners import Listener, Surroundings, action_for

DATAGRAMS_AT_ONCE = 64
LARGEST = 65535
SWEEP_SECONDS = 1.0
STREAM_SECONDS = 2.0  # a flow that lives longer than an exchange of this length is a stream
FLOW_SHARE = 4  # flows may take one in so many file descriptors: connections need some too

log = logging.getLogger(__name__)

Peer = tuple[Any, ...]  # as the socket module gives it; the length differs by family
Key = tuple[Peer, bytes]  # the client, and the address it wrote to, packed
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
        surroundings: Callable[[], Surroundings],
        timeouts: IdleTimeouts,
        observe: Observe,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.surroundings = surroundings
        self.observe = observe
        self._timeouts = timeouts
        self._flows: set[Flow] = set()
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // FLOW_SHARE
        self.shortage = Shortage()
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
        "_front",
        "_key",
        "_picker",
        "_replied",
        "_sock",
        "backend",
        "heard_at",
    )

    def __init__(self, front: "UdpFront", key: Key, sock: socket.socket, backend: Address) -> None:
        self._front = front
        self._key = key
        self._sock = sock
        self._picker = front.picker
        self._replied = False
        self.backend = backend
        self._born_at = self.heard_at = front.relay.loop.time()
        self._picker.opened(backend)
        front.relay.loop.add_reader(sock.fileno(), self._replies)
        front.relay.add(self)

    def is_stream(self) -> bool:
        return self._replied and self.heard_at - self._born_at > STREAM_SECONDS

    def send(self, data: bytes) -> bool:
        """Pass a datagram on; False, and the flow is closed, if its backend takes none."""
        self.heard_at = self._front.relay.loop.time()
        try:
            self._sock.send(data)
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
        self._front.relay.discard(self)
        self._front.relay.loop.remove_reader(self._sock.fileno())
        self._sock.close()
        self._picker.closed(self.backend)
        self._front.relay.observe("closed")

    def _replies(self) -> None:
        for _ in range(DATAGRAMS_AT_ONCE):
            try:
                data = self._sock.recv(LARGEST)
            except BlockingIOError:
                return
            except OSError:  # port unreachable: the next datagram may find another backend
                self.close()
                return
            self._replied = True
            self.heard_at = self._front.relay.loop.time()
            self._front.reply(data, self._key)


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
        self._wildcard = wildcard
        self._by_local: dict[bytes, socket.socket] = {}
        self._answering: list[socket.socket] = []  # for datagrams that came by a shared socket
        for sock in self.sockets:
            relay.loop.add_reader(sock.fileno(), self._requests, sock)

    def update(self, listener: Listener, picker: Picker) -> None:
        """Treat new flows so from now on; end those whose backend serves no more."""
        self.listener = listener
        self.picker = picker
        for flow in [f for f in self.flows.values() if f.backend not in listener.serving]:
            flow.close()

    def close(self) -> None:
        for flow in list(self.flows.values()):
            flow.close()
        for sock in self.sockets:
            self.relay.loop.remove_reader(sock.fileno())
        for sock in self.sockets + self._answering:
            sock.close()
        self.sockets.clear()
        self._answering.clear()
        self._by_local.clear()

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

    def _requests(self, sock: socket.socket) -> None:
        for _ in range(DATAGRAMS_AT_ONCE):
            try:
                if self._wildcard:
                    data, extra, _flags, peer = sock.recvmsg(LARGEST, 256)
                    local = local_address(extra)
                else:
                    data, peer = sock.recvfrom(LARGEST)
                    local = b"%d" % sock.fileno()
            except BlockingIOError:
                return
            except OSError as error:  # an ICMP error for an earlier reply
                log.debug("receive failed", extra={"error": str(error)})
                continue
            self._by_local[local] = sock
            self._pass_on(data, (peer, local))

    def take(self, data: bytes, peer: Peer, local: bytes) -> None:
        """Pass on a datagram that came by a shared socket, to our address and port ``local``."""
        if local not in self._by_local:
            try:
                sock = answering(*destination(local))
            except OSError as error:
                log.debug("datagram lost", extra={"client": peer[0], "error": str(error)})
                return
            self._by_local[local] = sock
            self._answering.append(sock)
        self._pass_on(data, (peer, local))

    def _pass_on(self, data: bytes, key: Key) -> None:
        """Send to the backend of the flow. If that has refused an earlier datagram, to another."""
        flow = self.flows.get(key) or self._flow(key)
        if flow is not None and not flow.send(data):
            flow = self._flow(key, avoid={flow.backend})
            if flow is not None:
                flow.send(data)

    def _flow(self, key: Key, avoid: Collection[Address] = NOBODY) -> Flow | None:
        peer, _local = key
        action = action_for(self.listener.route, peer[0], self.relay.surroundings())
        if not isinstance(action, Forward):
            return None
        backend = self.picker.pick(action.pool, peer[0], self.relay.loop.time(), avoid)
        sock = self._connected(backend)
        if sock is None:
            self.relay.observe("dial_failed")
            return None
        self.relay.shortage.passed(self.relay.loop.time())
        flow = self.flows[key] = Flow(self, key, sock, backend)
        self.relay.observe("forwarded")
        return flow

    def _connected(self, backend: Address) -> socket.socket | None:
        family = socket.AF_INET6 if ":" in backend.ip else socket.AF_INET
        for _ in range(2):
            try:
                sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self.relay.make_room(error)
                    continue
                return None
            try:
                sock.connect(backend)
            except OSError:
                sock.close()
                return None
            return sock
        return None


class Datagrams:
    """Those that come by a shared socket: each is given to the frontend it is for."""

    def __init__(
        self, relay: UdpRelay, sock: socket.socket, front_of: Callable[[bytes], UdpFront | None]
    ) -> None:
        self._relay = relay
        self._sock = sock
        self._front_of = front_of
        relay.loop.add_reader(sock.fileno(), self._take)

    def close(self) -> None:
        self._relay.loop.remove_reader(self._sock.fileno())

    def _take(self) -> None:
        for _ in range(DATAGRAMS_AT_ONCE):
            try:
                data, extra, _flags, peer = self._sock.recvmsg(LARGEST, 256)
            except BlockingIOError:
                return
            except OSError as error:
                log.debug("receive failed", extra={"error": str(error)})
                continue
            local = original_destination(extra)
            front = self._front_of(local)
            if front is not None:
                front.take(data, peer, local)


def local_address(extra: list[tuple[int, int, bytes]]) -> bytes:
    """Return the packed address a datagram was sent to, out of its ancillary data."""
    for level, kind, data in extra:
        if level == socket.IPPROTO_IP and kind == IP_PKTINFO:
            return data[8:12]  # struct in_pktinfo: interface, local address, header's destination
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            return data[:16]  # struct in6_pktinfo: address, interface
    return b""


def ancillary(sock: socket.socket, local: bytes) -> tuple[int, int, bytes]:
    """Return the ancillary data that makes a datagram come from ``local``."""
    if sock.family == socket.AF_INET6:
        return socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, local + struct.pack("=I", 0)
    return socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=i", 0) + local + bytes(4)
