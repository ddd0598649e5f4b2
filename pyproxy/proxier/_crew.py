"""The worker processes of one family: starts them, tells them what changes, and stands in for them.

Each worker looks after one pair of shared sockets. This process has all pairs, too, so that a
worker that ends loses its own connections and nobody else's: until another is there, who comes
in by its pair is served here.
"""

import asyncio
import gc
import logging
import os
import socket
import subprocess
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import pyproxy
from pyproxy import child
from pyproxy.config import Logging
from pyproxy.counters import Counts, Entry, total
from pyproxy.model import Address, Frontend, ServicePortName
from pyproxy.proxier._channel import (
    Admit,
    Begin,
    Connections,
    Count,
    Counted,
    Flows,
    Leave,
    Locate,
    Located,
    Look,
    Stop,
    Update,
)
from pyproxy.proxier._dataplane import DataPlane, Manner, Observe
from pyproxy.proxier._given import Given, GivenFlow, connection_messages, flow_messages
from pyproxy.proxier._leftover import words
from pyproxy.proxier._member import Member, Sums
from pyproxy.rules.listener_bytes import packed_owner, packed_surroundings
from pyproxy.rules.listeners import Surroundings

OWNERS_AT_ONCE = 100  # in a message
READY_SECONDS = 5.0  # that a first sync waits for workers
BACKOFF_SECONDS = (0.1, 30.0)  # from the end of a worker to the next start, doubled each time
STEADY_SECONDS = 60.0  # a worker that lived so long did not fail at its start
END_SECONDS = 10.0  # until a worker that should end is killed

log = logging.getLogger(__name__)


class Jobs(Protocol):
    """Where tasks live."""

    def create_task(
        self, job: Coroutine[object, object, None], /, *, name: str | None = None
    ) -> "asyncio.Task[None]": ...


