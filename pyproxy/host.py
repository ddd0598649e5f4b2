"""The addresses of this node's interfaces, and a call when they change."""

import asyncio
import errno
import gc
import logging
import socket
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping
from ipaddress import ip_address, ip_interface, ip_network

from msgspec import Struct

from pyproxy.model import Family, Network

NETLINK_ROUTE = 0
# Groups of multicast messages: links, addresses of both families; then routes of both.
GROUPS = 0x1 | 0x10 | 0x100
ROUTE_GROUPS = 0x40 | 0x400
SETTLE_SECONDS = 0.2
RETRY_SECONDS = 5.0
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})  # may pass
YOUNG = 1  # generations of objects that live since a short while
MAIN_TABLE = 254
LOOPBACK: dict[Family, Network] = {4: ip_network("127.0.0.0/8"), 6: ip_network("::1/128")}

log = logging.getLogger(__name__)


class HostError(Exception):
    """Interfaces cannot be read, and will not be later."""


class Snapshot(Struct, frozen=True):
    """What the node's interfaces are called, and which addresses and networks they lead to."""

    addresses: frozenset[tuple[str, str]] = frozenset()  # interface, address/prefix length
    routes: frozenset[tuple[str, str]] = frozenset()  # interface, network reached without gateway

    def ips(self, family: Family) -> frozenset[str]:
        """Return the node's own addresses of a family, loopback included."""
        found = (ip_interface(text).ip for _interface, text in self.addresses)
        return frozenset(str(ip) for ip in found if ip.version == family)

    def ips_in(self, family: Family, ranges: Iterable[Network]) -> list[str]:
        """Return, in order, the node's own addresses that lie in one of the ranges."""
        wanted = tuple(ranges)
        own = sorted(self.ips(family))
        return [ip for ip in own if any(ip_address(ip) in network for network in wanted)]

    def networks(self, family: Family, matches: Callable[[str], bool]) -> tuple[Network, ...]:
        """Return the networks that interfaces whose name matches lead to."""
        texts = {text for name, text in self.addresses | self.routes if matches(name)}
        nets = {ip_interface(text).network for text in texts}
        return tuple(sorted((n for n in nets if n.version == family), key=str))


class Host:
    """Keeps a snapshot of this network namespace, and tells listeners when it changes."""

    def __init__(self, *, with_routes: bool = False) -> None:
        self._with_routes = with_routes
        self._listeners: list[Callable[[], None]] = []
        self._is_failing = False
        self._is_told = True
        self.snapshot = Snapshot()

    def on_change(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    async def read(self) -> None:
        """Take a new snapshot; tell the listeners if it is another. Raises ``OSError``.

        If a listener fails the others are told, and all of them again at the next call.
        """
        fresh = await asyncio.to_thread(snapshot, with_routes=self._with_routes)
        if fresh == self.snapshot and self._is_told:
            return
        self.snapshot, self._is_told = fresh, False
        failure = None
        for listener in self._listeners:
            try:
                listener()
            except OSError as error:
                failure = error
        if failure is not None:
            raise failure
        self._is_told = True

    async def read_at_last(self) -> None:
        """Do as ``read``, and again while file descriptors or memory are short.

        Raises ``HostError``.
        """
        try:
            await self._at_last(self.read, EXHAUSTED)
        except OSError as error:
            raise HostError(f"the interfaces of this node cannot be read: {error}") from error

    async def follow(self) -> None:
        """Read again, for ever, when the kernel says that something changed."""
        await self._at_last(self._follow)

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        groups = GROUPS | (ROUTE_GROUPS if self._with_routes else 0)
        changed = asyncio.Event()
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE) as events:
            events.bind((0, groups))
            events.setblocking(False)
            loop.add_reader(events.fileno(), drain, events, changed)
            try:
                while True:
                    await self._at_last(self.read)
                    await changed.wait()
                    await asyncio.sleep(SETTLE_SECONDS)
                    changed.clear()
            finally:
                loop.remove_reader(events.fileno())

    async def _at_last(
        self, attempt: Callable[[], Awaitable[None]], passing: Container[int | None] | None = None
    ) -> None:
        """Attempt it until it does not fail: file descriptors may be free by then.

        Raises an ``OSError`` whose number is not one of ``passing``, if these are given.
        """
        while True:
            try:
                await attempt()
            except OSError as error:
                if passing is not None and error.errno not in passing:
                    raise
                self._tell(str(error))
            else:
                self._tell(None)
                return
            gc.collect(YOUNG)  # pyroute2 leaves the sockets of a failed attempt to the collector
            await asyncio.sleep(RETRY_SECONDS)

    def _tell(self, failure: str | None) -> None:
        """Log when reading begins to fail, and when it is over."""
        before, self._is_failing = self._is_failing, failure is not None
        if failure is not None and not before:
            fields = {"error": failure, "retry_seconds": RETRY_SECONDS}
            log.warning("interfaces cannot be read", extra=fields)
        elif before and failure is None:
            log.info("interfaces are read again")


def drain(events: socket.socket, changed: asyncio.Event) -> None:
    """Empty the socket: that something happened is all we want to know."""
    changed.set()
    try:
        while events.recv(1 << 16):
            pass
    except BlockingIOError:
        pass
    except OSError:  # more events than the socket holds
        pass


def snapshot(*, with_routes: bool) -> Snapshot:
    """Read the interfaces through pyroute2; it blocks, and brings its own event loop.

    Raises ``OSError``.
    """
    from pyroute2 import IPRoute, NetlinkError

    try:
        with IPRoute() as ip:
            names = {link["index"]: link.get("ifname") for link in ip.get_links()}
            found = ip.get_addr()
            routes = reached(ip.get_routes(table=MAIN_TABLE), names) if with_routes else set()
            addresses = {(names.get(a["index"], ""), interface_address(a)) for a in found}
    except NetlinkError as error:
        raise OSError(error.code, str(error)) from error
    return Snapshot(frozenset(addresses), frozenset(routes))


def interface_address(found: Mapping[str, object]) -> str:
    return f"{found.get('local') or found.get('address')}/{found['prefixlen']}"


def reached(routes: Iterable[dict[str, object]], names: dict[int, str]) -> set[tuple[str, str]]:
    found = set()
    for route in routes:
        interface, to = route.get("oif"), route.get("dst")
        if isinstance(interface, int) and to and not route.get("gateway"):
            found.add((names.get(interface, ""), f"{to}/{route['dst_len']}"))
    return found
