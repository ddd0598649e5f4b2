"""Reads what clients write to the UDP sockets of frontends."""

import logging
import socket
import struct
from collections.abc import Callable
from typing import Any, Protocol

from pyproxy.proxier._poller import IN, Poller
from pyproxy.proxier._sockets import IP_PKTINFO, original_destination

AT_ONCE = 64
LARGEST = 65535

log = logging.getLogger(__name__)

Peer = tuple[Any, ...]  # as the socket module gives it; the length differs by family
Key = tuple[Peer, bytes]  # the client, and the address it wrote to, packed


class Received(Protocol):
    """Takes a datagram; ``thick`` says that its flow had another one just before."""

    def __call__(self, data: bytes, key: Key, sock: socket.socket, /, *, thick: bool) -> None: ...


class Taker(Protocol):
    """Takes a datagram likewise, that came by a socket which is not its own."""

    def take(self, data: bytes, peer: Peer, local: bytes, /, *, thick: bool) -> None: ...


class Reader:
    """One datagram at a time; all there are if they come so thick that each round finds some."""

    __slots__ = ("_poller", "_round", "_sock")

    def __init__(self, poller: Poller, sock: socket.socket) -> None:
        self._poller = poller
        self._sock = sock
        self._round = 0  # of the poller, when something came last

    def ready(self, _events: int) -> None:
        rounds = self._poller.rounds
        at_once = AT_ONCE if rounds == self._round + 1 else 1
        self._round = rounds
        seen: set[Key] = set()
        for _ in range(at_once):
            try:
                data, key = self._received()
            except BlockingIOError:
                return
            except OSError as error:  # an ICMP error for an earlier reply
                log.debug("receive failed", extra={"error": str(error)})
                continue
            self._give(data, key, thick=key in seen)
            seen.add(key)

    def _received(self) -> tuple[bytes, Key]:
        raise NotImplementedError

    def _give(self, data: bytes, key: Key, *, thick: bool) -> None:
        raise NotImplementedError


class Requests(Reader):
    """What comes by a socket that a frontend has for itself."""

    __slots__ = ("_give_to", "_number", "_wildcard")

    def __init__(
        self, poller: Poller, sock: socket.socket, received: Received, *, wildcard: bool
    ) -> None:
        super().__init__(poller, sock)
        self._give_to = received
        self._number = own_number(sock)
        self._wildcard = wildcard

    def _received(self) -> tuple[bytes, Key]:
        if self._wildcard:
            data, extra, _flags, peer = self._sock.recvmsg(LARGEST, 256)
            return data, (peer, local_address(extra))
        data, peer = self._sock.recvfrom(LARGEST)
        return data, (peer, self._number)

    def _give(self, data: bytes, key: Key, *, thick: bool) -> None:
        self._give_to(data, key, self._sock, thick=thick)


class Datagrams(Reader):
    """What comes by the socket of all frontends: each is given to the one it is for."""

    __slots__ = ("_front_of",)

    def __init__(
        self, poller: Poller, sock: socket.socket, front_of: Callable[[bytes], Taker | None]
    ) -> None:
        super().__init__(poller, sock)
        self._front_of = front_of
        poller.add(sock.fileno(), IN, self)

    def close(self) -> None:
        self._poller.discard(self._sock.fileno())

    def _received(self) -> tuple[bytes, Key]:
        data, extra, _flags, peer = self._sock.recvmsg(LARGEST, 256)
        return data, (peer, original_destination(extra))

    def _give(self, data: bytes, key: Key, *, thick: bool) -> None:
        peer, local = key
        front = self._front_of(local)
        if front is not None:
            front.take(data, peer, local, thick=thick)


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
