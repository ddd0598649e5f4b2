import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from pyproxy.metrics import COUNTERS, GAUGES, HISTOGRAMS, READINGS, Metrics
from pyproxy.report import RestoreReport, SyncReport

MODES = ("userspace", "iptables", "nftables", "ipvs")
SYNC = "kubeproxy_sync_proxy_rules"
ROWS = (*COUNTERS, *GAUGES, *HISTOGRAMS, *READINGS)
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"

# Name, type, labels and modes as kube-proxy has them; this is what dashboards and alerts query.
ALL = set(MODES)
F = {"ip_family"}
UPSTREAM = [
    (f"{SYNC}_duration_seconds", "histogram", F, ALL),
    ("kubeproxy_sync_full_proxy_rules_duration_seconds", "histogram", F, {"iptables", "nftables"}),
    (
        "kubeproxy_sync_partial_proxy_rules_duration_seconds",
        "histogram",
        F,
        {"iptables", "nftables"},
    ),
    (f"{SYNC}_last_timestamp_seconds", "gauge", F, ALL),
    (f"{SYNC}_last_queued_timestamp_seconds", "gauge", F, ALL),
    ("kubeproxy_network_programming_duration_seconds", "histogram", F, ALL),
    (f"{SYNC}_endpoint_changes_pending", "gauge", set(), ALL),
    (f"{SYNC}_endpoint_changes_total", "counter", set(), ALL),
    (f"{SYNC}_service_changes_pending", "gauge", set(), ALL),
    (f"{SYNC}_service_changes_total", "counter", set(), ALL),
    (f"{SYNC}_no_local_endpoints_total", "gauge", {"traffic_policy", "ip_family"}, ALL),
    ("kubeproxy_proxy_healthz_total", "counter", {"code"}, ALL),
    ("kubeproxy_proxy_livez_total", "counter", {"code"}, ALL),
    (f"{SYNC}_iptables_restore_failures_total", "counter", F, {"iptables", "ipvs"}),
    (f"{SYNC}_iptables_partial_restore_failures_total", "counter", F, {"iptables"}),
    (f"{SYNC}_iptables_total", "gauge", {"table", "ip_family"}, {"iptables"}),
    (f"{SYNC}_iptables_last", "gauge", {"table", "ip_family"}, {"iptables"}),
    (f"{SYNC}_nftables_sync_failures_total", "counter", F, {"nftables"}),
    (f"{SYNC}_nftables_cleanup_failures_total", "counter", F, {"nftables"}),
    ("kubeproxy_conntrack_reconciler_sync_duration_seconds", "histogram", F, ALL),
    ("kubeproxy_conntrack_reconciler_deleted_entries_total", "counter", F, ALL),
    ("rest_client_requests_total", "counter", {"code", "method", "host"}, ALL),
    ("rest_client_request_duration_seconds", "histogram", {"verb", "host"}, ALL),
    ("kubernetes_feature_enabled", "gauge", {"name", "stage"}, ALL),
]


def report(**fields):
    return SyncReport(
        **{
            "mode": "userspace",
            "family": 4,
            "full": False,
            "finished_at": 1000.0,
            "seconds": 0.25,
            **fields,
        }
    )


def printed(metrics):
    return metrics.exposition("")[1].decode()


def families(text):
    return {family.name: family for family in parse_text(text)}


def samples(metrics):
    """Every sample by name and labels, as a scraper sees them."""
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in parse_text(printed(metrics))
        for sample in family.samples
    }


