"""What reaches health, metrics and the log, and how often."""

import asyncio
import logging

import pytest

from pyproxy.health import Health
from pyproxy.metrics import Metrics
from pyproxy.model import ObjectName, Remove, Replace, Upsert
from pyproxy.report import SyncReport
from pyproxy.telemetry import EVENT_SECONDS, SHOWN, Drifts, Telemetry
from tests.builders import endpoint_slice, owner, service

NOW = 1_700_000_000.0
WEB = ObjectName("default", "web")
PORT = "default/web: 10.96.0.1:80/TCP: the port is taken"


class Clock:
    def __init__(self):
        self.now = NOW

    def unix(self):
        return self.now


class Observed:
    """A Telemetry, and what it told health and metrics."""

    def __init__(self, mode="userspace"):
        self.clock = Clock()
        self.mode = mode
        self.health = Health(60.0)
        self.metrics = Metrics(mode, (4, 6))
        self.telemetry = Telemetry(self.health, self.metrics, self.clock.unix)

    def synced(self, family=4, **fields):
        fields = {"full": False, "finished_at": self.clock.now, "seconds": 0.01} | fields
        self.telemetry.synced(SyncReport(self.mode, family, **fields))

    def samples(self, prefix):
        """The lines of the exposition that begin so, as a mapping to numbers."""
        lines = self.metrics.exposition("")[1].decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line.startswith(prefix))
        return {name: float(value) for name, value in pairs}

    def is_healthy(self):
        return self.health.verdict(self.clock.now).healthy


@pytest.fixture
def observed():
    return Observed()


@pytest.fixture
def told(caplog):
    """A function that returns the log since its last call: severity, event, fields."""
    caplog.set_level(logging.INFO, "pyproxy.telemetry")
    fields = ("object", "problem", "family", "error", "trouble", "count", "which")

    def read():
        lines = [
            (r.levelname, r.getMessage(), *(getattr(r, f) for f in fields if hasattr(r, f)))
            for r in caplog.records
        ]
        caplog.clear()
        return lines

    return read


def odd(*warnings, name="web"):
    return service(name, warnings=warnings)


# --- health ---------------------------------------------------------------------------------------


def test_a_request_that_waits_too_long_is_unhealthy_until_a_sync_succeeds(observed):
    observed.telemetry.started(4)
    observed.telemetry.requested(4)
    observed.clock.now += 61
    assert not observed.is_healthy()
    observed.synced(error="the kernel said no")
    assert not observed.is_healthy()
    observed.synced()
    assert observed.is_healthy()


# --- metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        pytest.param(Upsert("Service", service()), (1, 0), id="Service"),
        pytest.param(Remove("Service", WEB), (1, 0), id="Service removed"),
        pytest.param(Upsert("EndpointSlice", endpoint_slice("web-1")), (0, 1), id="EndpointSlice"),
        pytest.param(Remove("EndpointSlice", WEB), (0, 1), id="EndpointSlice removed"),
        pytest.param(Replace("Node", ()), (0, 0), id="Node"),
        pytest.param(Replace("ServiceCIDR", ()), (0, 0), id="ServiceCIDR"),
    ],
)
def test_changes_of_services_and_slices_are_counted_and_wait_for_a_sync(observed, change, counts):
    observed.telemetry.counted(change, 4, concerned=True)
    waiting = (
        "kubeproxy_sync_proxy_rules_service_changes_pending",
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
    )
    totals = (
        "kubeproxy_sync_proxy_rules_service_changes_total",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total",
    )
    assert tuple(observed.samples(name)[name] for name in totals) == counts
    assert tuple(observed.samples(name)[name] for name in waiting) == counts
    observed.synced()
    assert tuple(observed.samples(name)[name] for name in waiting) == (0, 0)


@pytest.mark.parametrize(
    ("change", "totals"),
    [
        pytest.param(Upsert("EndpointSlice", endpoint_slice("s", family=6)), (0, 1), id="a slice"),
        pytest.param(Upsert("Service", service()), (2, 0), id="a Service"),
        pytest.param(
            Replace("EndpointSlice", tuple(map(endpoint_slice, "abc"))), (0, 3), id="slices"
        ),
        pytest.param(Replace("Service", (service("a"), service("b"))), (4, 0), id="Services"),
        pytest.param(Remove("EndpointSlice", WEB), (0, 0), id="a slice of nobody"),
    ],
)
def test_a_slice_is_an_event_of_its_family_and_a_service_of_each(observed, change, totals):
    for family in (4, 6):
        observed.telemetry.counted(change, family, concerned=False)
    names = (
        "kubeproxy_sync_proxy_rules_service_changes_total",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total",
    )
    assert tuple(observed.samples(name)[name] for name in names) == totals


def test_a_change_that_concerns_nobody_does_not_wait(observed):
    observed.telemetry.counted(Upsert("Service", service()), 4, concerned=False)
    name = "kubeproxy_sync_proxy_rules_service_changes_pending"
    assert observed.samples(name) == {name: 0}


def test_connections_are_counted_by_result_and_while_they_are_open(observed):
    for result in ("forwarded", "forwarded", "dial_failed", "no_endpoint", "closed"):
        observed.telemetry.connection("TCP", result)
    samples = observed.samples("pyproxy_connections")
    by_result = {
        result: value
        for name, value in samples.items()
        for result in ("forwarded", "dial_failed", "no_endpoint")
        if f'"{result}"' in name and '"TCP"' in name
    }
    assert by_result == {"forwarded": 2, "dial_failed": 1, "no_endpoint": 1}


