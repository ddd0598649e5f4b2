"""Passes on what happens: syncs and changes to health, metrics and the log."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection

from pyproxy.health import Health
from pyproxy.log import vlog
from pyproxy.metrics import Metrics
from pyproxy.model import (
    ApiObject,
    Change,
    EndpointSlice,
    Family,
    Kind,
    ObjectName,
    Proto,
    Remove,
    Replace,
    Service,
    Upsert,
)
from pyproxy.report import SyncReport

SHOWN = 5  # of a list of troubles, in one line of the log
EVENT_SECONDS = 300.0  # from one Event about a table to the next

log = logging.getLogger(__name__)


class Telemetry:
    """The observer of all lanes. Trouble is told when it begins and when it ends."""

    def __init__(self, health: Health, metrics: Metrics, unix: Callable[[], float]) -> None:
        self._health = health
        self._metrics = metrics
        self._unix = unix
        self._failing: dict[Family, str] = {}
        self._trouble: dict[tuple[str, Family], frozenset[str]] = {}
        self._pending_services = 0
        self._pending_endpoints = 0
        self._warned: dict[tuple[Kind, ObjectName], tuple[str, ...]] = {}

    def started(self, family: Family) -> None:
        now = self._unix()
        self._health.started(family, now)
        self._metrics.request_queued(family, now)

    def requested(self, family: Family) -> None:
        now = self._unix()
        self._health.queued(family, now)
        self._metrics.request_queued(family, now)

    def synced(self, report: SyncReport) -> None:
        self._health.synced(report, self._unix())
        self._metrics.observe_sync(report)
        self._metrics.pending(0, 0)
        self._pending_services = self._pending_endpoints = 0
        if report.mode == "userspace":
            self._metrics.frontends(report.family, report.served, len(report.unserved))
        vlog(
            log,
            2,
            "synced",
            family=f"IPv{report.family}",
            full=report.full,
            seconds=round(report.seconds, 6),
            ports=report.owners,
            added=report.added,
            changed=report.changed,
            removed=report.removed,
        )
        self._tell_of_failure(report)
        self._tell_of("not served", report.family, report.unserved)
        self._tell_of("frontend wanted twice", report.family, report.conflicts)
        mistakes = [f"{owner}: {why}" for owner, why in report.failed.items()]
        self._tell_of("Services stay as they were", report.family, mistakes, logging.ERROR)

    def changed(self, change: Change) -> None:
        """Count a change, and log what was odd about its objects, once."""
        match change:
            case Upsert(kind=kind, obj=obj):
                self._warn_of(kind, obj)
            case Replace(kind=kind, objects=objects):
                for obj in objects:
                    self._warn_of(kind, obj)
            case Remove(kind=kind, name=name):
                self._warned.pop((kind, name), None)

    def counted(self, change: Change, family: Family, *, concerned: bool) -> None:
        """Count a change; if it ``concerned`` a Service port, it waits for the next sync."""
        events = events_of(change, family, concerned=concerned)
        if change.kind == "Service":
            self._metrics.service_change(family, events)
            self._pending_services += concerned
        elif change.kind == "EndpointSlice":
            self._metrics.endpoint_change(family, events)
            self._pending_endpoints += concerned
        self._metrics.pending(self._pending_services, self._pending_endpoints)

    def drifted(self, family: Family, count: int, who: str) -> None:
        self._metrics.count("pyproxy_rules_repaired_total", f"IPv{family}", by=count)
        fields = {"family": f"IPv{family}", "repaired": count, "by": who}
        log.warning("our rules were changed", extra=fields)

    def connection(self, proto: Proto, result: str) -> None:
        match result:
            case "closed":
                self._metrics.connection_ended(proto)
            case "forwarded" | "dial_failed" | "no_endpoint":
                self._metrics.connection(proto, result)
            case _:
                raise AssertionError(f"no metric counts connections {result}")

    def _warn_of(self, kind: Kind, obj: ApiObject) -> None:
        if not isinstance(obj, Service | EndpointSlice):
            return
        key = (kind, obj.name)
        if obj.warnings and self._warned.get(key) != obj.warnings:
            for warning in obj.warnings:
                log.warning("ignored", extra={"object": f"{kind} {obj.name}", "problem": warning})
            self._warned[key] = obj.warnings
        elif not obj.warnings:
            self._warned.pop(key, None)

    def _tell_of_failure(self, report: SyncReport) -> None:
        before = self._failing.pop(report.family, None)
        if report.error is not None:
            self._failing[report.family] = report.error
            if report.error != before:
                log.error(
                    "sync failed", extra={"family": f"IPv{report.family}", "error": report.error}
                )
        elif before is not None:
            log.info("sync works again", extra={"family": f"IPv{report.family}"})

    def _tell_of(
        self, event: str, family: Family, lines: Collection[str], level: int = logging.WARNING
    ) -> None:
        before = self._trouble.get((event, family), frozenset())
        if not lines and not before:
            return
        now = frozenset(lines)
        self._trouble[event, family] = now
        if now - before:
            new = sorted(now - before)
            log.log(level, event, extra={"count": len(new), "which": "; ".join(new[:SHOWN])})
        if before - now:
            log.info("over", extra={"trouble": event, "count": len(before - now)})


class Drifts:
    """Events about tables that others change: the first at once, then one for all of a while.

    Who fights with us for a table may do so several times a second, on every node.
    """

    def __init__(self, record: Callable[[str], Awaitable[None]]) -> None:
        self._record = record
        self._untold: dict[tuple[str, Family], Counter[str]] = {}  # of whom there was an Event

    def noted(
        self, tasks: asyncio.TaskGroup, table: str, family: Family, count: int, who: str
    ) -> None:
        key = (table, family)
        is_new = key not in self._untold
        self._untold.setdefault(key, Counter())[who] += count
        if is_new:
            tasks.create_task(self._tell(key), name=f"events of {table}")

    async def _tell(self, key: tuple[str, Family]) -> None:
        table, family = key
        while found := self._untold[key]:
            self._untold[key] = Counter()
            who = ", ".join(name for name, _ in found.most_common(SHOWN))
            count = found.total()
            await self._record(
                f"{count} rules in table {table} (IPv{family}) were changed by {who}"
            )
            await asyncio.sleep(EVENT_SECONDS)
        del self._untold[key]


def events_of(change: Change, family: Family, *, concerned: bool) -> int:
    """Return how many events a change is to a family: a list is one for each object.

    A slice is of one family. Of one that is gone only the name is known, and whom it concerned.
    """
    match change:
        case Upsert(obj=obj):
            return int(_is_of(obj, family))
        case Replace(objects=objects):
            return sum(_is_of(obj, family) for obj in objects)
        case Remove(kind=kind):
            return int(concerned or kind != "EndpointSlice")


def _is_of(obj: ApiObject, family: Family) -> bool:
    return not isinstance(obj, EndpointSlice) or obj.family == family
