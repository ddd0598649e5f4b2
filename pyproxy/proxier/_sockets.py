"""Opens the sockets that frontends listen on."""

import ctypes
import errno
import logging
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from socket import SocketType
from typing import NamedTuple

from pyproxy.host import EXHAUSTED
from pyproxy.model import Address, Family, Proto
from pyproxy.rules.guard import DROP_ALL, Program

OPTIONS = {
    ("freebind", socket.IPPROTO_IP): 15,
    ("freebind", socket.IPPROTO_IPV6): 78,
    ("transparent", socket.IPPROTO_IP): 19,
    ("transparent", socket.IPPROTO_IPV6): 75,
}
IP_PKTINFO = 8
IP_RECVORIGDSTADDR, IPV6_RECVORIGDSTADDR = 20, 74
SO_ATTACH_FILTER = 26
SO_DETACH_FILTER = 27
LOOPBACK: dict[Family, str] = {4: "127.0.0.1", 6: "::1"}
BACKLOG = 4096
DATAGRAM_QUEUE = 4 << 20  # bytes; the default holds two datagrams of 64 KiB, or 277 small ones
SO_RCVBUFFORCE = 33
SO_MEMINFO = 55
MEMINFO = struct.Struct("=9I")  # the last is what was dropped: include/uapi/linux/sock_diag.h
KEEPALIVE = ((socket.TCP_KEEPIDLE, 300), (socket.TCP_KEEPINTVL, 30), (socket.TCP_KEEPCNT, 5))
CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")  # for IPv6 as well
UNPACED = b"reno"
RELIEF_SECONDS = 10.0  # without a shortage, until the next one is worth telling

log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None)

Ancillary = list[tuple[int, int, bytes]]


class Shortage:
    """Tells that file descriptors have run out, and that there are enough again: once each."""

    __slots__ = ("_last_at",)

    def __init__(self) -> None:
        self._last_at: float | None = None

    def met(self, error: OSError, now: float, open_count: int) -> None:
        if self._last_at is None:
            fields = {"error": error.strerror, "open": open_count}
            log.error("out of file descriptors: new connections wait", extra=fields)
        self._last_at = now

    def passed(self, now: float) -> None:
        """Take in that a file descriptor was to be had."""
        if self._last_at is not None and now - self._last_at > RELIEF_SECONDS:
            self._last_at = None
            log.info("enough file descriptors again")


def listening(
    ip: str,
    port: int,
    proto: Proto,
    guard: Program | None = None,
    *,
    wildcard: bool,
    transparent: bool = False,
) -> socket.socket:
    """Return a non-blocking socket for a frontend, guarded from the start. Raises ``OSError``.

    SO_REUSEPORT lets the wildcard socket of a node port stand beside the socket of a Service
    address with the same port; a socket of another program without it still shuts us out.
    IP_FREEBIND lets us listen before the address is local, so that it is never local without.
    ``transparent`` is for an address that is not ours but for the port; it needs CAP_NET_ADMIN.
    """
    sock = unbound(ip, proto, transparent=transparent)
    try:
        if guard is not None:
            attach_guard(sock, guard)
        if proto == "TCP":
            keep_alive(sock)  # the sockets that it accepts inherit this, and that
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.bind((ip, port))
            sock.listen(BACKLOG)
        else:
            enlarge_queue(sock)
            if wildcard:
                ask_for_local_address(sock)
            sock.bind((ip, port))
    except OSError:
        sock.close()
        raise
    return sock


