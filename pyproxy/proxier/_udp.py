"""The UDP side of the userspace mode: frontends, and which flow a datagram belongs to."""

import logging
import socket
from collections.abc import Collection, Iterable
from socket import SocketType

from pyproxy.balancer import NOBODY, Picker
from pyproxy.host import EXHAUSTED
from pyproxy.model import Address, Forward
from pyproxy.proxier._datagrams import Key, Requests, ancillary, own_number
from pyproxy.proxier._flow import Flow, UdpRelay
from pyproxy.proxier._given import GivenFlow
from pyproxy.proxier._meter import Meter
from pyproxy.proxier._poller import IN
from pyproxy.proxier._sockets import answering, destination, original
from pyproxy.proxier._transparent import Guise, dress
from pyproxy.rules.listeners import Listener, action_for
from pyproxy.rules.nft import packed_ip

log = logging.getLogger(__name__)


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
                sock.fileno(),
                IN,
                Requests(relay.poller, sock, self.flows, self._took, wildcard=wildcard),
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

    def stop_reading(self) -> None:
        """Let datagrams wait in our own sockets, for a successor has them too."""
        for sock in self.sockets:
            self.relay.poller.discard(sock.fileno())

    def give_flows(self) -> list[GivenFlow]:
        """Let go of all flows, for another process."""
        return [flow.given() for flow in list(self.flows.values())]

    def take_flow(self, given: GivenFlow) -> None:
        """Go on with a flow that another process has given, if it may still be."""
        local = self._local_of(given.local)
        ip = str(given.client[0])
        action = action_for(self.listener.route, ip, self.relay.surroundings())
        if local is None or not isinstance(action, Forward):
            given.close()
            return
        if given.backend not in self.listener.serving:
            given.close()
            return
        key = (given.client, local)
        anew = self.flows.get(key) or self.relay.taken.get(key)
        if anew is not None:  # it has begun again meanwhile
            anew.close()
        flow = Flow(self, key, given.far, given.backend)
        self.relay.observe("forwarded")
        flow.resume(given)

    def _local_of(self, local: Address) -> bytes | None:
        """Return what a key has for an address of ours, and remember the socket to it."""
        if not self.sockets:
            packed = original(local)
            sock = self._by_local.get(packed) or self._answering_at(packed)
            return packed if sock is not None else None
        if self._wildcard:
            packed, sock = packed_ip(local.ip), self.sockets[0]
        else:
            found = [s for s in self.sockets if s.getsockname()[0] == local.ip]
            if not found:
                return None
            packed, sock = own_number(found[0]), found[0]
        self._by_local[packed] = sock
        return packed

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

    def _took(self, data: bytes, key: Key, sock: socket.socket) -> None:
        """Begin a flow with a datagram that came in by ``sock``."""
        self._by_local[key[1]] = sock
        self.begin(data, key)

    def take(self, data: bytes, key: Key) -> None:
        """Begin a flow with a datagram that came by a shared socket."""
        if key[1] in self._by_local or self._answering_at(key[1]) is not None:
            self.begin(data, key)

    def _answering_at(self, local: bytes) -> socket.socket | None:
        """Return a new socket that answers from our address and port ``local``."""
        try:
            sock = answering(*destination(local))
        except OSError as error:
            fields = {"local": str(destination(local)), "error": str(error)}
            log.debug("no socket to answer by", extra=fields)
            return None
        self._answering.append(sock)
        self._by_local[local] = sock
        return sock

    def pass_on(self, data: bytes, key: Key) -> None:
        """Send to the backend of a flow, which may begin with it."""
        flow = self.flows.get(key)
        if flow is None:
            self.begin(data, key)
        else:
            flow.pass_on(data)

    def begin(self, data: bytes, key: Key, avoid: Collection[Address] = NOBODY) -> None:
        """Begin a flow with a datagram, or anew if there are backends to avoid.

        If the backend refuses it, another is tried, and then no more.
        """
        flow = self._flow(key, avoid)
        if flow is None:
            return
        if avoid:
            flow.send(data)
        else:
            flow.pass_on(data)

    def know(self, key: Key, flow: Flow) -> None:
        """Have the datagrams of this client be those of a flow."""
        self.flows[key] = flow
        if not self.sockets:
            self.relay.taken[key] = flow

    def forget(self, key: Key) -> bool:
        """Have them be nobody's; say whether they were somebody's."""
        if not self.sockets:
            self.relay.taken.pop(key, None)
        return self.flows.pop(key, None) is not None

    def _admits(self, flow: Flow) -> bool:
        if not flow.has_own_socket:
            return True
        action = action_for(self.listener.route, flow.client_ip, self.relay.surroundings())
        return isinstance(action, Forward)

    def _flow(self, key: Key, avoid: Collection[Address]) -> Flow | None:
        peer, _local = key
        action = action_for(self.listener.route, peer[0], self.relay.surroundings())
        if not isinstance(action, Forward):
            return None
        now = self.relay.loop.time()
        backend = self.picker.pick(action.pool, peer[0], now, avoid).address
        sock = self._connected(backend, self._guise(peer[0], action, backend))
        if sock is None:
            self.relay.observe("dial_failed")
            return None
        self.relay.shortage.passed(now)
        self.relay.observe("forwarded")
        return Flow(self, key, sock, backend)

    def _guise(self, ip: str, action: Forward, backend: Address) -> Guise | None:
        transparent = self.relay.transparent
        if transparent is None:
            return None
        return transparent.guise(action, ip, backend, self.relay.loop.time())

    def _connected(self, backend: Address, guise: Guise | None) -> SocketType | None:
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
                if guise is not None:
                    dress(sock, guise)
                sock.connect(backend)
            except OSError:
                sock.close()
                return None
            return sock
        return None