def filled(mode):
    """Metrics of a mode, with something in every row that this mode has."""
    metrics = Metrics(mode, (4, 6))
    writers = ((COUNTERS, metrics.count), (GAUGES, metrics.put), (HISTOGRAMS, metrics.observe))
    for table, write in writers:
        value = () if table is COUNTERS else (1.0,)
        for row in table:
            if not row.modes or mode in row.modes:
                write(row.name, *value, *(f"some-{label}" for label in row.labels))
    return metrics


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "kind", "labels", "modes"), [pytest.param(*row, id=row[0]) for row in UPSTREAM]
)
def test_a_metric_of_kube_proxy_has_its_name_type_and_labels(mode, name, kind, labels, modes):
    text = printed(filled(mode))
    if mode not in modes:
        assert name not in text
        return
    assert f"# TYPE {name} {kind}\n" in text
    family = families(text)[name.removesuffix("_total") if kind == "counter" else name]
    assert {frozenset(s.labels) - {"le"} for s in family.samples} == {frozenset(labels)}


@pytest.mark.parametrize("mode", MODES)
def test_there_are_no_created_series(mode):
    assert "_created" not in printed(filled(mode))


@pytest.mark.parametrize("mode", MODES)
def test_both_formats_have_the_same_metrics(mode):
    metrics = filled(mode)
    content_type, body = metrics.exposition(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text")
    openmetrics = {family.name for family in parse_openmetrics(body.decode())}
    assert openmetrics == set(families(printed(metrics)))


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        pytest.param("", "text/plain; version=0.0.4; charset=utf-8", id="none"),
        pytest.param("*/*", "text/plain; version=0.0.4; charset=utf-8", id="anything"),
        pytest.param(
            "application/openmetrics-text",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            id="openmetrics",
        ),
        pytest.param(
            "application/openmetrics-text;version=x",
            "text/plain; version=0.0.4; charset=utf-8",
            id="nonsense",
        ),
    ],
)
def test_the_reader_chooses_the_format(accept, content_type):
    assert Metrics("userspace", (4,)).exposition(accept)[0] == content_type


