"""Writes the items of mode ipvs: virtual servers, local addresses, and the table beside them.

A destination of connections is never taken away while it has any: it gets the weight 0, and goes
when it is idle. Its virtual server and its local address stay with it.
Long, because the order in which the three are written is one decision.
"""

import asyncio
import errno
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from ipaddress import ip_address
from itertools import islice
from typing import cast

from msgspec import Struct
from msgspec.structs import replace

from pyproxy.counters import Entry
from pyproxy.delta import Delta
from pyproxy.model import Address, Family, Frontend, Network
from pyproxy.proxier import _ipvsnl as nl
from pyproxy.proxier._ipvsaudit import Weights, destination_differences, server_differences
from pyproxy.proxier._ipvscompare import compared, weights_of
from pyproxy.proxier._ipvslocal import Leads, LocalAddresses
from pyproxy.proxier._ipvsnl import Ipvs, Request
from pyproxy.proxier._vips import RTPROT_IPVS, Vips
from pyproxy.reconcile import ApplyError, Clock, Difference, Target
from pyproxy.rules.ipvs import (
    BOUND,
    WITHOUT_DRAINING,
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

POLL_SECONDS = 5.0
AT_ONCE = 50  # servers whose connections are counted at a time; more wait for the next poll
GONE = frozenset({errno.ENOENT, errno.ESRCH})
AS_SET = {nl.NEW_SERVICE: nl.SET_SERVICE, nl.NEW_DEST: nl.SET_DEST}


@dataclass(slots=True)
class Parts:
    """A delta, by what it is about."""

    servers: list[Request] = field(default_factory=list)
    destinations: list[Request] = field(default_factory=list)
    addresses: list[LocalAddress] = field(default_factory=list)
    shrink: list[Request] = field(default_factory=list)
    touched: set[Frontend] = field(default_factory=set)


@dataclass(slots=True)
class Held:
    """A virtual server in the kernel, with the weight of each destination."""

    server: Server
    weights: dict[Address, int] = field(default_factory=dict)


class Settings(Struct, frozen=True):
    """What an operator may choose."""

    drain_seconds: float = 900.0  # for the last connections of a destination
    excluded: tuple[Network, ...] = ()  # where other people's virtual servers stay theirs
    counts_refusals: bool = False  # the table beside does


DEFAULTS = Settings()


class IpvsTarget:
    """The virtual servers of one family that are ours, with what belongs to them."""

    def __init__(
        self,
        family: Family,
        table: Target[Item, TableContent],
        clock: Clock,
        connect: Callable[[], tuple[Ipvs, Leads]],
        settings: Settings = DEFAULTS,
    ) -> None:
        self._family = family
        self._settings = settings
        self._table = table
        self._clock = clock
        self._connect = connect
        self._ipvs: Ipvs | None = None
        self._leads: Leads | None = None
        self._addresses = LocalAddresses()
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

    def rehearse(self, state: Mapping[Key, Content]) -> None:
        """Pack these items, to no end."""
        delta = Delta(dict(state), {}, {})
        self._table.rehearse(table_delta(delta).added)
        empty = copy(self)
        empty._held, empty._draining, empty._doomed = {}, {}, set()
        empty._parts(delta)

    async def apply(self, delta: Delta[Key, Content]) -> Mapping[Key, str]:
        """Guard and masquerade before serving, and refuse before serving no more.

        A connection that a virtual server has before the table masks it would be lost: a backend
        elsewhere answers past this node.
        """
        async with self._lock:
            parts, table = self._parts(delta), table_delta(delta)
            try:
                await self._table.apply(Delta(table.added, table.changed, {}))
                refused = await asyncio.to_thread(self._grow, parts)
                if table.removed:
                    await self._table.apply(Delta({}, {}, table.removed))
                await asyncio.to_thread(self._shrink, parts)
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

    async def differing_servers(self) -> list[str]:
        """Return how virtual servers and local addresses differ from what we left, in words."""
        async with self._lock:
            if not self._held:
                return []
            ipvs, leads = self._sockets()
            found = await asyncio.to_thread(ipvs.servers)
            known = {frontend: held.server for frontend, held in self._held.items()}
            missing = await asyncio.to_thread(self._addresses.missing, leads)
            return server_differences(known, found) + [f"{vip.ip} is not local" for vip in missing]

    async def differing_destinations(self, after: int, count: int) -> list[str]:
        """Return how the destinations of so many servers differ from what we left, in words."""
        async with self._lock:
            ipvs, _leads = self._sockets()
            some = list(islice(self._held.items(), after, after + count))
            found = await asyncio.to_thread(lambda: [weights_of(ipvs, f) for f, _held in some])
            pairs = zip(some, found, strict=True)
            of_each = (Weights(f, held.weights, weights) for (f, held), weights in pairs)
            return [told for weights in of_each for told in destination_differences(weights)]

    async def counters(self, *, by_endpoint: bool) -> list[Entry[Key]]:
        """Return what went through each virtual server and to each destination since it was made.

        Raises ``ApplyError``. The destinations of a server cost a request: ten thousand, seconds.
        """
        refusals: Sequence[Entry[Item]] = ()
        if self._settings.counts_refusals:
            refusals = await self._table.counters(by_endpoint=by_endpoint)
        try:
            async with self._lock:
                ipvs, _leads = self._sockets()
                servers = await asyncio.to_thread(ipvs.counters)
            found = [Entry[Key](*entry) for entry in refusals]
            found += [Entry(frontend, None, counts) for frontend, counts in servers.items()]
            frontends = list(servers) if by_endpoint else []
            for first in range(0, len(frontends), AT_ONCE):
                some = frontends[first : first + AT_ONCE]
                async with self._lock:
                    of_each = await asyncio.to_thread(list, map(ipvs.destination_counters, some))
                for server, counts in zip(some, of_each, strict=True):
                    found += [
                        Entry(Destination(server, address), address, each)
                        for address, each in counts.items()
                    ]
        except OSError as error:
            raise ApplyError(f"cannot read counters: {error.strerror}") from error
        return found

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
        if self._leads is not None:
            self._leads.close()
        self._ipvs = self._leads = None

    # --- reading ------------------------------------------------------------------------------

    def _read(self) -> Items:
        ipvs, leads = self._sockets()
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
        return items | dict.fromkeys(self._addresses.read(leads), BOUND)

    # --- writing ------------------------------------------------------------------------------

    def _parts(self, delta: Delta[Key, Content]) -> Parts:
        parts = Parts()
        for key in delta.removed:
            self._take_away(key, parts)
        new = dict(delta.added) | {key: after for key, (_old, after) in delta.changed.items()}
        for key, content in new.items():
            if isinstance(key, Frontend) and isinstance(content, Server):
                known = key in delta.changed or key in self._doomed
                self._doomed.discard(key)
                parts.servers.append((nl.set_server if known else nl.new_server)(key, content))
            elif isinstance(key, LocalAddress):
                parts.addresses.append(key)
            elif isinstance(key, Destination) and isinstance(content, int):
                resumed = self._draining.get(key.server, {}).pop(key.address, None)
                known = key in delta.changed or resumed is not None
                make = nl.set_destination if known else nl.new_destination
                parts.destinations.append(make(key, content))
        return parts

    def _grow(self, parts: Parts) -> dict[Key, str]:
        """Make virtual servers, destinations of those that could be made, and addresses local."""
        refused = self._carry_out(parts.servers)
        without: dict[Key, str] = {}
        if refused:
            for request in parts.destinations:
                key = request.subject
                if isinstance(key, Destination) and key.server in refused:
                    without[key] = refused[key.server]
        destinations = [r for r in parts.destinations if r.subject not in without]
        _ipvs, leads = self._sockets()
        refused |= without | self._carry_out(destinations)
        return refused | self._addresses.bind(parts.addresses, leads)

    def _shrink(self, parts: Parts) -> None:
        self._carry_out(parts.shrink)
        self._finish(parts.touched if len(parts.touched) <= AT_ONCE else ())

    def _take_away(self, key: Key, parts: Parts) -> None:
        """Let a server go, or a destination: at once, or when its last connection ends."""
        if isinstance(key, LocalAddress):
            self._addresses.release(key)
        elif isinstance(key, Frontend):
            self._doomed.add(key)
            parts.touched.add(key)
        elif isinstance(key, Destination):
            parts.touched.add(key.server)
            if not self._drains(key.server):
                parts.shrink.append(nl.delete_destination(key))
            else:
                parts.shrink.append(nl.set_destination(key, 0))
                until = self._clock.monotonic() + self._settings.drain_seconds
                self._draining.setdefault(key.server, {})[key.address] = until

    def _drains(self, server: Frontend) -> bool:
        """Say whether destinations of a server wait for the end of their connections."""
        held = self._held.get(server)
        scheduler = held.server.scheduler if held is not None else ""
        return server.proto != "UDP" and scheduler not in WITHOUT_DRAINING

    def _finish(self, servers: Iterable[Frontend]) -> None:
        """Delete what is idle, or has had its time, of what shall go; then what nobody needs."""
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
        _ipvs, leads = self._sockets()
        self._addresses.unbind(leads, {server.ip for server in self._doomed})

    def _drained(self, server: Frontend, *, doomed: bool) -> list[Address]:
        """Return the destinations that are waited for no more."""
        waiting = self._draining.get(server, {})
        ipvs, _leads = self._sockets()
        busy = ipvs.destinations(server) if waiting else {}
        now = self._clock.monotonic()
        done = [
            address
            for address, until in waiting.items()
            if now >= until or address not in busy or busy[address].is_idle(doomed=doomed)
        ]
        for address in done:
            del waiting[address]
        return done

    def _carry_out(self, requests: list[Request]) -> dict[Key, str]:
        """Make the changes; return what cannot be made new. Raises ``OSError`` for all else."""
        if not requests:
            return {}
        ipvs, _leads = self._sockets()
        refused: dict[Key, str] = {}
        again: list[Request] = []
        failed = ipvs.carry_out(requests)
        not_done = {request.subject for request, _code in failed}
        for request in requests:
            if request.subject not in not_done:
                self._remember(request)
        for request, code in failed:
            if code == errno.EEXIST and not self._spares(request.subject):
                again.append(replace(request, command=AS_SET[request.command]))
            elif request.command in AS_SET:
                refused[request.subject] = nl.why_not(request, code)
            elif request.command not in (nl.DEL_SERVICE, nl.DEL_DEST) or code not in GONE:
                raise OSError(code, f"{os.strerror(code)}: {request.subject}")
        return refused | (self._carry_out(again) if again else {})

    def _spares(self, subject: Frontend | Destination) -> bool:
        """Say whether a virtual server that is there is somebody else's, and has to stay."""
        if not isinstance(subject, Frontend) or not self._settings.excluded:
            return False
        address = ip_address(subject.ip)
        return any(address in network for network in self._settings.excluded)

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

    def _sockets(self) -> tuple[Ipvs, Leads]:
        if self._ipvs is None or self._leads is None:
            self._ipvs, self._leads = self._connect()
        return self._ipvs, self._leads


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


def delete_all(family: Family) -> None:
    """Delete our virtual servers and routes, whichever process made them."""
    vips = Vips(family, None, mark=RTPROT_IPVS)
    try:
        vips.clear()
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
