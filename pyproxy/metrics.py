"""Folds sync reports and a few other facts into metrics, and prints them.

Names and labels are those that dashboards of kube-proxy use. The tables below are all of them; a
mode that has more rows to fill calls ``count``, ``put`` and ``observe`` with a row's name.
A little long, because the table of all rows is in one piece.
"""

import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from pyproxy import __version__
from pyproxy.model import PROTOS, Family, Kind, Proto
from pyproxy.report import RestoreReport, SyncReport

Result = Literal["forwarded", "dial_failed", "no_endpoint"]
Probe = Literal["healthz", "livez"]

RESULTS: tuple[Result, ...] = ("forwarded", "dial_failed", "no_endpoint")
PROBES: tuple[Probe, ...] = ("healthz", "livez")
PROBE_CODES = (200, 503)

DOUBLING = tuple(0.001 * 2**k for k in range(15))  # 1 ms to 16.384 s
PROGRAMMING_BUCKETS = (
    0.25,
    0.5,
    *(float(s) for s in range(1, 60)),
    *(float(s) for s in range(60, 120, 5)),
    *(float(s) for s in range(120, 301, 30)),
)
REQUEST_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)

FAMILY = ("ip_family",)
TABLE = ("table", "ip_family")
CHAIN = ("chain", "table", "ip_family")
POLICY = ("traffic_policy", "ip_family")
STATE = ("ip_family", "state")
KIND = ("kind", "ip_family")
BUILD = (
    *("major", "minor", "git_version", "git_commit", "git_tree_state"),
    *("build_date", "go_version", "compiler", "platform"),
)


