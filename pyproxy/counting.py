"""Reads the counters of all families when somebody asks: a scrape of metrics, or a command."""

import asyncio
import logging
from collections.abc import Mapping

from pyproxy.counters import Counts, Reading, Tally, Where, merged
from pyproxy.model import Family
from pyproxy.reconcile import ApplyError, Proxier
from pyproxy.service_metrics import ServiceMetrics

ATTEMPTS = 5  # to read between two syncs: to list all rules may take seconds
PAUSE_SECONDS = 0.2
FRESH_SECONDS = 0.5  # what was read a moment ago is read once for all who ask

log = logging.getLogger(__name__)


class Counting:
    """Everything that was counted, summed over families. Nothing is read until somebody asks."""

    def __init__(self, carriers: Mapping[Family, Proxier]) -> None:
        self._carriers = carriers
        self._tallies: dict[Family, Tally] = {}
        self._read: dict[Family, dict[Where, Counts]] = {}
        self._problems: dict[Family, str] = {}
        self._fresh_until = 0.0
        self._had_endpoints = False
        self._reading = asyncio.Lock()
        self._told: frozenset[str] = frozenset()

    @property
    def problems(self) -> tuple[str, ...]:
        """Why something is not counted, or is as of an earlier reading."""
        return tuple(dict.fromkeys(self._problems.values()))

    async def traffic(self, *, by_endpoint: bool) -> dict[Where, Counts]:
        """Return what went to each Service port, and with ``by_endpoint`` to each endpoint."""
        async with self._reading:
            now = asyncio.get_running_loop().time
            if now() >= self._fresh_until or by_endpoint > self._had_endpoints:
                for family, carrier in self._carriers.items():
                    await self._look(family, carrier, by_endpoint=by_endpoint)
                self._had_endpoints = by_endpoint
                self._fresh_until = now() + FRESH_SECONDS
            return merged(self._read.values())

    async def publish(self, metrics: ServiceMetrics, *, by_endpoint: bool) -> None:
        """Have metrics tell what there is now. What cannot be read stays as it was."""
        traffic = await self.traffic(by_endpoint=by_endpoint)
        await asyncio.to_thread(metrics.publish, traffic)
        problems = frozenset(self.problems)
        for problem in problems - self._told:
            log.warning("Services are not counted", extra={"problem": problem})
        self._told = problems

    async def _look(self, family: Family, carrier: Proxier, *, by_endpoint: bool) -> None:
        try:
            reading = await settled(carrier, by_endpoint=by_endpoint)
        except ApplyError as error:
            self._problems[family] = str(error)
            return
        if reading is None:
            self._problems[family] = "syncs follow each other too fast to read counters"
            return
        self._problems.pop(family, None)
        tally = self._tallies.setdefault(family, Tally())
        self._read[family] = await asyncio.to_thread(tally.take, reading, by_endpoint=by_endpoint)


async def settled(carrier: Proxier, *, by_endpoint: bool) -> Reading | None:
    """Read what a proxier has counted, between two syncs. Raises ``ApplyError``."""
    for _attempt in range(ATTEMPTS):
        reading = await carrier.counters(by_endpoint=by_endpoint)
        if reading is not None:
            return reading
        await asyncio.sleep(PAUSE_SECONDS)
    return None