def test_a_result_that_no_metric_counts_is_a_mistake_of_ours(observed):
    with pytest.raises(AssertionError, match="lost"):
        observed.telemetry.connection("TCP", "lost")


# --- log ------------------------------------------------------------------------------------------


def test_what_is_odd_about_an_object_is_told_once_until_it_changes(observed, told):
    problem = ("WARNING", "ignored", "Service default/web", "weights: nonsense")
    observed.telemetry.changed(Replace("Service", (odd("weights: nonsense"),)))
    assert told() == [problem]
    observed.telemetry.changed(Upsert("Service", odd("weights: nonsense")))
    assert told() == []
    observed.telemetry.changed(Upsert("Service", odd()))
    observed.telemetry.changed(Upsert("Service", odd("weights: nonsense")))
    assert told() == [problem]


def test_a_service_and_a_slice_of_one_name_are_two_objects(observed, told):
    observed.telemetry.changed(Upsert("Service", odd("weights: nonsense")))
    observed.telemetry.changed(Upsert("EndpointSlice", endpoint_slice("web")))
    observed.telemetry.changed(Remove("EndpointSlice", WEB))
    told()
    observed.telemetry.changed(Upsert("Service", odd("weights: nonsense")))
    assert told() == []


def test_an_object_that_returns_is_told_of_again(observed, told):
    observed.telemetry.changed(Upsert("Service", odd("weights: nonsense")))
    observed.telemetry.changed(Remove("Service", WEB))
    told()
    observed.telemetry.changed(Upsert("Service", odd("weights: nonsense")))
    assert len(told()) == 1


def test_a_failure_is_told_when_it_begins_changes_and_ends(observed, told):
    observed.synced(error="busy")
    observed.synced(error="busy")
    assert told() == [("ERROR", "sync failed", "IPv4", "busy")]
    observed.synced(error="full")
    assert told() == [("ERROR", "sync failed", "IPv4", "full")]
    observed.synced()
    observed.synced()
    assert told() == [("INFO", "sync works again", "IPv4")]


def test_each_family_fails_for_itself(observed, told):
    observed.synced(4, error="busy")
    observed.synced(6)
    observed.synced(6, error="busy")
    assert told() == [
        ("ERROR", "sync failed", "IPv4", "busy"),
        ("ERROR", "sync failed", "IPv6", "busy"),
    ]


@pytest.mark.parametrize(
    ("field", "event"),
    [("unserved", "not served"), ("conflicts", "frontend wanted twice")],
)
def test_trouble_with_a_frontend_is_told_when_it_begins_and_ends(observed, told, field, event):
    observed.synced(**{field: (PORT,)})
    observed.synced(**{field: (PORT,)})
    assert told() == [("WARNING", event, 1, PORT)]
    observed.synced()
    observed.synced()
    assert told() == [("INFO", "over", event, 1)]


def test_a_service_that_is_our_mistake_is_an_error_with_its_name_and_ours(observed, told):
    gauge = "pyproxy_failed_service_ports"
    failed = {owner("web", "http"): "KeyError: 'x' (rules/nft.py:7)"}
    for _ in range(2):
        observed.synced(failed=failed)
    which = "default/web:http: KeyError: 'x' (rules/nft.py:7)"
    assert told() == [("ERROR", "Services stay as they were", 1, which)]
    assert observed.samples(gauge)[f'{gauge}{{ip_family="IPv4"}}'] == 1
    observed.synced()
    assert told() == [("INFO", "over", "Services stay as they were", 1)]
    assert observed.samples(gauge)[f'{gauge}{{ip_family="IPv4"}}'] == 0
    assert observed.is_healthy()


def test_only_what_is_new_is_told_and_not_all_of_very_many(observed, told):
    many = tuple(f"frontend {number}" for number in range(SHOWN + 2))
    observed.synced(unserved=many)
    observed.synced(unserved=(*many, "one more"))
    first, second = told()
    assert first == ("WARNING", "not served", SHOWN + 2, "; ".join(many[:SHOWN]))
    assert second == ("WARNING", "not served", 1, "one more")


@pytest.mark.jumping
async def test_who_changes_a_table_again_and_again_is_an_event_once_in_a_while():
    now = asyncio.get_running_loop().time
    events = []

    async def record(note):
        events.append((now(), note))

    drifts = Drifts(record)
    async with asyncio.TaskGroup() as tasks:
        for second in range(400):
            drifts.noted(tasks, "pyproxy", 4, 2, "nft" if second % 4 else "iptables")
            if second == 10:
                drifts.noted(tasks, "pyproxy", 6, 1, "somebody")
            await asyncio.sleep(1)
        await asyncio.sleep(2 * EVENT_SECONDS)
        drifts.noted(tasks, "pyproxy", 4, 3, "nft")
    note = "{} rules in table pyproxy (IPv{}) were changed by {}"
    assert events == [
        (0.0, note.format(2, 4, "iptables")),
        (10.0, note.format(1, 6, "somebody")),
        (EVENT_SECONDS, note.format(598, 4, "nft, iptables")),
        (2 * EVENT_SECONDS, note.format(200, 4, "nft, iptables")),
        (400 + 2 * EVENT_SECONDS, note.format(3, 4, "nft")),
    ]