class Row(NamedTuple):
    """One metric, and the modes that have it. No modes: every mode has it."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    lazy: bool = False  # absent, not zero, until it is known: a moment of zero is 1970


SYNC = "kubeproxy_sync_proxy_rules"
CONNTRACK = "kubeproxy_conntrack_reconciler"
FULL_SYNC = "kubeproxy_sync_full_proxy_rules_duration_seconds"
PARTIAL_SYNC = "kubeproxy_sync_partial_proxy_rules_duration_seconds"
PROGRAMMING = "kubeproxy_network_programming_duration_seconds"
REQUEST = "rest_client_request_duration_seconds"
INVALID = "kubeproxy_iptables_ct_state_invalid_dropped_packets_total"
LOCALHOST = "kubeproxy_iptables_localhost_nodeports_accepted_packets_total"

STALE = "pyproxy_state_stale"
AUDITED = "pyproxy_audit_differences"
FAILED = "pyproxy_failed_service_ports"
APPLIED = "pyproxy_applied_resource_version"

IPTABLES = ("iptables",)
NFTABLES = ("nftables",)

COUNTERS = (
    Row(f"{SYNC}_endpoint_changes_total", "EndpointSlice changes seen"),
    Row(f"{SYNC}_service_changes_total", "Service changes seen, once for each IP family"),
    Row("kubeproxy_proxy_healthz_total", "Answers of /healthz", ("code",)),
    Row("kubeproxy_proxy_livez_total", "Answers of /livez", ("code",)),
    Row(f"{SYNC}_iptables_restore_failures_total", "Failed restores", FAMILY, (*IPTABLES, "ipvs")),
    Row(
        f"{SYNC}_iptables_partial_restore_failures_total", "Failed partial syncs", FAMILY, IPTABLES
    ),
    Row(f"{SYNC}_nftables_sync_failures_total", "Failed transactions", FAMILY, NFTABLES),
    Row(f"{SYNC}_nftables_cleanup_failures_total", "Failed chain deletions", FAMILY, NFTABLES),
    Row(f"{CONNTRACK}_deleted_entries_total", "Flows deleted: their backend is gone", FAMILY),
    Row("pyproxy_rules_repaired_total", "Rules that others had changed", FAMILY),
    Row(
        "pyproxy_worker_restarts_total", "Workers that ended by themselves", FAMILY, ("userspace",)
    ),
    Row("rest_client_requests_total", "Requests to the API server", ("code", "method", "host")),
)

GAUGES = (
    Row(f"{SYNC}_last_timestamp_seconds", "Time of the last success", FAMILY, lazy=True),
    Row(f"{SYNC}_last_queued_timestamp_seconds", "Time of the last request", FAMILY, lazy=True),
    Row(f"{SYNC}_endpoint_changes_pending", "EndpointSlice changes that wait for a sync"),
    Row(f"{SYNC}_service_changes_pending", "Service changes that wait for a sync"),
    Row(f"{SYNC}_no_local_endpoints_total", "Policy Local, endpoints only elsewhere", POLICY),
    Row(f"{SYNC}_iptables_total", "Rules owned", TABLE, IPTABLES),
    Row(f"{SYNC}_iptables_last", "Rules written in the last sync", TABLE, IPTABLES),
    Row("pyproxy_iptables_packets", "Packets that entered a chain", CHAIN, IPTABLES),
    Row("kubernetes_feature_enabled", "Feature gates", ("name", "stage")),
    Row("kubernetes_build_info", "What is running; the value is always 1", BUILD),
    Row("pyproxy_asyncio_tasks", "Tasks of the event loop"),
    Row("pyproxy_conflicts", "Frontends that a second Service asked for", FAMILY),
    Row(FAILED, "Service ports that stay as they were: pyproxy cannot work them out", FAMILY),
    Row(APPLIED, "All objects of a kind are written up to this resourceVersion", KIND),
    Row(AUDITED, "Entries that the last pyproxy audit found otherwise", FAMILY, lazy=True),
    Row(STALE, "Whether objects of a kind are known from the state on disk only", ("kind",)),
    Row("pyproxy_frontends", "Frontends that can be served, or not", STATE, ("userspace",)),
)

HISTOGRAMS = (
    Row(f"{SYNC}_duration_seconds", "Duration of a sync", FAMILY, (), DOUBLING),
    Row(FULL_SYNC, "Duration of a full sync", FAMILY, (*IPTABLES, *NFTABLES), DOUBLING),
    Row(PARTIAL_SYNC, "Duration of a partial sync", FAMILY, (*IPTABLES, *NFTABLES), DOUBLING),
    Row(PROGRAMMING, "From an endpoint's change to its sync", FAMILY, (), PROGRAMMING_BUCKETS),
    Row(f"{CONNTRACK}_sync_duration_seconds", "Search for stale flows", FAMILY, (), DOUBLING),
    Row(REQUEST, "Duration of a request to the API server", ("verb", "host"), (), REQUEST_BUCKETS),
)

# Counters that somebody else counts (nfacct objects in the kernel): see ``count_elsewhere``.
READINGS = (
    Row(INVALID, "Packets dropped as invalid by connection tracking", (), IPTABLES),
    Row(LOCALHOST, "Packets to node ports on loopback addresses", (), IPTABLES),
)


class Metrics:
    """The metrics of one mode and its families; what belongs to other modes does not exist."""

    def __init__(self, mode: str, families: Sequence[Family]) -> None:
        # The library's "_created" series would double what is scraped. The switch is its only
        # one and global, which is right here: nobody else in this process has metrics.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library lacks the types
        self._mode = mode
        self._families = tuple(families)
        self._registry = CollectorRegistry()
        self._counters = {r.name: self._counter(r) for r in COUNTERS if self._has(r)}
        self._gauges = {r.name: self._gauge(r) for r in GAUGES if self._has(r)}
        self._histograms = {r.name: self._histogram(r) for r in HISTOGRAMS if self._has(r)}
        self._bind_children()
        ProcessCollector(registry=self._registry)
        self._connections = _Connections()
        if mode == "userspace":
            self._registry.register(self._connections)
        self._slis = _Slis()
        self._read_elsewhere: set[str] = set()

    def observe_sync(self, report: SyncReport) -> None:
        family = f"IPv{report.family}"
        self.observe(f"{SYNC}_duration_seconds", report.seconds, family)
        by_extent = FULL_SYNC if report.full else PARTIAL_SYNC
        if by_extent in self._histograms:
            self.observe(by_extent, report.seconds, family)
        if report.error is None:
            self._observe_success(report, family)

    def request_queued(self, family: Family, now: float) -> None:
        """A sync was requested, or the family's loop begins."""
        self.put(f"{SYNC}_last_queued_timestamp_seconds", now, f"IPv{family}")

    def service_change(self, family: Family, events: int = 1) -> None:
        if family in self._families:
            self.count(f"{SYNC}_service_changes_total", by=events)

    def endpoint_change(self, family: Family, events: int = 1) -> None:
        if family in self._families:
            self.count(f"{SYNC}_endpoint_changes_total", by=events)

    def pending(self, service_changes: int, endpoint_changes: int) -> None:
        self.put(f"{SYNC}_service_changes_pending", service_changes)
        self.put(f"{SYNC}_endpoint_changes_pending", endpoint_changes)

    def probe(self, kind: Probe, code: int) -> None:
        self.count(f"kubeproxy_proxy_{kind}_total", str(code))
        self._slis.observe(kind, ok=code == 200)

    def rest_request(self, method: str, host: str, code: str, seconds: float) -> None:
        """The API server answered; ``code`` is ``<error>`` if it did not."""
        self.count("rest_client_requests_total", code, method, host)
        self.observe(REQUEST, seconds, method, host)

    def conntrack_reconciled(self, family: Family, seconds: float, deleted_count: int) -> None:
        name = f"IPv{family}"
        self.observe(f"{CONNTRACK}_sync_duration_seconds", seconds, name)
        self.count(f"{CONNTRACK}_deleted_entries_total", name, by=deleted_count)

    def restored(self, report: RestoreReport) -> None:
        """Rules of iptables were written, or that failed."""
        family = f"IPv{report.family}"
        for table, count in report.owned.items():
            self.put(f"{SYNC}_iptables_total", count, table, family)
            self.put(f"{SYNC}_iptables_last", report.written.get(table, 0), table, family)
        if report.failed:
            self.count(f"{SYNC}_iptables_restore_failures_total", family)
            if not report.full:
                self.count(f"{SYNC}_iptables_partial_restore_failures_total", family)

    def passed(self, family: Family, table: str, packets: Mapping[str, int]) -> None:
        for chain, count in packets.items():
            self.put("pyproxy_iptables_packets", count, chain, table, f"IPv{family}")

    def connection(self, proto: Proto, result: Result) -> None:
        """A connection arrived; a forwarded one is active until ``connection_ended``."""
        self._connections.arrived[proto, result] += 1

    def connection_ended(self, proto: Proto) -> None:
        self._connections.ended[proto] += 1

    def frontends(self, family: Family, served: int, unserved: int) -> None:
        self.put("pyproxy_frontends", served, f"IPv{family}", "served")
        self.put("pyproxy_frontends", unserved, f"IPv{family}", "unserved")

    def features(self, gates: Mapping[tuple[str, str], bool]) -> None:
        """Publish the feature gates: (name, stage) to whether it is on; the stage of GA is ''."""
        for (name, stage), enabled in gates.items():
            self.put("kubernetes_feature_enabled", int(enabled), name, stage)

    def audited(self, family: Family, differences: int) -> None:
        """Tell what an audit that somebody asked for found."""
        self._gauges[AUDITED].labels(f"IPv{family}").set(differences)

    def stale(self, kind: Kind, *, stale: bool) -> None:
        """Say whether the objects of a kind are those of an earlier process, from disk."""
        self._gauges[STALE].labels(kind).set(stale)

    def count_tasks(self, task_count: Callable[[], int]) -> None:
        """Read the number of the event loop's tasks here, at each scrape."""
        self._gauges["pyproxy_asyncio_tasks"].set_function(task_count)

    def applied(self, kind: str, family: Family, read: Callable[[], float]) -> None:
        """Read at each scrape up to which version the objects of a kind are written."""
        self._gauges[APPLIED].labels(kind, f"IPv{family}").set_function(read)

    def count_elsewhere(self, name: str, read: Callable[[], int | None]) -> None:
        """Export a row of ``READINGS``, read at each scrape; None leaves it out.

        The first reader of a row stays: what both families count is one counter.
        """
        row = next(row for row in READINGS if row.name == name and self._has(row))
        if name not in self._read_elsewhere:
            self._read_elsewhere.add(name)
            self._registry.register(_Reading(row, read))

    def register(self, collector: Collector) -> None:
        """Export what somebody else collects."""
        self._registry.register(collector)

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        counter = self._counters[name]
        (counter.labels(*labels) if labels else counter).inc(by)

    def put(self, name: str, value: float, *labels: str) -> None:
        gauge = self._gauges[name]
        (gauge.labels(*labels) if labels else gauge).set(value)

    def observe(self, name: str, value: float, *labels: str) -> None:
        self._histograms[name].labels(*labels).observe(value)

    def exposition(self, accept_header: str) -> tuple[str, bytes]:
        """Return the content type that suits the reader, and everything in it."""
        return _printed(self._registry, accept_header)

    def slis(self, accept_header: str) -> tuple[str, bytes]:
        """Return likewise the service level indicators: how the health checks went."""
        return _printed(self._slis.registry, accept_header)

    def reset_slis(self) -> None:
        self._slis = _Slis()

    def _observe_success(self, report: SyncReport, family: str) -> None:
        self.put(f"{SYNC}_last_timestamp_seconds", report.finished_at, family)
        no_local = f"{SYNC}_no_local_endpoints_total"
        self.put(no_local, report.no_local_internal, "internal", family)
        self.put(no_local, report.no_local_external, "external", family)
        self.put("pyproxy_conflicts", len(report.conflicts), family)
        self.put(FAILED, len(report.failed), family)
        for triggered_at in report.triggered_at:
            # Clocks of two machines: a change may seem to come from the future.
            self.observe(PROGRAMMING, max(0.0, report.finished_at - triggered_at), family)

    def _has(self, row: Row) -> bool:
        return not row.modes or self._mode in row.modes

    def _counter(self, row: Row) -> Counter:
        return Counter(row.name, row.help, row.labels, registry=self._registry)

    def _gauge(self, row: Row) -> Gauge:
        return Gauge(row.name, row.help, row.labels, registry=self._registry)

    def _histogram(self, row: Row) -> Histogram:
        return Histogram(
            row.name, row.help, row.labels, buckets=row.buckets, registry=self._registry
        )

    def _bind_children(self) -> None:
        """Make what is known to exist show up as zero, so that its first increase is visible."""
        for row in (*COUNTERS, *GAUGES, *HISTOGRAMS):
            if row.labels == FAMILY and self._has(row) and not row.lazy:
                for family in self._families:
                    self._metric(row.name).labels(f"IPv{family}")
        for family in self._families:
            for policy in ("internal", "external"):
                self.put(f"{SYNC}_no_local_endpoints_total", 0, policy, f"IPv{family}")
        for kind in PROBES:
            for code in PROBE_CODES:
                self.count(f"kubeproxy_proxy_{kind}_total", str(code), by=0)
        self.put("kubernetes_build_info", 1, *_build_info())

    def _metric(self, name: str) -> Counter | Gauge | Histogram:
        return self._counters.get(name) or self._gauges.get(name) or self._histograms[name]


