"""Ends sockets by way of the kernel: those whose owners cannot know, or that have none any more.

A UDP socket that is connected to a backend never asks again where its datagrams should go. Its
owner gets ECONNABORTED, once, as if the network had said so. Linux: sock_diag(7), SOCK_DESTROY,
with CONFIG_INET_DIAG_DESTROY; CAP_NET_ADMIN, and CAP_SYS_ADMIN to enter other network namespaces.
"""

import ctypes
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from errno import EADDRNOTAVAIL
from functools import cache, partial
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from pyproxy.model import Address, Family
from pyproxy.proxier._netlink import Message, Netlink

NETLINK_SOCK_DIAG = 4
BY_FAMILY, DESTROY = 20, 21
CONNECTED, TIME_WAIT = 1 << 1, 1 << 6  # the states asked for
REQUEST = struct.Struct("=BBBBI48s")  # family, protocol, extensions, padding, states, identity
ANSWER = struct.Struct("=BBBB48s")
IDENTITY = struct.Struct("=2s2s16s16sI8s")  # ports and addresses of both ends, device, cookie
CLONE_NEWNET = 0x40000000
NAMED = Path("/run/netns")
PROCESSES = Path("/proc")
LIBC = ctypes.CDLL(None, use_errno=True)

Condemned = Callable[[bytes, Address], bool]  # of a socket's cookie and peer


class Found(NamedTuple):
    """A connected socket, and what destroys it."""

    cookie: bytes
    peer: Address
    request: bytes


def end_everywhere(condemned: Condemned) -> tuple[int, str | None]:
    """End sockets in all network namespaces that can be found; return how many, and a problem.

    It enters each, so it must run in a thread of its own kind: one that does nothing else then.
    """
    count, problem = 0, None
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        for namespace in namespaces():
            try:
                enter(namespace)
                count += end_here(condemned)
            except OSError as error:
                problem = error.strerror
            finally:
                os.close(namespace)
    finally:
        enter(home)
        os.close(home)
    return count, problem


def end_here(condemned: Condemned) -> int:
    """End sockets in the network namespace of the thread. Raises ``OSError``."""
    diag = Netlink(NETLINK_SOCK_DIAG)
    try:
        requests = [
            Message(DESTROY, 0, found.request)
            for found in list(connected(diag))
            if condemned(found.cookie, found.peer)
        ]
        failed = [code for code in diag.carry_out(requests) if code]
    finally:
        diag.close()
    if failed and len(failed) == len(requests):
        raise OSError(failed[0], os.strerror(failed[0]))
    return len(requests) - len(failed)


def connected(diag: Netlink) -> Iterator[Found]:
    """Yield the UDP sockets with a peer."""
    for family in (socket.AF_INET, socket.AF_INET6):
        request = REQUEST.pack(family, socket.IPPROTO_UDP, 0, 0, CONNECTED, bytes(48))
        for answer in diag.dump(BY_FAMILY, request):
            of, _state, _timer, _retransmissions, identity = ANSWER.unpack_from(answer)
            _port, port, _ip, ip, _device, cookie = IDENTITY.unpack(identity)
            destroy = REQUEST.pack(of, socket.IPPROTO_UDP, 0, 0, CONNECTED, identity)
            yield Found(cookie, Address(printed(of, ip), int.from_bytes(port, "big")), destroy)


def forget_waiting(family: Family) -> None:
    """Have no TCP connection wait in TIME_WAIT that had an address of another machine.

    When that machine connects by NAT again, with the same port, the kernel would take the answer
    for one to the connection that waits, and drop it (Linux: ip_forward, of packets with a socket).
    Raises ``OSError``. Kernels before 6.2 do not forget such.
    """
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    here = cache(is_here)
    diag = Netlink(NETLINK_SOCK_DIAG)
    try:
        about = partial(REQUEST.pack, kind, socket.IPPROTO_TCP, 0, 0, TIME_WAIT)
        identities = [
            ANSWER.unpack_from(answer)[4] for answer in diag.dump(BY_FAMILY, about(bytes(48)))
        ]
        strange = [i for i in identities if not here(printed(kind, IDENTITY.unpack(i)[2]))]
        diag.carry_out([Message(DESTROY, 0, about(identity)) for identity in strange])
    finally:
        diag.close()


def is_here(ip: str) -> bool:
    """Say whether an address is one that a socket here may have without more ado."""
    kind = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.socket(kind, socket.SOCK_DGRAM) as trial:
        try:
            trial.bind((ip, 0))
        except OSError as error:
            return error.errno != EADDRNOTAVAIL
    return True


def printed(family: int, packed: bytes) -> str:
    """Return a canonical address, of IPv4 if that is what an IPv6 socket speaks to."""
    if family == socket.AF_INET:
        return str(ip_address(packed[:4]))
    ip = ip_address(packed)
    return str(getattr(ip, "ipv4_mapped", None) or ip)


def namespaces() -> Iterator[int]:
    """Yield a descriptor of each network namespace that has a process we see, or a name.

    Container runtimes name those of their pods under ``/run/netns``.
    """
    seen: set[int] = set()
    own = Path("/proc/thread-self/ns/net")
    paths = [own, *entries(NAMED), *(path / "ns/net" for path in entries(PROCESSES, digits=True))]
    for path in paths:
        with suppress(OSError):
            number = path.stat().st_ino
            if number not in seen:
                seen.add(number)
                yield os.open(path, os.O_RDONLY)


def entries(folder: Path, *, digits: bool = False) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not digits or path.name.isdigit()]
    except OSError:
        return []


def enter(namespace: int) -> None:
    if LIBC.setns(namespace, CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
