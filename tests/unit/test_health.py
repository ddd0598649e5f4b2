import json

import pytest

from pyproxy.health import Health, healthz, livez, rfc3339, service_health
from pyproxy.model import Node, ObjectName
from pyproxy.report import SyncReport

START = 1_700_000_000.0
TIMEOUT = 60.0
GOOD = Node("here")
LEAVING = Node("here", eligible=False)


def report(family=4, error=None):
    return SyncReport("userspace", family, full=False, finished_at=0.0, seconds=0.0, error=error)


def after(*events, timeout=TIMEOUT):
    """A Health that lived through these events: a verb, a family or Node, and seconds."""
    health = Health(timeout)
    for verb, subject, *seconds in events:
        now = START + (seconds[0] if seconds else 0)
        match verb:
            case "start":
                health.started(subject, now)
            case "queue":
                health.queued(subject, now)
            case "sync":
                health.synced(report(subject), now)
            case "fail":
                health.synced(report(subject, error="nft: no"), now)
            case "node":
                health.node_seen(subject)
    return health


@pytest.mark.parametrize(
    ("events", "at", "healthy"),
    [
        pytest.param([], 1e6, True, id="nothing has started"),
        pytest.param([("start", 4, 0)], 1e9, True, id="idle is healthy for ever"),
        pytest.param([("start", 4, 0), ("queue", 4, 10)], 69.9, True, id="waiting, not too long"),
        pytest.param([("start", 4, 0), ("queue", 4, 10)], 70, False, id="waiting for the limit"),
        pytest.param(
            [("start", 4, 0), ("queue", 4, 10), ("queue", 4, 69)], 70, False, id="the oldest counts"
        ),
        pytest.param(
            [("start", 4, 0), ("queue", 4, 10), ("sync", 4, 80)], 1e6, True, id="success clears"
        ),
        pytest.param(
            [("start", 4, 0), ("queue", 4, 10), ("fail", 4, 20)], 70, False, id="failure does not"
        ),
        pytest.param(
            [("start", 4, 0), ("queue", 4, 10), ("sync", 4, 20), ("queue", 4, 65)],
            124.9,
            True,
            id="a request after a success waits from its own time",
        ),
        pytest.param(
            [("start", 4, 0), ("start", 6, 0), ("queue", 4, 0), ("queue", 6, 0), ("sync", 4, 10)],
            60,
            False,
            id="one late family is enough",
        ),
        pytest.param(
            [
                *[("start", 4, 0), ("start", 6, 0), ("queue", 4, 0), ("queue", 6, 0)],
                *[("sync", 4, 10), ("sync", 6, 61)],
            ],
            62,
            True,
            id="both have caught up",
        ),
        pytest.param([("queue", 6, 0)], 1e6, True, id="a family that never started is no one's"),
        pytest.param([("queue", 4, 0), ("start", 4, 5)], 1e6, True, id="starting clears"),
    ],
)
def test_healthy_means_that_nothing_waits_too_long(events, at, healthy):
    assert after(*events).verdict(START + at).healthy is healthy


def test_twenty_five_idle_seconds_are_healthy_with_a_limit_of_ten():
    health = after(("start", 4, 0), ("queue", 4, 0), ("sync", 4, 1), timeout=10.0)
    assert health.verdict(START + 26).healthy


@pytest.mark.parametrize(
    ("nodes", "eligible"),
    [
        pytest.param([], False, id="never seen"),
        pytest.param([None], False, id="seen as absent only"),
        pytest.param([GOOD], True, id="known"),
        pytest.param([GOOD, LEAVING], False, id="now leaving"),
        pytest.param([LEAVING, GOOD], True, id="reprieved"),
        pytest.param([GOOD, None], True, id="deleted without notice"),
        pytest.param([LEAVING, None], False, id="deleted after notice"),
    ],
)
def test_the_node_is_eligible_as_last_seen(nodes, eligible):
    assert after(*[("node", node) for node in nodes]).verdict(START).eligible is eligible


