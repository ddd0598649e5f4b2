"""Reads what clients write to the UDP sockets of frontends."""

import logging
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pyproxy.proxier._poller import IN, Poller
from pyproxy.proxier._sockets import IP_PKTINFO, original_destination

AT_ONCE = 64
LARGEST = 65535

log = logging.getLogger(__name__)

Peer = tuple[Any, ...]  # as the socket module gives it; the length differs by family
Key = tuple[Peer, bytes]  # the client, and the address it wrote to, packed


class Flow(Protocol):
    """Takes the datagrams of one client for one address."""

    def pass_on(self, data: bytes, /) -> None: ...


class Taker(Protocol):
    """Takes the first datagram of a flow, which came by a socket that others use, too."""

    def take(self, data: bytes, key: Key, /) -> None: ...


class Reader:
    """One datagram at a time; all there are if they come so thick that each round finds some."""

    __slots__ = ("_flows", "_poller", "_round", "_sock")

    def __init__(self, poller: Poller, sock: socket.socket, flows: Mapping[Key, Flow]) -> None:
        """``flows`` are those that exist by now."""
        self._poller = poller
        self._sock = sock
        self._flows = flows
        self._round = 0  # of the poller, when something came last

    def ready(self, _events: int) -> None:
        rounds = self._poller.rounds
        at_once = AT_ONCE if rounds == self._round + 1 else 1
        self._round = rounds
        for _ in range(at_once):
            try:
                data, key = self._received()
            except BlockingIOError:
                return
            except OSError as error:  # an ICMP error for an earlier reply
                log.debug("receive failed", extra={"error": str(error)})
                continue
            flow = self._flows.get(key)
            if flow is None:
                self._begin(data, key)
            else:
                flow.pass_on(data)

    def _received(self) -> tuple[bytes, Key]:
        raise NotImplementedError

    def _begin(self, data: bytes, key: Key) -> None:
        raise NotImplementedError


class Requests(Reader):
    """What comes by a socket that a frontend has for itself."""

    __slots__ = ("_number", "_took", "_wildcard")

    def __init__(
        self,
        poller: Poller,
        sock: socket.socket,
        flows: Mapping[Key, Flow],
        took: Callable[[bytes, Key, socket.socket], None],
        *,
        wildcard: bool,
    ) -> None:
        """``took`` hears of the first datagram of a flow."""
        super().__init__(poller, sock, flows)
        self._took = took
        self._number = own_number(sock)
        self._wildcard = wildcard

    def _received(self) -> tuple[bytes, Key]:
        if self._wildcard:
            data, extra, _flags, peer = self._sock.recvmsg(LARGEST, 256)
            return data, (peer, local_address(extra))
        data, peer = self._sock.recvfrom(LARGEST)
        return data, (peer, self._number)

    def _begin(self, data: bytes, key: Key) -> None:
        self._took(data, key, self._sock)


class Datagrams(Reader):
    """What comes by the socket of all frontends: each is given to the one it is for."""

    __slots__ = ("_front_of",)

    def __init__(
        self,
        poller: Poller,
        sock: socket.socket,
        flows: Mapping[Key, Flow],
        front_of: Callable[[bytes], Taker | None],
    ) -> None:
        super().__init__(poller, sock, flows)
        self._front_of = front_of
        poller.add(sock.fileno(), IN, self)

    def close(self) -> None:
        self._poller.discard(self._sock.fileno())

    def _received(self) -> tuple[bytes, Key]:
        data, extra, _flags, peer = self._sock.recvmsg(LARGEST, 256)
        return data, (peer, original_destination(extra))

    def _begin(self, data: bytes, key: Key) -> None:
        front = self._front_of(key[1])
        if front is not None:
            front.take(data, key)


def own_number(sock: socket.socket) -> bytes:
    """Return what stands for the address of a socket that has one."""
    return b"%d" % sock.fileno()


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