def test_names_are_unique():
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        pytest.param(
            f"{SYNC}_duration_seconds", [0.001 * 2**k for k in range(15)], id="doubling from 1 ms"
        ),
        pytest.param(
            "kubeproxy_network_programming_duration_seconds",
            [0.25, 0.5, *range(1, 60), *range(60, 116, 5), *range(120, 301, 30)],
            id="coarser with time",
        ),
    ],
)
def test_buckets_are_those_of_kube_proxy(name, bounds):
    family = families(printed(Metrics("userspace", (4,))))[name]
    les = [float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket")]
    assert les == [*bounds, float("inf")]


def test_a_successful_sync_is_counted_timed_and_dated():
    metrics = Metrics("userspace", (4, 6))
    metrics.observe_sync(
        report(
            conflicts=("a", "b"),
            no_local_internal=3,
            no_local_external=5,
            triggered_at=(998.0, 999.0, 1001.0),
        )
    )
    seen = samples(metrics)
    programming = "kubeproxy_network_programming_duration_seconds"
    expected = {
        (f"{SYNC}_duration_seconds_count", "IPv4"): 1,
        (f"{SYNC}_duration_seconds_sum", "IPv4"): 0.25,
        (f"{SYNC}_duration_seconds_count", "IPv6"): 0,
        (f"{SYNC}_last_timestamp_seconds", "IPv4"): 1000,
        (f"{SYNC}_no_local_endpoints_total", "IPv4", "internal"): 3,
        (f"{SYNC}_no_local_endpoints_total", "IPv4", "external"): 5,
        (f"{SYNC}_no_local_endpoints_total", "IPv6", "external"): 0,
        (f"{programming}_count", "IPv4"): 3,
        (f"{programming}_sum", "IPv4"): 3,  # what seems to come from the future took no time
        ("pyproxy_conflicts", "IPv4"): 2,
    }
    assert {key: seen[key] for key in expected} == expected


def test_a_failed_sync_is_counted_and_timed_and_nothing_more():
    metrics = Metrics("userspace", (4,))
    metrics.observe_sync(report(no_local_internal=2))
    before = samples(metrics)
    metrics.observe_sync(
        report(error="nft: no", finished_at=2000.0, no_local_internal=9, triggered_at=(1.0,))
    )
    after = samples(metrics)
    changed = {key for key in after if after[key] != before.get(key) and "process" not in key[0]}
    assert {name.removeprefix(f"{SYNC}_duration_seconds_") for name, *_ in changed} == {
        "bucket",
        "count",
        "sum",
    }


@pytest.mark.parametrize(
    ("full", "counts"),
    [pytest.param(True, (1, 0), id="full"), pytest.param(False, (0, 1), id="partial")],
)
def test_a_sync_of_nftables_is_timed_by_its_extent(full, counts):
    metrics = Metrics("nftables", (4,))
    metrics.observe_sync(report(mode="nftables", full=full))
    seen = samples(metrics)
    extents = ("full", "partial")
    assert counts == tuple(
        seen[f"kubeproxy_sync_{extent}_proxy_rules_duration_seconds_count", "IPv4"]
        for extent in extents
    )


def test_a_moment_is_absent_until_it_is_known():
    metrics = Metrics("userspace", (4,))
    name = f"{SYNC}_last_queued_timestamp_seconds"
    before = samples(metrics)
    metrics.request_queued(4, 1234.5)
    assert ((name, "IPv4") in before, samples(metrics)[name, "IPv4"]) == (False, 1234.5)


def test_changes_are_counted_for_the_families_that_are_proxied():
    metrics = Metrics("userspace", (4,))
    for family in (4, 6):
        metrics.service_change(family)
        metrics.endpoint_change(family)
    metrics.pending(service_changes=2, endpoint_changes=3)
    seen = samples(metrics)
    names = ("service_changes_total", "endpoint_changes_total")
    names += ("service_changes_pending", "endpoint_changes_pending")
    assert [seen[(f"{SYNC}_{name}",)] for name in names] == [1, 1, 2, 3]


def test_connections_are_counted_by_result_and_active_until_they_end():
    metrics = Metrics("userspace", (4,))
    for result in ("forwarded", "forwarded", "dial_failed", "no_endpoint"):
        metrics.connection("TCP", result)
    metrics.connection_ended("TCP")
    seen = samples(metrics)
    expected = {
        ("pyproxy_connections_total", "TCP", "forwarded"): 2,
        ("pyproxy_connections_total", "TCP", "dial_failed"): 1,
        ("pyproxy_connections_total", "TCP", "no_endpoint"): 1,
        ("pyproxy_connections_total", "UDP", "forwarded"): 0,
        ("pyproxy_connections_active", "TCP"): 1,
        ("pyproxy_connections_active", "UDP"): 0,
    }
    assert {key: seen[key] for key in expected} == expected


@pytest.mark.parametrize("mode", MODES)
def test_only_the_forwarder_has_connections(mode):
    text = printed(Metrics(mode, (4,)))
    assert ("pyproxy_connections" in text) == (mode == "userspace")


def test_probes_are_counted_for_each_code():
    metrics = Metrics("userspace", (4,))
    before = samples(metrics)
    metrics.probe("healthz", 200)
    metrics.probe("healthz", 503)
    metrics.probe("livez", 200)
    changed = {key: v for key, v in samples(metrics).items() if v != before.get(key)}
    assert {key: v for key, v in changed.items() if "proxy_" in key[0]} == {
        ("kubeproxy_proxy_healthz_total", "200"): 1,
        ("kubeproxy_proxy_healthz_total", "503"): 1,
        ("kubeproxy_proxy_livez_total", "200"): 1,
    }


def test_indicators_tell_how_checks_went_until_they_are_reset():
    metrics = Metrics("userspace", (4,))
    metrics.probe("livez", 200)
    metrics.probe("livez", 503)
    before = metrics.slis("")[1].decode()
    metrics.reset_slis()
    assert 'kubernetes_healthcheck{name="proxy",type="livez"} 0.0' in before
    assert 'kubernetes_healthchecks_total{name="proxy",status="error",type="livez"} 1.0' in before
    assert "livez" not in metrics.slis("")[1].decode()


def test_requests_to_the_api_server_are_counted_and_timed():
    metrics = Metrics("userspace", (4,))
    metrics.rest_request("GET", "api:6443", "<error>", 0.5)
    seen = samples(metrics)
    assert seen["rest_client_requests_total", "<error>", "GET", "api:6443"] == 1
    assert seen["rest_client_request_duration_seconds_sum", "GET", "api:6443"] == 0.5


def test_conntrack_frontends_features_and_tasks_are_told():
    metrics = Metrics("userspace", (4,))
    metrics.conntrack_reconciled(4, 0.5, 7)
    metrics.frontends(4, served=8, unserved=1)
    metrics.features({("NativeHistograms", "ALPHA"): False, ("NFTablesProxyMode", ""): True})
    metrics.count_tasks(lambda: 11)
    seen = samples(metrics)
    expected = {
        ("kubeproxy_conntrack_reconciler_sync_duration_seconds_sum", "IPv4"): 0.5,
        ("kubeproxy_conntrack_reconciler_deleted_entries_total", "IPv4"): 7,
        ("pyproxy_frontends", "IPv4", "served"): 8,
        ("pyproxy_frontends", "IPv4", "unserved"): 1,
        ("kubernetes_feature_enabled", "ALPHA", "NativeHistograms"): 0,
        ("kubernetes_feature_enabled", "", "NFTablesProxyMode"): 1,
        ("pyproxy_asyncio_tasks",): 11,
    }
    assert {key: seen[key] for key in expected} == expected


def test_process_and_build_are_described():
    text = printed(Metrics("userspace", (4,)))
    for name in ("process_resident_memory_bytes", "process_cpu_seconds_total"):
        assert f"\n{name} " in text
    assert "\nkubernetes_build_info{" in text


def test_a_counter_kept_elsewhere_is_read_at_each_scrape():
    name = READINGS[0].name
    metrics = Metrics("iptables", (4,))
    values = iter([5, None])
    metrics.count_elsewhere(name, lambda: next(values))
    metrics.count_elsewhere(name, lambda: 7)  # the other family: it is the same counter
    known, unknown = printed(metrics), printed(metrics)
    assert f"# TYPE {name} counter\n{name} 5.0\n" in known
    assert name not in unknown


def test_applied_versions_are_read_at_each_scrape():
    metrics, version = Metrics("nftables", (4,)), [7]
    metrics.applied("Service", 4, lambda: version[0])
    name = ("pyproxy_applied_resource_version", "IPv4", "Service")
    assert samples(metrics)[name] == 7
    version[0] = 9
    assert samples(metrics)[name] == 9


def test_rules_and_failures_of_restores_are_told():
    metrics = Metrics("iptables", (4, 6))
    metrics.restored(RestoreReport(4, True, False, {"filter": 9, "nat": 20}, {"nat": 20}))
    metrics.restored(RestoreReport(6, False, True, {"filter": 9, "nat": 21}, {}))
    metrics.restored(RestoreReport(6, True, True, {"filter": 9, "nat": 21}, {}))
    text = printed(metrics)
    for line in (
        'iptables_total{ip_family="IPv4",table="nat"} 20.0',
        'iptables_total{ip_family="IPv6",table="nat"} 21.0',
        'iptables_last{ip_family="IPv4",table="nat"} 20.0',
        'iptables_last{ip_family="IPv4",table="filter"} 0.0',
        'iptables_restore_failures_total{ip_family="IPv4"} 0.0',
        'iptables_restore_failures_total{ip_family="IPv6"} 2.0',
        'iptables_partial_restore_failures_total{ip_family="IPv6"} 1.0',
    ):
        assert f"{SYNC}_{line}\n" in text


def test_packets_are_told_by_chain():
    metrics = Metrics("iptables", (4,))
    metrics.passed(4, "nat", {"KUBE-SERVICES": 7})
    labels = 'chain="KUBE-SERVICES",ip_family="IPv4",table="nat"'
    assert f"pyproxy_iptables_packets{{{labels}}} 7.0\n" in printed(metrics)
