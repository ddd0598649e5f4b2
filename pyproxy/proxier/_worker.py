"""A worker process: carries the traffic that comes in by its own pair of shared sockets.

It has all frontends that any worker may serve. When the process that plans is gone, it goes on
with the last it was told, and so do the others: somebody looks after each pair, whoever has the
lock of its number. Some time later, or when a successor has taken over, it ends.
"""

import asyncio
import fcntl
import gc
import logging
import os
import signal
import socket
from collections import Counter
from collections.abc import Coroutine, Sequence
from pathlib import Path

from msgspec.structs import astuple

from pyproxy.counters import NOTHING, Counts
from pyproxy.model import Address, Frontend, Proto, Route
from pyproxy.proxier._asleep import Asleep
from pyproxy.proxier._channel import (
    ORDERS,
    Admit,
    Begin,
    Channel,
    Connections,
    Count,
    Counted,
    Done,
    Flows,
    Leave,
    Locate,
    Located,
    Look,
    Observed,
    Order,
    Stop,
    Update,
)
from pyproxy.proxier._dataplane import DataPlane
from pyproxy.proxier._given import Entrances, connections_of, flows_of
from pyproxy.proxier._handover import Handover
from pyproxy.proxier._leftover import ANOTHER_SERVES
from pyproxy.proxier._netlink import Netlink
from pyproxy.proxier._sockets import Shared
from pyproxy.proxier._succession import worker_place
from pyproxy.rules.listener_bytes import PackedOwner, surroundings_of
from pyproxy.rules.listeners import Surroundings

ALONE_SECONDS = 60.0  # without the process that plans: what is served may be long out of date
LOOK_SECONDS = 0.2  # for pairs of others that are gone, too
TELL_SECONDS = 0.5  # until results of connections are told

log = logging.getLogger(__name__)