class Crew:
    """All workers of one family. With none, everything is served in this process."""

    def __init__(
        self,
        plane: DataPlane,
        surroundings: Callable[[], Surroundings],
        observe: Observe,
        lost: Callable[[], None],
    ) -> None:
        """``lost`` is told that a worker has ended by itself."""
        self._count = 0
        self._plane = plane
        self._surroundings = surroundings
        self._observe = observe
        self._lost = lost
        self._members: dict[int, Member] = {}
        self._changed: set[ServicePortName] = set()
        self._past: dict[Frontend, Sums] = {}  # of workers that have ended
        self._admits = False
        self._next = 0
        self._settled = asyncio.Event()
        self._lock = -1  # until there are workers
        self._keepers: list[asyncio.Task[None]] = []

    def start(
        self, count: int, tasks: Jobs, place: Path, manner: Manner, logging_: Logging
    ) -> None:
        """Start so many workers, and have each replaced that ends."""
        self._count = count
        if count:
            # Whoever has locked the byte of a pair looks after it when this process is gone.
            self._lock = os.memfd_create("pyproxy")
        for number in range(1, self._count + 1):
            job = self._keep(number, place, manner, logging_)
            name = f"worker {number} IPv{manner.family}"
            self._keepers.append(tasks.create_task(job, name=name))

    @property
    def is_complete(self) -> bool:
        return len(self._ready()) == self._count

    @property
    def serves_all(self) -> bool:
        """Say whether workers serve everybody, by all shared sockets."""
        if not (self._count and self.is_complete and self._admits):
            return False
        return not self._plane.fronts.sockets and not self._plane.fronts.entrances().own

    async def settle(self) -> None:
        """Wait until all workers can serve, or for as long as that should take."""
        if not self.is_complete:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), READY_SECONDS)

    # --- who serves ---------------------------------------------------------------------------

    def admit(self) -> None:
        """Let clients in by all pairs of sockets, each at whoever looks after it."""
        self._admits = True
        for number, door in enumerate(self._plane.fronts.capture.doors, 1):
            member = self._ready().get(number)
            if member is not None:
                member.tell(Admit(), self._plane.fronts.capture.kept)
            else:
                self._plane.fronts.admit(door)

    def take_flow(self, given: GivenFlow, number: int) -> None:
        """Go on with a flow of a worker of this number, whose datagrams come by its pair."""
        member = self._ready().get(number)
        if member is None:
            self._plane.fronts.take_flow(given)
            return
        for message, fds in flow_messages([given]):
            member.tell(Flows(message), fds)
        given.close()

    def take_connection(self, given: Given) -> None:
        """Go on with a connection: each at the next of us."""
        ready = list(self._ready().values())
        if not ready:
            self._plane.tcp.take_over(given)
            return
        self._next += 1
        for message, fds in connection_messages([given]):
            ready[self._next % len(ready)].tell(Connections(message), fds)
        given.close()

    # --- what is served -----------------------------------------------------------------------

    def changed(self, owners: Iterable[ServicePortName]) -> None:
        """Take note that owners have other frontends, or others behind them."""
        if self._count:
            self._changed.update(owners)

    def look(self) -> None:
        """Tell all where connections come from by now."""
        around = packed_surroundings(self._surroundings())
        for member in self._members.values():
            member.tell(Look(around))

    async def flush(self) -> None:
        """Return when all workers have what has changed, in parts that leave time for others."""
        changed, self._changed = list(self._changed), set()
        members = list(self._members.values())
        if changed and members:
            await asyncio.gather(*(self._bring(member, changed) for member in members))

    async def _bring(self, member: Member, owners: Sequence[ServicePortName]) -> None:
        for start in range(0, len(owners), OWNERS_AT_ONCE):
            some = owners[start : start + OWNERS_AT_ONCE]
            fronts = self._plane.fronts
            packed = tuple(packed_owner(owner, fronts.taken_of(owner)) for owner in some)
            if await member.ask(Update(packed)) is None:
                return

    async def local_ips(self) -> set[str]:
        """Return the addresses of this node that open connections are at, wherever they are."""
        answers = await asyncio.gather(*(m.ask(Locate()) for m in list(self._members.values())))
        elsewhere = (answer.ips for answer in answers if isinstance(answer, Located))
        return self._plane.tcp.local_ips().union(*elsewhere)

    # --- what was carried -----------------------------------------------------------------------

    async def entries(self) -> Iterator[Entry[Frontend]]:
        """Return what has been carried here and by all workers, also those that have ended."""
        members = list(self._ready().values())
        await asyncio.gather(*(self._read(member) for member in members))
        found: dict[tuple[Frontend, Address | None], list[Counts]] = {}
        for entry in self._plane.entries():
            found[entry.key, entry.endpoint] = [entry.counts]
        known = {frontend for frontend, _endpoint in found}
        for counts in (*self._past.values(), *(member.counts for member in members)):
            for key, each in counts.items():
                if key[0] in known:
                    found.setdefault(key, []).append(each)
        return (
            Entry(*key, total(each) if len(each) > 1 else each[0]) for key, each in found.items()
        )

    async def _read(self, member: Member) -> None:
        answer = await member.ask(Count())
        if isinstance(answer, Counted):
            member.counts = {(key, endpoint): counts for key, endpoint, counts in answer.entries}

    def forget(self, frontends: Iterable[Frontend]) -> None:
        """Take note that frontends are no more: what comes at the same place begins anew."""
        for frontend in frontends:
            self._past.pop(frontend, None)

    def _remember(self, member: Member) -> None:
        for (frontend, endpoint), counts in member.counts.items():
            past = self._past.setdefault(frontend, {})
            key = (frontend, endpoint)
            past[key] = total((past[key], counts)) if key in past else counts

    # --- the processes --------------------------------------------------------------------------

    async def _keep(self, number: int, place: Path, manner: Manner, logging_: Logging) -> None:
        """Have a worker of this number, until a successor serves."""
        loop = asyncio.get_running_loop()
        shortest, longest = BACKOFF_SECONDS
        pause = shortest
        while not self._plane.fronts.is_retired:
            began = loop.time()
            try:
                member = await self._started(number, manner)
            except OSError as error:
                log.error("no worker", extra={"worker": number, "error": str(error)})
            else:
                self._members[number] = member
                await self._see_to(member, self._begin(number, place, manner, logging_))
                code = await asyncio.to_thread(member.process.wait)
                del self._members[number]
                if self._plane.fronts.is_retired:
                    return
                self._lost()
                fields = {"worker": number, "code": code, "pid": member.process.pid}
                log.error("a worker has ended; this process stands in", extra=fields)
            if loop.time() - began > STEADY_SECONDS:
                pause = shortest
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _see_to(self, member: Member, begin: Begin) -> None:
        """Bring a worker up, let it serve, and stand in for it when it has ended."""
        fronts = self._plane.fronts
        if await member.ask(begin, self._descriptors()) is not None:
            member.tell(Look(packed_surroundings(self._surroundings())))
            await self._bring(member, fronts.owners())
        if not member.ended.is_set():
            self._serves(member)
        await member.ended.wait()
        self._remember(member)
        if self._admits and not fronts.is_retired:
            fronts.admit(fronts.capture.doors[member.number - 1])

    def _serves(self, member: Member) -> None:
        member.is_ready = True
        if self._admits:
            fronts = self._plane.fronts
            fronts.leave_to_others(fronts.capture.doors[member.number - 1])
            member.tell(Admit(), fronts.capture.kept)
        if self.is_complete:
            self._settled.set()

    async def _started(self, number: int, manner: Manner) -> Member:
        """Start a process. Raises ``OSError``."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                process = await asyncio.to_thread(
                    subprocess.Popen,
                    child.command(*words(manner.family, theirs.fileno())),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # what a terminal tells all is for us to pass on
                    env=child.environment(),
                )
            except OSError:
                ours.close()
                raise
        return Member(number, process, ours, self._observe)

    def _begin(self, number: int, place: Path, manner: Manner, logging_: Logging) -> Begin:
        return Begin(
            version=pyproxy.__version__,
            number=number,
            pairs=len(self._plane.fronts.capture.doors),
            place=str(place),
            manner=manner,
            logging=logging_,
            collector=gc.get_threshold(),
        )

    def _descriptors(self) -> list[int]:
        capture = self._plane.fronts.capture
        pairs = [sock.fileno() for pair in capture.doors for sock in pair]
        return [self._lock, *pairs]

    def _ready(self) -> dict[int, Member]:
        return {n: member for n, member in self._members.items() if member.is_ready}

    async def aclose(self, *, is_over: bool) -> None:
        """Have all workers end. If a successor serves, it takes over from each, which then ends."""
        for keeper in self._keepers:
            keeper.cancel()
        members = list(self._members.values())
        if not is_over:
            for member in members:
                member.tell(Stop())
        await asyncio.gather(*(self._end(member) for member in members))
        self._unlock()

    def leave(self, seconds: float) -> None:
        """Let go of all workers, which serve on for so long."""
        for keeper in self._keepers:
            keeper.cancel()
        for member in self._members.values():
            member.tell(Leave(seconds))
            member.close()
        self._unlock()

    def _unlock(self) -> None:
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    async def _end(self, member: Member) -> None:
        try:
            await asyncio.to_thread(member.process.wait, END_SECONDS)
        except subprocess.TimeoutExpired:
            member.kill()
            await asyncio.to_thread(member.process.wait)
        member.close()