class _Connections(Collector):
    """Counts of connections, as plain numbers: a third of the cost of the library's counters."""

    def __init__(self) -> None:
        self.arrived = {(proto, result): 0 for proto in PROTOS for result in RESULTS}
        self.ended = dict.fromkeys(PROTOS, 0)

    def collect(self) -> Iterator[Metric]:
        total = CounterMetricFamily(
            "pyproxy_connections_total",
            "Connections that arrived at the forwarder, by what became of them",
            labels=("proto", "result"),
        )
        for (proto, result), count in self.arrived.items():
            total.add_metric((proto, result), count)
        yield total
        active = GaugeMetricFamily(
            "pyproxy_connections_active", "Connections being forwarded", labels=("proto",)
        )
        for proto, ended in self.ended.items():
            active.add_metric((proto,), self.arrived[proto, "forwarded"] - ended)
        yield active


class _Slis:
    """The outcomes of health checks, in a registry that can be thrown away to reset them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("name", "type")
        self._last = Gauge(
            "kubernetes_healthcheck", "Result of the last check", labels, registry=self.registry
        )
        self._all = Counter(
            "kubernetes_healthchecks_total",
            "Results of all checks",
            (*labels, "status"),
            registry=self.registry,
        )

    def observe(self, kind: Probe, *, ok: bool) -> None:
        self._last.labels("proxy", kind).set(int(ok))
        self._all.labels("proxy", kind, "success" if ok else "error").inc()


class _Reading(Collector):
    """A counter whose value is kept by somebody else."""

    def __init__(self, row: Row, read: Callable[[], int | None]) -> None:
        self._row = row
        self._read = read

    def describe(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self._row.name, self._row.help)

    def collect(self) -> Iterator[CounterMetricFamily]:
        value = self._read()
        if value is not None:
            yield CounterMetricFamily(self._row.name, self._row.help, value=value)


def _printed(registry: CollectorRegistry, accept_header: str) -> tuple[str, bytes]:
    try:
        encode, content_type = choose_encoder(accept_header)
    except (TypeError, ValueError):  # a version that is no number: use the format all can read
        encode, content_type = choose_encoder("")
    return content_type, encode(registry)


def _build_info() -> tuple[str, ...]:
    """Return the labels of ``kubernetes_build_info``; those without a meaning here are empty."""
    major, minor = __version__.split(".")[:2]
    where = f"{sys.platform}/{platform.machine()}"
    return (
        *(major, minor, f"v{__version__}", "", ""),
        *("", "", platform.python_implementation(), where),
    )