def unbound(ip: str, proto: Proto, *, transparent: bool = False) -> socket.socket:
    """Return a non-blocking socket that may share its address with others of ours."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM if proto == "TCP" else socket.SOCK_DGRAM)
    level = socket.IPPROTO_IPV6 if family == socket.AF_INET6 else socket.IPPROTO_IP
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        for name in ["freebind", *(["transparent"] if transparent else [])]:
            sock.setsockopt(level, OPTIONS[name, level], 1)
        if level == socket.IPPROTO_IPV6:
            sock.setsockopt(level, socket.IPV6_V6ONLY, 1)
        if proto == "TCP":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    except OSError:
        sock.close()
        raise
    return sock


def shared(family: Family, proto: Proto, port: int = 0) -> socket.socket:
    """Return a non-blocking socket for packets to any address and port. Raises ``OSError``.

    Those who lead packets to it choose them; it is bound where nobody will look for it. As it is
    transparent, so is what it accepts: its own address may be one that is not this node's. Several
    may share a port of ours.
    """
    kind = socket.SOCK_STREAM if proto == "TCP" else socket.SOCK_DGRAM
    sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, kind)
    level = socket.IPPROTO_IP if family == 4 else socket.IPPROTO_IPV6
    try:
        sock.setblocking(False)
        sock.setsockopt(level, OPTIONS["transparent", level], 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if proto == "UDP":
            enlarge_queue(sock)
            asked = IP_RECVORIGDSTADDR if family == 4 else IPV6_RECVORIGDSTADDR
            sock.setsockopt(level, asked, 1)
        else:
            # The sockets that it accepts inherit all. They hold the ports of frontends, which
            # those who come later must be able to bind to.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(sock)
        sock.bind((LOOPBACK[family], port))
        if proto == "TCP":
            sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


class Shared(NamedTuple):
    """The sockets of all frontends for one worker: one for connections, one for datagrams."""

    tcp: socket.socket
    udp: socket.socket

    def close(self) -> None:
        self.tcp.close()
        self.udp.close()

    @property
    def ports(self) -> tuple[int, int]:
        return self.tcp.getsockname()[1], self.udp.getsockname()[1]


def shared_by_all(family: Family, ports: tuple[int, int] = (0, 0)) -> Shared:
    """Return new sockets, at these ports if they are not zero. Raises ``OSError``."""
    tcp = shared(family, "TCP", ports[0])
    try:
        return Shared(tcp, shared(family, "UDP", ports[1]))
    except OSError:
        tcp.close()
        raise


def doors(
    family: Family, count: int, inherited: Sequence[Shared] = (), *, together: bool = False
) -> list[Shared]:
    """Return at least ``count`` pairs, those of a predecessor among them. Raises ``OSError``.

    Where they stand ``together``, the first ``count`` share their ports, and the kernel spreads
    clients over them. Those that are too many are there for who waits in them.
    """
    fitting, others = list(inherited), list[Shared]()
    if together:
        ports = inherited[0].ports if inherited else (0, 0)
        fitting = [pair for pair in inherited if pair.ports == ports]
        others = [pair for pair in inherited if pair.ports != ports]
    made: list[Shared] = []
    try:
        while len(fitting) + len(made) < count:
            first = next(iter(fitting + made), None) if together else None
            made.append(shared_by_all(family, first.ports if first is not None else (0, 0)))
    except OSError:
        for pair in (*inherited, *made):
            pair.close()
        raise
    return fitting + made + others


def silent(family: Family, proto: Proto) -> socket.socket:
    """Return a socket that admits nobody, and answers nobody. Raises ``OSError``."""
    sock = shared(family, proto)
    attach_guard(sock, DROP_ALL)
    return sock


def original_destination(extra: Ancillary) -> bytes:
    """Return where a datagram was sent to, out of its ancillary data: port and address, packed."""
    for level, kind, data in extra:
        if (level, kind) == (socket.IPPROTO_IP, IP_RECVORIGDSTADDR):
            return data[2:8]  # struct sockaddr_in: family, port, address
        if (level, kind) == (socket.IPPROTO_IPV6, IPV6_RECVORIGDSTADDR):
            return data[2:4] + data[8:24]  # struct sockaddr_in6: family, port, flow, address
    return b""


@lru_cache(maxsize=4096)
def destination(packed: bytes) -> tuple[str, int]:
    """Return the address and port that ``original_destination`` has found."""
    family = socket.AF_INET if len(packed) == 6 else socket.AF_INET6
    return socket.inet_ntop(family, packed[2:]), int.from_bytes(packed[:2], "big")


def original(local: Address) -> bytes:
    """Return what ``original_destination`` finds for datagrams to this address."""
    family = socket.AF_INET6 if ":" in local.ip else socket.AF_INET
    return local.port.to_bytes(2, "big") + socket.inet_pton(family, local.ip)


def answering(ip: str, port: int) -> socket.socket:
    """Return a socket whose datagrams come from this address and port. Raises ``OSError``."""
    return listening(ip, port, "UDP", wildcard=False, transparent=True)


def check_free(ip: str, port: int, proto: Proto) -> None:
    """See whether another program has a port: then raises ``OSError``, as ``listening`` would."""
    with unbound(ip, proto) as sock:
        sock.bind((ip, port))


def keep_alive(sock: SocketType) -> None:
    """Have the kernel notice a peer that is gone without a word."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def enlarge_queue(sock: SocketType) -> None:
    """Let more datagrams wait for us. Without root, as many as net.core.rmem_max allows."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, DATAGRAM_QUEUE)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, DATAGRAM_QUEUE)


def ask_for_local_address(sock: socket.socket) -> None:
    """Let each datagram tell the address it was sent to: replies must come from there."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)


def attach_guard(sock: socket.socket, program: Program) -> None:
    """Drop, unanswered, what the program drops. It replaces the program of the last call.

    Raises ``OSError``; some kernels let only root attach a filter to a TCP socket.
    """
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    filter_program = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filter_program)
    except PermissionError as error:
        message = "some clients must meet silence: a socket filter needs root, or CAP_NET_ADMIN"
        raise PermissionError(error.errno, message) from error


def detach_guard(sock: socket.socket) -> None:
    with suppress(FileNotFoundError):  # it has none
        sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)


def dropped_at(sock: socket.socket) -> int:
    """Return how many packets a socket has dropped: its guard, or for want of room in its queue."""
    values = MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, MEMINFO.size))
    return int(values[-1])


class CongestionControl(NamedTuple):
    """What a TCP connection uses: through a network, and inside of this node."""

    usual: bytes
    local: bytes


def congestion_control() -> CongestionControl | None:
    """Return what to use where; None if everything may have the default.

    BBR lets a timer say when to send. That costs as much again as all else does, for nothing where
    there is no network in between. Reno is in every kernel.
    """
    try:
        usual = CONGESTION_CONTROL.read_bytes().strip()
        if usual.startswith(b"bbr"):
            with socket.socket() as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, UNPACED)
            return CongestionControl(usual, UNPACED)
    except OSError as error:
        log.debug("local connections are paced as all are", extra={"error": str(error)})
    return None


def control_congestion(fd: int, name: bytes) -> None:
    """Have a TCP connection's congestion controlled so; where that cannot be, it stays as it is.

    Python's own ``setsockopt`` takes twice as long for bytes: it tries numbers first.
    """
    _libc.setsockopt(fd, socket.IPPROTO_TCP, socket.TCP_CONGESTION, name, len(name))


def reset(sock: SocketType) -> None:
    """Close a TCP socket so that the other side sees a reset."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    sock.close()


def why_not(error: OSError, port: int) -> str:
    """Say what a failed bind or listen means to the operator."""
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} is taken by another program on this node"
        case errno.EACCES:
            return f"port {port} is privileged: run as root, or with CAP_NET_BIND_SERVICE"
        case code if code in EXHAUSTED:
            return f"out of file descriptors or memory ({error.strerror}): raise the limit"
        case _:
            return str(error.strerror)
