"""One family's way from changes to its proxier: cache, planner, runner."""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from msgspec import structs

from pyproxy.cache import Cache, Owners
from pyproxy.model import Change, Family, HealthPort, Kind, ObjectName
from pyproxy.plan import Plan, Planner, Site
from pyproxy.progress import Progress
from pyproxy.reconcile import Clock, Proxier
from pyproxy.report import SyncReport
from pyproxy.runner import Pace, Runner

log = logging.getLogger(__name__)


class Observer(Protocol):
    """Who wants to know of syncs: health, metrics, the log."""

    def requested(self, family: Family) -> None: ...
    def synced(self, report: SyncReport) -> None: ...


class Lane:
    """Collects what changed, and has it planned and written when the runner says so.

    Nothing is written before ``start``: a half-filled cache is not a cluster.
    """

    def __init__(
        self,
        family: Family,
        cache: Cache,
        pace: Pace,
        clock: Clock,
        observer: Observer,
        on_success: Callable[[], object],
    ) -> None:
        self.family: Family = family
        self.first_sync = asyncio.Event()
        self.progress = Progress()
        self.cache = cache
        self._planner = Planner()
        self._runner = Runner(pace, self._contained, clock.monotonic)
        self._observer = observer
        self._on_success = on_success
        self._pending: Owners = set()
        self.site: Site | None = None
        self._proxier: Proxier | None = None

    def change(self, change: Change) -> bool:
        """Take in a change; say whether it concerns this family."""
        owners = self.cache.apply(change)
        if owners:
            self._pending |= owners
            self.progress.noted(owners)
            self._request()
        return bool(owners)

    def move(self, site: Site) -> None:
        """Take in that the node is elsewhere, or another address is its: plan everything anew."""
        if site != self.site:
            self.site = site
            self._pending.update(self.cache.owners())
            self.progress.noted(self._pending)
            self._request()

    def resync(self) -> None:
        """Have everything compared with what the mode's target really holds, soon."""
        if self._proxier is not None:
            self._proxier.distrust()
            self._request()

    def start(self, proxier: Proxier) -> None:
        """Begin to write; the first sync is due at once."""
        self._proxier = proxier
        self._request()

    async def run(self) -> None:
        await self._runner.run()

    @property
    def plan(self) -> Plan:
        return self._planner.plan

    def health_ports(self) -> dict[ObjectName, HealthPort]:
        return self._planner.plan.health_ports()

    def written(self, kind: Kind) -> int:
        """Return up to which ``resourceVersion`` all objects of a kind are written; 0: unknown."""
        return self.progress.written(self.cache.versions).get(kind, 0)

    def _request(self) -> None:
        if self._proxier is not None:
            self._observer.requested(self.family)
            self._runner.request()

    async def _contained(self, full: bool) -> bool:
        """Sync. A mistake of ours in it is told and tried again, in full: it ends no process.

        What is written carries traffic meanwhile, in mode userspace only as long as we live; and
        an object that one mode cannot take must not end all the others.
        """
        due = set(self._pending)
        try:
            return await self._sync(full)
        except Exception as error:
            log.exception("sync crashed", extra={"family": f"IPv{self.family}"})
            self.progress.error = f"{type(error).__name__}: {error}"
            self._pending |= due
            assert self._proxier is not None, "start comes first"
            self._proxier.distrust()
            return False

    async def _sync(self, full: bool) -> bool:
        """Plan what changed and write it; say whether nothing is left to be tried again."""
        assert self._proxier is not None, "start comes first"
        assert self.site is not None, "the site is known by then"
        if full:
            self._proxier.distrust()
        pending, self._pending = self._pending, set()
        triggered_at = self.cache.take_triggers()
        changed = self._planner.update(pending, self.cache, self.site)
        self.progress.planned(changed, self.cache.versions)
        report = await self._proxier.sync(self._planner.plan, changed)
        self.progress.synced(report, self._planner.plan.ports)
        self._observer.synced(structs.replace(report, triggered_at=triggered_at))
        if report.error is None:
            self.first_sync.set()
            self._on_success()
        return report.error is None and not (report.unserved or report.failed)
