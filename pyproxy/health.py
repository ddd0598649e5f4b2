"""Folds change times and sync reports into what the health endpoints answer.

A family is unhealthy only while work waits for it longer than the limit. Without waiting work it
is healthy for ever: losing the API server must not take a node's working rules out of service.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from pyproxy.model import Family, Node, ObjectName
from pyproxy.report import SyncReport

JSON_HEADERS: Mapping[str, str] = {
    "Content-Type": "application/json",
    "X-Content-Type-Options": "nosniff",
}
WEIGHT_HEADER = "X-Load-Balancing-Endpoint-Weight"  # KEP-3836; load balancers may weigh nodes by it
NEVER = "0001-01-01T00:00:00Z"  # what clients of kube-proxy know as the time that was not yet


class FamilyHealth(NamedTuple):
    """How one family that has started its loop is doing."""

    family: Family
    last_updated: float
    healthy: bool


class Verdict(NamedTuple):
    """The proxy's health at one moment. ``eligible`` is about the node, not about the proxy."""

    at: float
    healthy: bool
    eligible: bool
    last_updated: float | None  # None: no family has started
    families: tuple[FamilyHealth, ...]


class Answer(NamedTuple):
    """What to send over HTTP."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Health:
    """Remembers, for each family, its last update and its oldest waiting request.

    All times are Unix seconds. ``timeout_seconds`` is twice the sync period.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._updated_at: dict[Family, float] = {}
        self._waiting_since: dict[Family, float] = {}
        self._eligible = False  # a Node that was never seen is not eligible

    def started(self, family: Family, now: float) -> None:
        """The family's loop begins; from now on it counts."""
        self._updated(family, now)

    def queued(self, family: Family, now: float) -> None:
        """A sync was requested. Only the oldest request that waits matters."""
        self._waiting_since.setdefault(family, now)

    def synced(self, report: SyncReport, now: float) -> None:
        """A sync ended; one that succeeded has carried out whatever was waiting."""
        if report.error is None:
            self._updated(report.family, now)

    def node_seen(self, node: Node | None) -> None:
        """Remember what the Node says. Its deletion (None) does not clear what was last seen."""
        if node is not None:
            self._eligible = node.eligible

    def verdict(self, now: float) -> Verdict:
        families = tuple(
            FamilyHealth(family, updated_at, self._in_time(family, now))
            for family, updated_at in sorted(self._updated_at.items())
        )
        return Verdict(
            at=now,
            healthy=all(family.healthy for family in families),
            eligible=self._eligible,
            last_updated=max(self._updated_at.values(), default=None),
            families=families,
        )

    def _updated(self, family: Family, now: float) -> None:
        self._updated_at[family] = now
        self._waiting_since.pop(family, None)

    def _in_time(self, family: Family, now: float) -> bool:
        since = self._waiting_since.get(family)
        return since is None or now - since < self._timeout_seconds


def healthz(verdict: Verdict) -> Answer:
    """Answer ``/healthz``: should load balancers send new traffic to this node?"""
    return _answer(
        verdict,
        ok=verdict.healthy and verdict.eligible,
        about_node={"nodeEligible": verdict.eligible},
    )


def livez(verdict: Verdict) -> Answer:
    """Answer ``/livez``: does the proxy work, whatever becomes of the node?"""
    return _answer(verdict, ok=verdict.healthy, about_node={})


def service_health(service: ObjectName, local_count: int, healthy: bool) -> Answer:
    """Answer a Service's health check node port: has this node local endpoints for it?"""
    body = {
        "service": {"namespace": service.namespace, "name": service.name},
        "localEndpoints": local_count,
        "serviceProxyHealthy": healthy,
    }
    return Answer(
        200 if local_count > 0 and healthy else 503,
        {**JSON_HEADERS, WEIGHT_HEADER: str(local_count)},
        json.dumps(body, indent="\t").encode(),
    )


def rfc3339(at: float | None) -> str:
    """Print Unix seconds as UTC with as many digits of a second as matter."""
    if at is None:
        return NEVER
    moment = datetime.fromtimestamp(at, UTC)
    fraction = f".{moment.microsecond:06d}".rstrip("0").rstrip(".")
    return f"{moment:%Y-%m-%dT%H:%M:%S}{fraction}Z"


def _answer(verdict: Verdict, *, ok: bool, about_node: Mapping[str, bool]) -> Answer:
    body: dict[str, object] = {
        # All is well as of now; in trouble, tell since when nothing has been written.
        "lastUpdated": rfc3339(verdict.at if ok else verdict.last_updated),
        "currentTime": rfc3339(verdict.at),
        **about_node,
        "healthy": verdict.healthy,
    }
    if verdict.families:
        body["status"] = {
            f"IPv{family}": {"lastUpdated": rfc3339(last_updated), "healthy": healthy}
            for family, last_updated, healthy in verdict.families
        }
    return Answer(
        200 if ok else 503, JSON_HEADERS, json.dumps(body, separators=(",", ":")).encode()
    )
