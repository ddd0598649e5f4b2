"""The UDP side of the userspace mode: one connected socket to a backend for each client.

A flow keeps its backend until it is idle for too long or the backend serves no more (kube-proxy:
stale conntrack entries are deleted, so that a client with a fixed port follows its Service).
"""

import asyncio
import logging
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any

from msgspec import Struct

from pyproxy.balancer import Picker
from pyproxy.model import Address, Forward
from pyproxy.proxier._sockets import EXHAUSTED, IP_PKTINFO
from pyproxy.rules.listeners import Listener, Surroundings, action_for

DATAGRAMS_AT_ONCE = 64
LARGEST = 65535
SWEEP_SECONDS = 1.0

log = logging.getLogger(__name__)

Peer = tuple[Any, ...]  # as the socket module gives it; the length differs by family
Key = tuple[Peer, bytes]  # the client, and the address it wrote to, packed
Observe = Callable[[str], None]


class IdleTimeouts(Struct, frozen=True):
    """Seconds that a flow may be silent: before, and after, its backend has answered."""

    unreplied: float = 30.0
    replied: float = 120.0


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
        self._flows: dict[int, Flow] = {}  # by identity, the longest silent first
        self._sweep: asyncio.TimerHandle | None = None

    @property
    def open_count(self) -> int:
        return len(self._flows)

    def add(self, flow: "Flow") -> None:
        self._flows[id(flow)] = flow
        if self._sweep is None:
            self._sweep = self.loop.call_later(SWEEP_SECONDS, self._expire)

    def discard(self, flow: "Flow") -> None:
        self._flows.pop(id(flow), None)

    def make_room(self) -> bool:
        """Close the flow that was silent longest; False if there is none."""
        oldest = min(self._flows.values(), key=lambda flow: flow.heard_at, default=None)
        if oldest is None:
            return False
        oldest.close()
        return True

    def close_all(self) -> None:
        for flow in list(self._flows.values()):
            flow.close()

    def _expire(self) -> None:
        now = self.loop.time()
        for flow in list(self._flows.values()):
            limit = self._timeouts.replied if flow.replied else self._timeouts.unreplied
            if now - flow.heard_at >= limit:
                flow.close()
        self._sweep = self.loop.call_later(SWEEP_SECONDS, self._expire) if self._flows else None


class Flow:
    """The datagrams between one client and its backend."""

    __slots__ = ("_front", "_key", "_sock", "backend", "heard_at", "replied")

    def __init__(self, front: "UdpFront", key: Key, sock: socket.socket, backend: Address) -> None:
        self._front = front
        self._key = key
        self._sock = sock
        self.backend = backend
        self.replied = False
        self.heard_at = front.relay.loop.time()
        front.relay.loop.add_reader(sock.fileno(), self._replies)
        front.relay.add(self)

    def send(self, data: bytes) -> None:
        self.heard_at = self._front.relay.loop.time()
        try:
            self._sock.send(data)
        except BlockingIOError:
            pass  # the queue is full: UDP loses it, as a network would
        except OSError:
            self.close()

    def close(self) -> None:
        if self._front.flows.pop(self._key, None) is None:
            return
        self._front.relay.discard(self)
        self._front.relay.loop.remove_reader(self._sock.fileno())
        self._sock.close()
        self._front.picker.closed(self.backend)
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
            self.replied = True
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
            sock.close()
        self.sockets.clear()

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
            flow = self.flows.get((peer, local)) or self._flow((peer, local))
            if flow is not None:
                flow.send(data)

    def _flow(self, key: Key) -> Flow | None:
        peer, _local = key
        action = action_for(self.listener.route, peer[0], self.relay.surroundings())
        if not isinstance(action, Forward):
            return None
        backend = self.picker.pick(action.pool, peer[0], self.relay.loop.time())
        sock = self._connected(backend)
        if sock is None:
            self.relay.observe("dial_failed")
            return None
        flow = self.flows[key] = Flow(self, key, sock, backend)
        self.picker.opened(backend)
        self.relay.observe("forwarded")
        return flow

    def _connected(self, backend: Address) -> socket.socket | None:
        family = socket.AF_INET6 if ":" in backend.ip else socket.AF_INET
        for _ in range(2):
            try:
                sock = socket.socket(family, socket.SOCK_DGRAM)
            except OSError as error:
                if error.errno in EXHAUSTED and self.relay.make_room():
                    continue
                return None
            try:
                sock.setblocking(False)
                sock.connect(backend)
            except OSError:
                sock.close()
                return None
            return sock
        return None


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