class Worker:
    """One family's data plane in a process of its own."""

    def __init__(self, begin: Begin, fds: Sequence[int], sock: socket.socket) -> None:
        self._number = begin.number
        self._lock, *pairs = fds
        opened = [socket.socket(fileno=fd) for fd in pairs]
        self._doors = [Shared(*opened[at : at + 2]) for at in range(0, len(opened), 2)]
        self._around = Surroundings()
        self._plane = DataPlane(begin.manner, lambda: self._around, self._observe)
        self._capture = Doors(self._doors)
        self._plane.open(self._capture, {}, checks_ports=False)
        self._asleep = Asleep(self._plane)
        self._plane.fronts.wake = self._asleep.wake
        if self._plane.transparent is not None:
            self._plane.transparent.join(Netlink())
        self._results: Counter[tuple[Proto, str]] = Counter()
        self._telling: asyncio.TimerHandle | None = None
        self._is_alone = asyncio.Event()
        self._stop = asyncio.Event()
        self._was_told = self._is_superseded = False
        self._leave_within: float | None = None  # seconds, if the process that plans said so
        self._loop = asyncio.get_running_loop()
        self._handover = Handover(
            worker_place(Path(begin.place), begin.number),
            lambda: Entrances(self._doors),
            self._plane.retire,
            self._plane.surrender,
        )
        self._channel = Channel(sock, self._hear, self._is_alone.set)

    async def run(self) -> None:
        """Serve until told to end, or for some time after nobody is there to tell."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._told_to_end)
        self._loop.add_signal_handler(ANOTHER_SERVES, self._told_of_another)
        try:
            self._handover.open()
        except OSError as error:
            fields = {"worker": self._number, "reason": str(error)}
            log.info("no successor will take over from this worker", extra=fields)
        self._channel.send(Done())
        ends = (self._stop.wait(), self._is_alone.wait(), self._handover.done.wait())
        await first(*ends)
        if self._is_alone.is_set() and not self._handover.has_begun:
            await self._serve_alone()
        if self._handover.has_begun:
            await self._handover.done.wait()
        self._handover.close()
        self._plane.close_all()

    async def _serve_alone(self) -> None:
        """Go on for some time, also for those who are gone."""
        seconds = self._leave_within
        if seconds is None:
            if self._was_told:
                return
            seconds = ALONE_SECONDS
            fields = {"worker": self._number, "seconds": seconds}
            log.warning("the process that plans is gone: serving on by its last word", extra=fields)
        until = self._loop.time() + seconds
        while self._loop.time() < until and not self._handover.has_begun:
            if self._is_superseded:
                await self._fade(until - self._loop.time())
                return
            for number, door in enumerate(self._doors, 1):
                if self._has_lock(number):
                    self._plane.fronts.admit(door)
            if await first(self._stop.wait(), self._handover.done.wait(), within=LOOK_SECONDS):
                return

    async def _fade(self, seconds: float) -> None:
        """Let nobody in any more: another process does, which has not found us."""
        log.info("others serve: ending with the last connection", extra={"worker": self._number})
        self._capture.let_go()
        await asyncio.sleep(LOOK_SECONDS)  # for those who were here before
        self._plane.fronts.retire()
        await first(self._plane.tcp.drained(), self._stop.wait(), within=seconds)

    def _told_of_another(self) -> None:
        self._is_superseded = self._is_alone.is_set()

    def _told_to_end(self) -> None:
        """End at once if nobody else says when: what is told to all is told to who plans, too."""
        self._was_told = True
        if self._is_alone.is_set() and self._leave_within is None:
            self._stop.set()

    def _has_lock(self, number: int) -> bool:
        """Say whether it is for us to look after a pair. A lock goes with its process."""
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError:
            return False
        return True

    # --- what is asked --------------------------------------------------------------------------

    def _hear(self, message: bytes, fds: list[int]) -> None:
        order = ORDERS.decode(message)
        match order:
            case Look(around):
                self._around = surroundings_of(around)
            case Update(owners):
                for owner in owners:
                    self._update(owner)
                self._channel.send(Done())
            case Admit():
                self._capture.kept += fds
                self._has_lock(self._number)
                self._plane.fronts.admit(self._doors[self._number - 1])
                gc.freeze()  # what there is by now is there to stay
            case Count():
                self._channel.send(Counted(self._counted()))
            case Locate():
                self._channel.send(Located(frozenset(self._plane.tcp.local_ips())))
            case Stop():
                self._stop.set()
            case _:
                self._go_on(order, fds)

    def _go_on(self, order: Order, fds: list[int]) -> None:
        """Go on without the process that plans, or with what another process has given."""
        match order:
            case Leave(seconds):
                self._leave_within = seconds
            case Connections(described):
                for connection in connections_of(described, fds):
                    self._plane.tcp.take_over(connection)
            case Flows(described):
                for flow in flows_of(described, fds):
                    self._plane.fronts.take_flow(flow)
            case _:
                raise AssertionError("nothing else is said to one that has begun")

    def _update(self, packed: PackedOwner) -> None:
        for frontend, why in self._asleep.update(packed).items():
            log.error("not served", extra={"frontend": str(frontend), "error": why})

    def _counted(self) -> tuple[tuple[Frontend, Address | None, Counts], ...]:
        return tuple(
            (entry.key, entry.endpoint, entry.counts)
            for entry in self._plane.entries()
            if any(astuple(entry.counts))
        )

    # --- what is told ---------------------------------------------------------------------------

    def _observe(self, proto: Proto, result: str) -> None:
        self._results[proto, result] += 1
        if self._telling is None:
            self._telling = self._loop.call_later(TELL_SECONDS, self._tell)

    def _tell(self) -> None:
        self._telling = None
        results = tuple((*what, count) for what, count in self._results.items())
        self._results.clear()
        self._channel.send(Observed(results))


class Doors:
    """The sockets that packets for frontends come to. Another process leads them there."""

    def __init__(self, doors: Sequence[Shared]) -> None:
        self.doors = doors
        self.kept: list[int] = []

    def takes(self, route: Route) -> bool:
        return True

    def put(self, frontend: Frontend, route: Route, *, foreign: bool) -> None: ...
    def drop(self, frontend: Frontend) -> None: ...

    def refused(self, frontend: Frontend) -> Counts:
        return NOTHING  # the kernel counts it once for all

    def commit(self) -> None: ...
    def silence(self, ip: str) -> None: ...
    def unsilence(self, ip: str) -> None: ...
    def surround(self, around: Surroundings, node_port_ips: Sequence[str] | None) -> None: ...

    def close(self) -> None:
        for pair in self.doors:
            pair.close()
        self.let_go()

    def let_go(self) -> None:
        """Have packets led here no more, as far as it depends on this process."""
        for fd in self.kept:
            os.close(fd)
        self.kept.clear()

    leave = close


async def first(*waits: Coroutine[object, object, object], within: float | None = None) -> bool:
    """Wait until one of them is over, and say so; or for so many seconds."""
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(wait) for wait in waits]
    over, others = await asyncio.wait(tasks, timeout=within, return_when=asyncio.FIRST_COMPLETED)
    for task in others:
        task.cancel()
    return bool(over)
