"""Runs the sync neither too often nor too seldom."""

import asyncio
from collections.abc import Awaitable, Callable

from msgspec import Struct


class Pace(Struct, frozen=True):
    """How often to sync, in seconds, measured from the end of one sync to the start of the next.

    At most one each ``min_interval``; again after ``retry_interval`` when one failed; and at
    least one each ``max_interval``, which is a full one.
    """

    min_interval: float
    retry_interval: float
    max_interval: float


class Runner:
    """Calls ``sync`` when something was requested, retries it, and repeats it in full at times.

    ``sync`` is told whether a full one is due, and says whether it succeeded. Any number of
    requests while one waits are one.
    """

    def __init__(
        self,
        pace: Pace,
        sync: Callable[[bool], Awaitable[bool]],
        clock: Callable[[], float],
    ) -> None:
        assert pace.max_interval >= pace.min_interval, "a sync would be due before it may run"
        self._pace = pace
        self._sync = sync
        self._clock = clock
        self._requested = asyncio.Event()
        self._ended_at = -pace.min_interval
        self._full_at = clock() + pace.max_interval
        self._retry_at: float | None = None

    def request(self) -> None:
        """Ask for a sync, soon."""
        self._requested.set()

    async def run(self) -> None:
        """Run for ever; the first request is served at once."""
        self._ended_at = self._clock() - self._pace.min_interval
        while True:
            await self._due()
            self._requested.clear()
            full = self._clock() >= self._full_at
            ok = await self._sync(full)
            now = self._ended_at = self._clock()
            if full:  # of one that failed, the retry is full by itself
                self._full_at = now + self._pace.max_interval
            delay = min(self._pace.retry_interval, self._pace.max_interval)
            self._retry_at = None if ok else now + delay

    async def _due(self) -> None:
        """Return when a sync is to run: it is asked for or overdue, and not too early."""
        overdue_at = self._full_at if self._retry_at is None else self._retry_at
        try:
            async with asyncio.timeout(max(0.0, overdue_at - self._clock())):
                await self._requested.wait()
        except TimeoutError:
            pass
        early = self._ended_at + self._pace.min_interval - self._clock()
        if early > 0:
            await asyncio.sleep(early)
