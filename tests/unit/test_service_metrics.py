"""Counts of Services as metrics, no more series than may be."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from pyproxy.counters import Counts, Where
from pyproxy.service_metrics import ServiceMetrics
from tests.builders import address, owner

ONE = Where(owner("web", "http"))


def lines(metrics):
    registry = CollectorRegistry()
    registry.register(metrics)
    return [line for line in generate_latest(registry).decode().splitlines() if line[0] != "#"]


def services(**connections):
    return {Where(owner(name)): Counts(count) for name, count in connections.items()}


def shown(metrics):
    return {line.split('service="')[1].split('"')[0]: line.split()[-1] for line in lines(metrics)}


def test_what_a_mode_cannot_tell_has_no_series():
    metrics = ServiceMetrics()
    metrics.publish({ONE: Counts(3)})
    labels = 'namespace="default",port="http",protocol="TCP",service="web"'
    assert lines(metrics) == [f"pyproxy_service_connections_total{{{labels}}} 3.0"]


def test_packets_that_are_refused_have_the_reason():
    metrics = ServiceMetrics()
    metrics.publish({ONE: Counts(rejected=1, dropped=2, denied=3)})
    of = 'namespace="default",port="http",protocol="TCP",reason='
    name = "pyproxy_service_refused_packets_total"
    assert lines(metrics) == [
        f'{name}{{action="reject",{of}"no_endpoint",service="web"}} 1.0',
        f'{name}{{action="drop",{of}"traffic_policy",service="web"}} 2.0',
        f'{name}{{action="drop",{of}"source_ranges",service="web"}} 3.0',
    ]


def test_endpoints_have_metrics_of_their_own():
    metrics = ServiceMetrics()
    metrics.publish({ONE: Counts(3), Where(ONE.owner, address(1)): Counts(2, bytes_in=5)})
    found = [line for line in lines(metrics) if "endpoint=" in line]
    assert [line.partition("{")[0] for line in found] == [
        "pyproxy_endpoint_connections_total", "pyproxy_endpoint_bytes_total",
    ]  # fmt: skip
    assert all(f'endpoint="{address(1)}"' in line for line in found)


def test_the_busiest_are_shown_and_the_rest_is_one_row():
    told = []
    metrics = ServiceMetrics(most_rows=2, on_full=told.append)
    metrics.publish(services(a=1, b=20, c=30, d=4))
    assert shown(metrics) == {"b": "20.0", "c": "30.0", "other": "5.0"}
    metrics.publish(services(a=1, b=20, c=30, d=4))
    assert told == [4]


def test_who_is_shown_stays_shown_while_it_exists():
    metrics = ServiceMetrics(most_rows=2)
    metrics.publish(services(a=1, b=2))
    metrics.publish(services(a=1, b=2, c=50))
    assert shown(metrics) == {"a": "1.0", "b": "2.0", "other": "50.0"}
    metrics.publish(services(b=2, c=50))
    assert shown(metrics) == {"b": "2.0", "c": "50.0"}


@pytest.mark.parametrize("most", [1, 3, 10])
def test_nothing_is_lost_however_few_rows_there_may_be(most):
    metrics = ServiceMetrics(most_rows=most)
    metrics.publish(services(**{f"s{i}": i for i in range(7)}))
    assert sum(float(value) for value in shown(metrics).values()) == sum(range(7))
    assert len(lines(metrics)) <= most + 1
