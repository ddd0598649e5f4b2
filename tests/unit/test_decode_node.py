import pytest

from pyproxy.kube.decode import decode_object
from pyproxy.model import Node, ServiceCIDR


def node(metadata=None, **fields):
    return decode_object("Node", {"metadata": {"name": "here", **(metadata or {})}, **fields})


def test_a_node_is_read_in_full():
    decoded = node(
        {"uid": "u-1", "labels": {"topology.kubernetes.io/zone": "a", "other": "x"}},
        spec={"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "FD00::/64"]},
        status={
            "addresses": [
                {"type": "Hostname", "address": "here"},
                {"type": "ExternalIP", "address": "203.0.113.1"},
                {"type": "InternalIP", "address": "192.0.2.1"},
                {"type": "InternalIP", "address": "unknown"},
                {"type": "InternalIP", "address": "2001:DB8::1"},
            ]
        },
    )
    assert decoded == Node(
        "here",
        zone="a",
        ips=("192.0.2.1", "2001:db8::1", "203.0.113.1"),
        pod_cidrs=("10.1.0.0/24", "fd00::/64"),
        uid="u-1",
    )


def test_a_bare_node_is_known_and_eligible():
    assert node() == Node("here")


def test_the_older_pod_range_counts_where_there_is_no_list():
    assert node(spec={"podCIDR": "10.1.0.0/24"}).pod_cidrs == ("10.1.0.0/24",)


@pytest.mark.parametrize(
    ("metadata", "taints", "eligible"),
    [
        pytest.param({}, [{"key": "other"}], True, id="another taint"),
        pytest.param({}, None, True, id="null taints"),
        pytest.param({}, [{"key": "ToBeDeletedByClusterAutoscaler"}], False, id="autoscaler"),
        pytest.param({"deletionTimestamp": "2026-01-01T00:00:00Z"}, [], False, id="being deleted"),
    ],
)
def test_a_node_that_goes_is_not_eligible(metadata, taints, eligible):
    assert node(metadata, spec={"taints": taints}).eligible is eligible


def test_a_service_cidr_is_its_ranges():
    mapping = {"metadata": {"name": "c"}, "spec": {"cidrs": ["10.96.0.0/16", "FD00::/112"]}}
    assert decode_object("ServiceCIDR", mapping) == ServiceCIDR("c", ("10.96.0.0/16", "fd00::/112"))


def test_a_service_cidr_may_have_no_ranges():
    assert decode_object("ServiceCIDR", {"metadata": {"name": "c"}}) == ServiceCIDR("c", ())
