"""UDP flows: one connected socket to a backend for each client of a frontend.

A flow keeps its backend until it is idle for too long or the backend serves no more (kube-proxy:
stale conntrack entries are deleted, so that a client with a fixed port follows its Service).
"""

import asyncio
import logging
import resource
from collections.abc import Callable
from errno import EMSGSIZE
from heapq import nsmallest
from socket import SocketType
from typing import TYPE_CHECKING

from msgspec import Struct

from pyproxy.model import Address
from pyproxy.proxier._batch import Batch
from pyproxy.proxier._datagrams import Key
from pyproxy.proxier._given import GivenFlow
from pyproxy.proxier._meter import Carried
from pyproxy.proxier._poller import IN, Poller
from pyproxy.proxier._sockets import Shortage
from pyproxy.proxier._stream import Way, beside, strays
from pyproxy.proxier._transparent import Transparent
from pyproxy.rules.listeners import Surroundings

if TYPE_CHECKING:  # it makes flows
    from pyproxy.proxier._udp import UdpFront

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
        self.taken: dict[Key, Flow] = {}  # those whose datagrams come by a shared socket
        self._timeouts = timeouts
        self._flows: set[Flow] = set()
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // FLOW_SHARE
        self._own_sockets_left = self._most // OWN_SHARE
        self._sweep: asyncio.TimerHandle | None = None

    @property
    def open_count(self) -> int:
        return len(self._flows)

    def add(self, flow: "Flow") -> None:
        if len(self._flows) >= self._most:
            self._close_oldest()
        self._flows.add(flow)
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
        for flow in nsmallest(count, self._flows, key=Flow.heard_in):
            flow.close()

    def close_all(self) -> None:
        for flow in list(self._flows):
            flow.close()
        if self._sweep is not None:
            self._sweep.cancel()

    def _expire(self) -> None:
        now = self.loop.time()
        for flow in list(self._flows):
            flow.notice(now)
            limit = self._timeouts.stream if flow.is_stream() else self._timeouts.single
            if now - flow.heard_at >= limit:
                flow.close()
        self._sweep = self.loop.call_later(SWEEP_SECONDS, self._expire) if self._flows else None


class Flow:
    """The datagrams between one client and its backend."""

    __slots__ = (
        "_answered_in",
        "_asked_in",
        "_born_at",
        "_far",
        "_front",
        "_key",
        "_near",
        "_packets",
        "_picker",
        "_poller",
        "_replied",
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
        self._poller = front.relay.poller
        self._replied = False  # while another process had it
        self._packets = 0  # of both directions, when it was looked at last
        self._asked_in = 0  # round of the poller with the last datagram, likewise of the backend
        self._answered_in = 0
        self._thick = 0  # datagrams that came in one round with another
        self.backend = backend
        self.carried = Carried()
        self._born_at = self.heard_at = front.relay.loop.time()
        self._picker.opened(backend)
        front.meter.opened(backend)
        front.relay.poller.add(sock.fileno(), IN, self)
        front.know(key, self)
        front.relay.add(self)

    @property
    def has_own_socket(self) -> bool:
        return self._near is not None

    @property
    def client_ip(self) -> str:
        ip: str = self._key[0][0]
        return ip

    def notice(self, now: float) -> None:
        """Take note of whether something was heard of it since it was looked at last.

        Nobody looks at the clock for each datagram, so that ``heard_at`` may be late by one sweep.
        """
        carried = self.carried
        packets = carried.packets_in + carried.packets_out
        if packets != self._packets:
            self._packets = packets
            self.heard_at = now

    def heard_in(self) -> int:
        """Return the round of the poller in which something was heard of it last."""
        return max(self._asked_in, self._answered_in)

    def is_stream(self) -> bool:
        return self._has_replied() and self.heard_at - self._born_at > STREAM_SECONDS

    def _has_replied(self) -> bool:
        return self._replied or self.carried.packets_out > 0

    def send(self, data: bytes) -> bool:
        """Pass a datagram on; False, and the flow is closed, if its backend takes none."""
        try:
            self._far.send(data)
        except BlockingIOError:
            return True  # the queue is full: UDP loses it, as a network would
        except OSError as error:
            if error.errno == EMSGSIZE:  # that is about this datagram only
                return True
            self.close()
            return False
        came_close = self._asked_in == self._poller.rounds
        self._asked(1, len(data))
        if came_close:
            self._thicken()
        return True

    def pass_on(self, data: bytes) -> None:
        """Pass a datagram on; if the backend takes none, begin anew with another."""
        if not self.send(data):
            self._front.begin(data, self._key, {self.backend})

    def close(self) -> None:
        if not self._front.forget(self._key):
            return
        for sock in (self._far, self._near):
            if sock is not None:
                self._front.relay.poller.close_sockets(sock)
        self._over()

    def given(self) -> GivenFlow:
        """Let go of it, for another process."""
        front, now = self._front, self._front.relay.loop.time()
        front.forget(self._key)
        self.notice(now)
        for sock in (self._far, self._near):
            if sock is not None:
                front.relay.poller.discard(sock.fileno())
        self._over()
        ages = now - self._born_at, now - self.heard_at
        client, local = self._key[0], Address(*front.local(self._key))
        return GivenFlow(
            client, local, self.backend, self._has_replied(), ages, self._far, self._near
        )

    def resume(self, given: GivenFlow) -> None:
        """Go on as the flow was that another process has given."""
        self._replied = given.replied
        self._born_at -= given.ages[0]
        self.heard_at -= given.ages[1]
        if given.near is not None and self._front.relay.may_have_socket():
            self._join(given.near)
        elif given.near is not None:
            given.near.close()

    def _over(self) -> None:
        relay = self._front.relay
        relay.discard(self)
        self._picker.closed(self.backend)
        self._front.meter.closed(self.backend, self.carried)
        relay.observe("closed")

    def ready(self, _events: int) -> None:
        """Pass on a reply; all there are if they come thick."""
        at_once = DATAGRAMS_AT_ONCE if self._poller.rounds == self._answered_in + 1 else 1
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
                self._thicken()

    def _asked(self, count: int, size: int) -> None:
        self._asked_in = self._poller.rounds
        self.carried.packets_in += count
        self.carried.bytes_in += size

    def _answered(self, count: int, size: int) -> None:
        self._answered_in = self._poller.rounds
        self.carried.packets_out += count
        self.carried.bytes_out += size

    def _thicken(self) -> None:
        """Take note that a datagram came close after another; many are worth a socket."""
        self._thick += 1
        if self._thick == THICK and self._front.relay.may_have_socket():
            self._take_socket()

    def _take_socket(self) -> None:
        front, key = self._front, self._key
        try:
            near = beside(front.socket_of(key), front.local(key), key[0])
        except OSError as error:
            log.debug("no socket of its own", extra={"client": key[0][0], "error": str(error)})
            return
        self._near = near
        for data, peer in strays(near):
            front.pass_on(data, (peer, key[1]))
        if front.flows.get(key) is self:  # else one of them was refused
            self._join(near)

    def _join(self, near: SocketType) -> None:
        """Move datagrams between both sockets from now on."""
        self._near, relay = near, self._front.relay
        poller, batch, refused = relay.poller, relay.batch, self._refused
        there = Way(poller, batch, near, self._far, refused, self._asked)
        back = Way(poller, batch, self._far, near, refused, self._answered)
        poller.add(near.fileno(), IN, there)
        poller.lead(self._far.fileno(), back)

    def _refused(self, sock: SocketType) -> None:
        if sock is self._far:  # a client that is gone for now may come back
            self.close()
