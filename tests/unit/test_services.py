from ipaddress import ip_network

import pytest

from pyproxy.services import service_ports
from tests.builders import VIP, service


def only(**fields):
    family = fields.pop("family", 4)
    (port,) = service_ports(service(**fields), family)
    return port


def test_a_port_takes_over_what_the_service_says():
    port = only(ports=(("http", "UDP", 53, 30053),), affinity_seconds=600, internal_local=True)
    assert str(port.name) == "default/web:http"
    assert (port.cluster_ip, port.port, port.node_port) == (VIP, 53, 30053)
    assert (port.affinity_seconds, port.internal_local) == (600, True)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"ip": None}, id="headless"),
        pytest.param({"type": "ExternalName"}, id="ExternalName, cluster IP or not"),
        pytest.param({"ip": None, "cluster_ip6": "fd00::1"}, id="another family"),
        pytest.param({"ports": ()}, id="no ports"),
    ],
)
def test_some_services_are_not_for_a_proxier(fields):
    assert service_ports(service(**fields), 4) == ()


def test_each_family_keeps_its_own_of_a_dual_stack_service():
    dual = {
        "cluster_ip6": "fd00::1",
        "external_ips": ("198.18.0.1", "fd00::2"),
        "load_balancer_ips": ("fd00::3", "198.18.0.2"),
        "source_ranges": (ip_network("203.0.113.0/24"), ip_network("2001:db8::/32")),
    }
    four, six = only(**dual), only(**dual, family=6)
    assert (four.cluster_ip, four.external_ips, four.load_balancer_ips) == (
        VIP,
        ("198.18.0.1",),
        ("198.18.0.2",),
    )
    assert (six.cluster_ip, six.external_ips, six.load_balancer_ips) == (
        "fd00::1",
        ("fd00::2",),
        ("fd00::3",),
    )
    assert four.source_ranges == (ip_network("203.0.113.0/24"),)
    assert six.source_ranges == (ip_network("2001:db8::/32"),)


def test_a_range_of_everything_lifts_the_guard_of_its_family_only():
    ranges = tuple(map(ip_network, ("0.0.0.0/0", "203.0.113.0/24", "2001:db8::/32")))
    fields = {"source_ranges": ranges, "cluster_ip6": "fd00::1"}
    assert only(**fields).source_ranges == ()
    assert only(**fields, family=6).source_ranges == (ip_network("2001:db8::/32"),)


@pytest.mark.parametrize(
    ("fields", "local"),
    [
        pytest.param({"type": "LoadBalancer"}, True, id="load balancer"),
        pytest.param({"type": "NodePort"}, True, id="node port"),
        pytest.param({"external_ips": ("198.18.0.1",)}, True, id="external IPs"),
        pytest.param({}, False, id="internal"),
    ],
)
def test_the_external_policy_counts_where_a_service_is_exposed(fields, local):
    assert only(external_local=True, **fields).external_local is local


@pytest.mark.parametrize(
    ("fields", "port"),
    [
        pytest.param({"type": "LoadBalancer", "external_local": True}, 32000, id="local"),
        pytest.param({"type": "LoadBalancer"}, 0, id="cluster policy"),
        pytest.param({"type": "NodePort", "external_local": True}, 0, id="node port"),
    ],
)
def test_only_local_load_balancers_have_a_health_port(fields, port):
    assert only(health_check_node_port=32000, **fields).health_check_node_port == port


def test_external_ips_may_be_switched_off():
    (port,) = service_ports(service(external_ips=("198.18.0.1",)), 4, allow_external_ips=False)
    assert port.external_ips == ()


@pytest.mark.parametrize(
    ("said", "cloud", "expected"),
    [
        pytest.param({}, "", (("198.18.0.1",), "short-circuit"), id="ipMode says it"),
        pytest.param(
            {"balancer_traffic": "short-circuit"}, "",
            (("198.18.0.1", "198.18.0.2"), "short-circuit"), id="more than ipMode wants",
        ),
        pytest.param(
            {"balancer_traffic": "pass-through"}, "",
            (("198.18.0.1",), "pass-through"), id="less than ipMode wants",
        ),
        pytest.param(
            {"balancer_traffic": "local-else-pass-through"}, "",
            (("198.18.0.1", "198.18.0.2"), "local-else-pass-through"), id="where an endpoint is",
        ),
        pytest.param(
            {"cloud_traffic": "pass-through"}, "",
            (("198.18.0.1",), "short-circuit"), id="a cloud's word, unasked",
        ),
        pytest.param(
            {"cloud_traffic": "pass-through"}, "huawei",
            (("198.18.0.1",), "pass-through"), id="a cloud's word",
        ),
        pytest.param(
            {"cloud_traffic": "pass-through", "balancer_traffic": "short-circuit"}, "huawei",
            (("198.18.0.1", "198.18.0.2"), "short-circuit"), id="ours comes first",
        ),
    ],
)  # fmt: skip
def test_who_carries_the_traffic_of_a_load_balancer(said, cloud, expected):
    web = service(load_balancer_ips=("198.18.0.1",), proxied_ips=("198.18.0.2",), **said)
    (port,) = service_ports(web, 4, cloud=cloud)
    assert (port.load_balancer_ips, port.balancer_traffic) == expected
