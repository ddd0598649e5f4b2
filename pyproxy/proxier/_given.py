"""What one process gives to another: sockets, connections and flows, as messages with descriptors.

A message is bytes and the file descriptors that belong to them; the kernel passes both over a
Unix socket (``SCM_RIGHTS``).
"""

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from socket import SocketType
from types import MappingProxyType
from typing import BinaryIO, NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from pyproxy.model import Address, Proto
from pyproxy.proxier._relay import Held
from pyproxy.proxier._sockets import Shared

AT_ONCE = 50  # sockets or connections in a message: the kernel passes 253 descriptors at a time

T = TypeVar("T")

Parcel = tuple[bytes, list[int]]


class Given(Struct, frozen=True):
    """A connection that changes hands, with both its sockets."""

    backend: Address
    near: Held
    far: Held
    broken: bool
    sockets: tuple[SocketType, SocketType]  # of the client, of the backend

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


class GivenFlow(Struct, frozen=True):
    """A flow of datagrams that changes hands."""

    client: tuple[str | int, ...]  # as the socket module has it
    local: Address  # where the client writes to
    backend: Address
    replied: bool
    ages: tuple[float, float]  # seconds since it began, and since something was heard of it
    far: SocketType  # of the backend
    near: SocketType | None  # of the client, if the flow has one of its own

    @property
    def sockets(self) -> list[SocketType]:
        return [sock for sock in (self.far, self.near) if sock is not None]

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


class Bound(NamedTuple):
    """Where a socket of a frontend's own is. Without an address, it is one of a shared pair."""

    ip: str
    port: int  # of a shared pair: its number
    proto: Proto


class Entrances(NamedTuple):
    """All sockets by which clients come in."""

    doors: Sequence[Shared] = ()
    own: Mapping[Bound, socket.socket] = MappingProxyType({})


class Described(Struct, frozen=True, array_like=True):
    """A connection in a message. Its descriptors: two sockets, and a file for what is left."""

    backend: Address
    ended: tuple[bool, bool]
    left: tuple[int, int]  # bytes
    broken: bool


class DescribedFlow(Struct, frozen=True, array_like=True):
    """A flow in a message. Its descriptors: the socket to the backend, and perhaps another."""

    client: tuple[str | int, ...]
    local: Address
    backend: Address
    replied: bool
    ages: tuple[float, float]
    has_near: bool


def entrance_messages(entrances: Entrances) -> Iterator[Parcel]:
    found = dict(entrances.own)
    for number, pair in enumerate(entrances.doors):
        found |= {Bound("", number, "TCP"): pair.tcp, Bound("", number, "UDP"): pair.udp}
    for places in in_parts(list(found)):
        yield msgspec.json.encode(places), [found[place].fileno() for place in places]


def entrances_of(parcels: Iterable[Parcel]) -> Entrances:
    found: dict[Bound, socket.socket] = {}
    for message, fds in parcels:
        places = msgspec.json.decode(message, type=list[Bound])
        found |= dict(zip(places, (socket.socket(fileno=fd) for fd in fds), strict=True))
    numbers = sorted({place.port for place in found if not place.ip})
    doors = [
        Shared(found.pop(Bound("", number, "TCP")), found.pop(Bound("", number, "UDP")))
        for number in numbers
    ]
    return Entrances(doors, found)


def connection_messages(given: Sequence[Given]) -> Iterator[Parcel]:
    """Yield messages; each is to be sent before the next is asked for."""
    for some in in_parts(given):
        with contextlib.ExitStack() as files:
            fds: list[int] = []
            for connection in some:
                fds += [sock.fileno() for sock in connection.sockets]
                left = connection.near.left + connection.far.left
                if left:
                    fds.append(files.enter_context(file_with(left)).fileno())
            yield msgspec.json.encode([described(connection) for connection in some]), fds


def described(given: Given) -> Described:
    return Described(
        given.backend,
        (given.near.ended, given.far.ended),
        (len(given.near.left), len(given.far.left)),
        given.broken,
    )


def connections_of(message: bytes, fds: Iterable[int]) -> list[Given]:
    rest = iter(fds)
    given = []
    for one in msgspec.json.decode(message, type=list[Described]):
        client, backend = (SocketType(fileno=next(rest)) for _ in range(2))
        left = content_of(next(rest)) if any(one.left) else b""
        near = Held(one.ended[0], left[: one.left[0]])
        far = Held(one.ended[1], left[one.left[0] :])
        given.append(Given(one.backend, near, far, one.broken, (client, backend)))
    return given


def flow_messages(given: Sequence[GivenFlow]) -> Iterator[Parcel]:
    for some in in_parts(given):
        fds = [sock.fileno() for flow in some for sock in flow.sockets]
        texts = [
            DescribedFlow(f.client, f.local, f.backend, f.replied, f.ages, f.near is not None)
            for f in some
        ]
        yield msgspec.json.encode(texts), fds


def flows_of(message: bytes, fds: Iterable[int]) -> list[GivenFlow]:
    rest = iter(fds)
    given = []
    for f in msgspec.json.decode(message, type=list[DescribedFlow]):
        far = SocketType(fileno=next(rest))
        near = SocketType(fileno=next(rest)) if f.has_near else None
        given.append(GivenFlow(f.client, f.local, f.backend, f.replied, f.ages, far, near))
    return given


def in_parts(all_of_them: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(all_of_them), AT_ONCE):
        yield all_of_them[start : start + AT_ONCE]


def file_with(content: bytes) -> BinaryIO:
    """Return a file in memory."""
    file = os.fdopen(os.memfd_create("pyproxy"), "w+b", buffering=0)
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
    return file


def content_of(fd: int) -> bytes:
    """Return what is in a file, and close it."""
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return file.read()