@pytest.mark.parametrize(
    ("node", "late", "healthz_status", "livez_status"),
    [
        pytest.param(GOOD, False, 200, 200, id="all well"),
        pytest.param(LEAVING, False, 503, 200, id="only the node goes"),
        pytest.param(None, False, 503, 200, id="no node"),
        pytest.param(GOOD, True, 503, 503, id="the proxy is stuck"),
        pytest.param(LEAVING, True, 503, 503, id="both"),
    ],
)
def test_only_healthz_asks_about_the_node(node, late, healthz_status, livez_status):
    events = [("start", 4, 0), ("node", node), *([("queue", 4, 0)] if late else [])]
    verdict = after(*events).verdict(START + TIMEOUT)
    assert (healthz(verdict).status, livez(verdict).status) == (healthz_status, livez_status)


def test_a_healthy_answer_is_up_to_date_as_of_now():
    verdict = after(("start", 4, 0), ("start", 6, 1.5), ("node", GOOD)).verdict(START + 9.25)
    assert healthz(verdict) == (
        200,
        {"Content-Type": "application/json", "X-Content-Type-Options": "nosniff"},
        b'{"lastUpdated":"2023-11-14T22:13:29.25Z","currentTime":"2023-11-14T22:13:29.25Z",'
        b'"nodeEligible":true,"healthy":true,"status":{'
        b'"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true},'
        b'"IPv6":{"lastUpdated":"2023-11-14T22:13:21.5Z","healthy":true}}}',
    )


def test_an_unhealthy_answer_tells_the_latest_update_and_which_family_is_late():
    health = after(("start", 4, 0), ("start", 6, 0), ("queue", 6, 1), ("sync", 4, 30))
    assert json.loads(livez(health.verdict(START + 100)).body) == {
        "lastUpdated": "2023-11-14T22:13:50Z",
        "currentTime": "2023-11-14T22:15:00Z",
        "healthy": False,
        "status": {
            "IPv4": {"lastUpdated": "2023-11-14T22:13:50Z", "healthy": True},
            "IPv6": {"lastUpdated": "2023-11-14T22:13:20Z", "healthy": False},
        },
    }


def test_before_any_family_has_started_there_is_no_status():
    assert json.loads(healthz(after().verdict(START)).body) == {
        "lastUpdated": "0001-01-01T00:00:00Z",
        "currentTime": "2023-11-14T22:13:20Z",
        "nodeEligible": False,
        "healthy": True,
    }


@pytest.mark.parametrize(
    ("count", "healthy", "status"),
    [
        pytest.param(2, True, 200, id="endpoints here"),
        pytest.param(0, True, 503, id="no endpoints here"),
        pytest.param(2, False, 503, id="the proxy is stuck"),
        pytest.param(0, False, 503, id="both"),
    ],
)
def test_a_service_is_healthy_here_with_endpoints_and_a_working_proxy(count, healthy, status):
    answer = service_health(ObjectName("ns", "web"), count, healthy)
    assert (answer.status, answer.headers) == (
        status,
        {
            "Content-Type": "application/json",
            "X-Content-Type-Options": "nosniff",
            "X-Load-Balancing-Endpoint-Weight": str(count),
        },
    )


def test_the_body_for_a_service_is_indented_with_tabs_and_ends_at_the_brace():
    assert service_health(ObjectName("ns", "web"), 2, False).body == (
        b'{\n\t"service": {\n\t\t"namespace": "ns",\n\t\t"name": "web"\n\t},\n'
        b'\t"localEndpoints": 2,\n\t"serviceProxyHealthy": false\n}'
    )


@pytest.mark.parametrize(
    ("at", "text"),
    [
        pytest.param(None, "0001-01-01T00:00:00Z", id="never"),
        pytest.param(0.0, "1970-01-01T00:00:00Z", id="whole second"),
        pytest.param(0.5, "1970-01-01T00:00:00.5Z", id="no trailing zeros"),
        pytest.param(0.000123, "1970-01-01T00:00:00.000123Z", id="leading zeros"),
        pytest.param(10.0, "1970-01-01T00:00:10Z", id="zeros of the second stay"),
    ],
)
def test_times_are_printed_in_utc_without_needless_zeros(at, text):
    assert rfc3339(at) == text
