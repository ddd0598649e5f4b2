"""Writes the items of mode ipvs: virtual servers, local addresses, and the table beside them.

A destination of connections is never taken away while it has any: it gets the weight 0, and goes
when it is idle. Its virtual server and its local address stay with it.
"""

import asyncio
import errno
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import cast

from pyproxy.delta import Delta
from pyproxy.model import Address, Family, Frontend, ServicePortName
from pyproxy.proxier import _ipvsnl as nl
from pyproxy.proxier._ipvscompare import compared, vip_of, weights_of
from pyproxy.proxier._ipvsnl import Busy, Ipvs, Request
from pyproxy.proxier._vips import RTPROT_IPVS, Vip, Vips, frontend_of
from pyproxy.reconcile import ApplyError, Clock, Difference, Target
from pyproxy.rules.ipvs import (
    BOUND,
    Content,
    Destination,
    Items,
    Key,
    LocalAddress,
    Server,
    widened,
)
from pyproxy.rules.nft_affinity import Content as TableContent
from pyproxy.rules.nftables import Item

DRAIN_SECONDS = 15 * 60.0
POLL_SECONDS = 5.0
AT_ONCE = 50  # servers whose connections are counted at a time; more wait for the next poll
GONE = frozenset({errno.ENOENT, errno.ESRCH})
AS_SET = {nl.NEW_SERVICE: nl.SET_SERVICE, nl.NEW_DEST: nl.SET_DEST}


@dataclass(slots=True)
class Parts:
    """A delta, by what it is about."""

    grow: list[Request] = field(default_factory=list)
    shrink: list[Request] = field(default_factory=list)
    touched: set[Frontend] = field(default_factory=set)


@dataclass(slots=True)
class Held:
    """A virtual server in the kernel, with the weight of each destination."""

    server: Server
    weights: dict[Address, int] = field(default_factory=dict)


class IpvsTarget:
    """The virtual servers of one family that are ours, with what belongs to them."""

    def __init__(
        self,
        family: Family,
        table: Target[Item, TableContent],
        clock: Clock,
        connect: Callable[[], tuple[Ipvs, Vips]],
    ) -> None:
        self._family = family
        self._table = table
        self._clock = clock
        self._connect = connect
        self._ipvs: Ipvs | None = None
        self._vips: Vips | None = None
        self._users: dict[Vip, set[ServicePortName | None]] = {}
        self._held: dict[Frontend, Held] = {}  # what the kernel has, as far as we know
        self._draining: dict[Frontend, dict[Address, float]] = {}  # until when
        self._doomed: set[Frontend] = set()  # servers kept for their connections
        self._lock = asyncio.Lock()

    async def adopt(self) -> Mapping[Key, Content]:
        async with self._lock:
            items = widened(await self._table.adopt())
            try:
                return items | await asyncio.to_thread(self._read)
            except OSError as error:
                raise ApplyError(f"cannot list virtual servers: {error.strerror}") from error

    async def apply(self, delta: Delta[Key, Content]) -> Mapping[Key, str]:
        """Serve before sending there, and refuse before serving no more."""
        async with self._lock:
            parts = self._parts(delta)
            try:
                refused: dict[Key, str] = await asyncio.to_thread(self._carry_out, parts.grow)
                refused |= self._bind(key for key in delta.added if isinstance(key, LocalAddress))
                await self._table.apply(table_delta(delta))
                await asyncio.to_thread(self._carry_out, parts.shrink)
                if len(parts.touched) <= AT_ONCE:
                    await asyncio.to_thread(self._finish, parts.touched)
                self._unbind()
            except OSError as error:
                raise ApplyError(f"cannot change virtual servers: {error.strerror}") from error
            return refused

    async def compare(self, wanted: Mapping[Key, Content]) -> tuple[Difference, ...]:
        """List the virtual servers, local addresses and the table anew. Raises ``ApplyError``."""
        table = {key: content for key, content in wanted.items() if isinstance(key, Item)}
        found = await self._table.compare(cast(Mapping[Item, TableContent], table))
        async with self._lock:
            try:
                return found + await asyncio.to_thread(compared, *self._sockets(), wanted)
            except OSError as error:
                raise ApplyError(f"cannot list virtual servers: {error.strerror}") from error

    async def drain(self) -> None:
        """Take away what has become idle, for ever."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            with suppress(OSError):  # the next poll does it, or the next sync says why not
                await self.reap()

    async def reap(self) -> None:
        """Take away what has become idle. Raises ``OSError``."""
        servers = list(self._draining.keys() | self._doomed)
        for first in range(0, len(servers), AT_ONCE):
            async with self._lock:  # not for all of them: syncs wait for it
                await asyncio.to_thread(self._finish, servers[first : first + AT_ONCE])
                self._unbind()

    async def differing_servers(self) -> int:
        """Return how many virtual servers are not those we left. Raises ``OSError``."""
        async with self._lock:
            if not self._held:
                return 0
            ipvs, _vips = self._sockets()
            found = await asyncio.to_thread(ipvs.servers)
            known = {frontend: held.server for frontend, held in self._held.items()}
            return sum(found.get(f) != known.get(f) for f in found.keys() | known.keys())

    async def differing_destinations(self, after: int, count: int) -> int:
        """Return how many destinations of so many servers are not as we left them."""
        async with self._lock:
            ipvs, _vips = self._sockets()
            some = list(islice(self._held.items(), after, after + count))
            found = await asyncio.to_thread(lambda: [weights_of(ipvs, f) for f, _held in some])
            pairs = zip(found, (held.weights for _frontend, held in some), strict=True)
            return sum(a.get(k) != b.get(k) for a, b in pairs for k in a.keys() | b.keys())

    @property
    def server_count(self) -> int:
        return len(self._held)

    async def clear(self) -> None:
        """Delete what is ours, whoever made it. Raises ``ApplyError``."""
        await self._table.clear()
        try:
            await asyncio.to_thread(delete_all, self._family)
        except OSError as error:
            raise ApplyError(f"cannot delete virtual servers: {error.strerror}") from error

    async def aclose(self) -> None:
        """Leave everything as it is: it carries the traffic."""
        await self._table.aclose()
        if self._ipvs is not None:
            self._ipvs.close()
        if self._vips is not None:
            self._vips.close()
        self._ipvs = self._vips = None

    # --- reading ------------------------------------------------------------------------------

    def _read(self) -> Items:
        ipvs, vips = self._sockets()
        items: Items = {}
        draining, doomed = self._draining, self._doomed
        self._draining, self._doomed = {}, set()
        self._held = {frontend: Held(server) for frontend, server in ipvs.servers().items()}
        for frontend, held in self._held.items():
            held.weights = weights_of(ipvs, frontend)
            waiting = draining.get(frontend, {})
            left = {a: t for a, t in waiting.items() if held.weights.get(a) == 0}
            if left:
                self._draining[frontend] = left
            if frontend in doomed and left.keys() == held.weights.keys():
                self._doomed.add(frontend)
                continue
            items[frontend] = held.server
            items |= {
                Destination(frontend, address): weight
                for address, weight in held.weights.items()
                if address not in left
            }
        listed = vips.listed()
        self._users = {vip: {None} for vip in listed}
        items |= {LocalAddress(vip.ip, frontend_of(vip)): BOUND for vip in listed}
        return items

    # --- writing ------------------------------------------------------------------------------

    def _parts(self, delta: Delta[Key, Content]) -> Parts:
        parts = Parts()
        for key in delta.removed:
            self._take_away(key, parts)
        servers, destinations = [], []
        new = dict(delta.added) | {key: after for key, (_old, after) in delta.changed.items()}
        for key, content in new.items():
            if isinstance(key, Frontend) and isinstance(content, Server):
                known = key in delta.changed or key in self._doomed
                self._doomed.discard(key)
                servers.append((nl.set_server if known else nl.new_server)(key, content))
            elif isinstance(key, Destination) and isinstance(content, int):
                resumed = self._draining.get(key.server, {}).pop(key.address, None)
                known = key in delta.changed or resumed is not None
                make = nl.set_destination if known else nl.new_destination
                destinations.append(make(key, content))
        parts.grow = servers + destinations
        return parts

    def _take_away(self, key: Key, parts: Parts) -> None:
        """Let a server go, or a destination: at once, or when its last connection ends."""
        if isinstance(key, LocalAddress):
            users = self._users.get(vip_of(key))
            if users is not None:
                users.discard(key.owner)
        elif isinstance(key, Frontend):
            self._doomed.add(key)
            parts.touched.add(key)
        elif isinstance(key, Destination):
            parts.touched.add(key.server)
            if key.server.proto == "UDP":
                parts.shrink.append(nl.delete_destination(key))
            else:
                parts.shrink.append(nl.set_destination(key, 0))
                until = self._clock.monotonic() + DRAIN_SECONDS
                self._draining.setdefault(key.server, {})[key.address] = until

    def _finish(self, servers: Iterable[Frontend]) -> None:
        """Delete what is idle, or has had its time, of what shall go."""
        requests: list[Request] = []
        for server in servers:
            doomed = server in self._doomed
            done = self._drained(server, doomed=doomed)
            if not self._draining.get(server):
                self._draining.pop(server, None)
                self._doomed.discard(server)
                if doomed:
                    requests.append(nl.delete_server(server))
                    continue
            requests += [nl.delete_destination(Destination(server, a)) for a in done]
        self._carry_out(requests)

    def _drained(self, server: Frontend, *, doomed: bool) -> list[Address]:
        """Return the destinations that are waited for no more."""
        waiting = self._draining.get(server, {})
        ipvs, _vips = self._sockets()
        busy = ipvs.destinations(server) if waiting else {}
        now = self._clock.monotonic()
        done = [
            address
            for address, until in waiting.items()
            if now >= until or address not in busy or idle(busy[address], doomed=doomed)
        ]
        for address in done:
            del waiting[address]
        return done

    def _carry_out(self, requests: list[Request]) -> dict[Key, str]:
        """Make the changes; return what cannot be made new. Raises ``OSError`` for all else."""
        if not requests:
            return {}
        ipvs, _vips = self._sockets()
        refused: dict[Key, str] = {}
        again: list[Request] = []
        failed = ipvs.carry_out(requests)
        not_done = {request.subject for request, _code in failed}
        for request in requests:
            if request.subject not in not_done:
                self._remember(request)
        for request, code in failed:
            if request.command in AS_SET and code == errno.EEXIST:
                again.append(request._replace(command=AS_SET[request.command]))
            elif request.command in AS_SET:
                refused[request.subject] = why_not(request, code)
            elif request.command not in (nl.DEL_SERVICE, nl.DEL_DEST) or code not in GONE:
                raise OSError(code, f"{os.strerror(code)}: {request.subject}")
        return refused | (self._carry_out(again) if again else {})

    def _remember(self, request: Request) -> None:
        subject, content = request.subject, request.content
        if isinstance(subject, Frontend):
            if isinstance(content, Server):
                self._held.setdefault(subject, Held(content)).server = content
            else:
                self._held.pop(subject, None)
        elif (held := self._held.get(subject.server)) is not None:
            if isinstance(content, int):
                held.weights[subject.address] = content
            else:
                held.weights.pop(subject.address, None)

    # --- local addresses ----------------------------------------------------------------------

    def _bind(self, keys: Iterable[LocalAddress]) -> dict[Key, str]:
        _ipvs, vips = self._sockets()
        by_vip: dict[Vip, list[LocalAddress]] = {}
        for key in keys:
            by_vip.setdefault(vip_of(key), []).append(key)
        failed = vips.add(vip for vip in by_vip if vip not in self._users)
        refused: dict[Key, str] = {}
        for vip, users in by_vip.items():
            if vip in failed:
                refused |= dict.fromkeys(users, failed[vip])
            else:
                self._users.setdefault(vip, set()).update(key.owner for key in users)
        return refused

    def _unbind(self) -> None:
        """Remove the routes of addresses that nobody wants, and no connection needs."""
        unused = [vip for vip, users in self._users.items() if not users]
        if not unused:
            return
        kept = {server.ip for server in self._doomed}
        gone = [vip for vip in unused if vip.ip not in kept]
        _ipvs, vips = self._sockets()
        left = [vip for vip in self._users if vip not in set(gone)]
        vips.remove(gone, left)
        for vip in gone:
            del self._users[vip]

    def _sockets(self) -> tuple[Ipvs, Vips]:
        if self._ipvs is None or self._vips is None:
            self._ipvs, self._vips = self._connect()
        return self._ipvs, self._vips


def table_delta(delta: Delta[Key, Content]) -> Delta[Item, TableContent]:
    """Return what is the table's: items, and nothing else has them for keys."""
    return cast(
        Delta[Item, TableContent],
        Delta(
            {k: v for k, v in delta.added.items() if isinstance(k, Item)},
            {k: v for k, v in delta.changed.items() if isinstance(k, Item)},
            {k: v for k, v in delta.removed.items() if isinstance(k, Item)},
        ),
    )


def idle(busy: Busy, *, doomed: bool) -> bool:
    """Say whether a destination may go: of a server that goes too, half closed ones are cut.

    They take minutes, through which its address would be refused by this node.
    """
    return not busy.active and (doomed or not busy.inactive)


def why_not(request: Request, code: int) -> str:
    subject = request.subject
    if isinstance(subject, Frontend):
        reason = "no such scheduler" if code == errno.ENOENT else os.strerror(code)
        return f"cannot make a virtual server for {subject}: {reason}"
    return f"cannot send from {subject.server} to {subject.address}: {os.strerror(code)}"


def delete_all(family: Family) -> None:
    """Delete our virtual servers and routes, whichever process made them."""
    vips = Vips(family, None, mark=RTPROT_IPVS)
    try:
        vips.remove(vips.listed())
    finally:
        vips.close()
    try:
        ipvs = Ipvs(family)
    except OSError as error:
        if error.errno == errno.ENOENT:  # a kernel without virtual servers has none of ours
            return
        raise
    try:
        ipvs.carry_out([nl.delete_server(server) for server in ipvs.servers()])
    finally:
        ipvs.close()
