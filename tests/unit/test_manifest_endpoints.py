"""Endpoints of Services from the Pods and slices of manifests."""

import pytest

from pyproxy.model import Address, Endpoint, EndpointSlice, ObjectName, PortKey
from tests.manifest_builders import hand_written, node, pod, resolved, service

WEB = ObjectName("default", "web")
SELECTOR = {"app": "web"}


def endpoint_ips(result):
    return [
        e.address.ip for part in result.slices for group in part.endpoints.values() for e in group
    ]


def test_a_selected_pod_is_an_endpoint_on_its_node_and_in_its_zone():
    result = resolved(service(selector=SELECTOR), pod(7, node="far"), node("far", "zone-b"))
    member = Endpoint(Address("10.244.1.7", 80), node="far", zone="zone-b", pod="pod-7")
    name = ObjectName("default", "web-ipv4")
    assert result.slices == (EndpointSlice(name, WEB, 4, {PortKey("", "TCP"): (member,)}),)


READY = [{"type": "Ready", "status": "True"}]
NOT_READY = [{"type": "Ready", "status": "False"}]
LEAVING = {"deletionTimestamp": "2026-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    ("conditions", "metadata", "spec", "told"),
    [
        pytest.param(None, {}, {}, (True, True, False), id="no conditions: ready"),
        pytest.param(READY, {}, {}, (True, True, False), id="ready"),
        pytest.param(
            [{"type": "Ready", "status": True}], {}, {}, (True, True, False), id="boolean"
        ),
        pytest.param(NOT_READY, {}, {}, (False, False, False), id="not ready"),
        pytest.param([{"type": "Other"}], {}, {}, (False, False, False), id="not said to be ready"),
        pytest.param(READY, LEAVING, {}, (False, True, True), id="draining"),
        pytest.param(NOT_READY, LEAVING, {}, (False, False, True), id="leaving, not serving"),
        pytest.param(
            NOT_READY, {}, {"publishNotReadyAddresses": True}, (True, False, False), id="published"
        ),
        pytest.param(
            READY,
            LEAVING,
            {"publishNotReadyAddresses": True},
            (True, True, True),
            id="published too",
        ),
    ],
)
def test_conditions_of_an_endpoint_follow_the_pod(conditions, metadata, spec, told):
    member = pod(status={"conditions": conditions}, **metadata)
    (made,) = resolved(service(selector=SELECTOR, **spec), member).slices
    ((found,),) = made.endpoints.values()
    assert (found.ready, found.serving, found.terminating) == told


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(pod(app="other"), id="other labels"),
        pytest.param(pod(namespace="shop"), id="other namespace"),
        pytest.param(pod(status={"phase": "Succeeded"}), id="has ended"),
        pytest.param(pod(status={"phase": "Failed"}), id="has failed"),
        pytest.param(pod(status={"podIP": None}), id="has no address yet"),
        pytest.param(pod(ip="fd00::1"), id="has no address of the family"),
    ],
)
def test_such_a_pod_is_no_endpoint(document):
    result = resolved(service(selector=SELECTOR), document)
    assert (result.slices, result.faults) == ((), ())


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param({"clusterIP": "None"}, id="headless"),
        pytest.param({"type": "ExternalName"}, id="ExternalName"),
        pytest.param({"selector": {}}, id="empty selector"),
    ],
)
def test_such_a_service_has_no_endpoints(spec):
    assert resolved(service(**{"selector": SELECTOR, **spec}), pod()).slices == ()


def test_a_dual_stack_service_has_a_slice_of_each_family():
    both = pod(status={"podIPs": [{"ip": "10.244.1.1"}, {"ip": "fd00:244::1"}]})
    result = resolved(service(selector=SELECTOR, ipFamilyPolicy="PreferDualStack"), both)
    assert [(part.name.name, part.family) for part in result.slices] == [
        ("web-ipv4", 4),
        ("web-ipv6", 6),
    ]
    assert endpoint_ips(result) == ["10.244.1.1", "fd00:244::1"]


def port(name, number, **rest):
    return {"name": name, "containerPort": number, **rest}


def test_a_named_target_is_another_number_in_each_pod():
    result = resolved(
        service(selector=SELECTOR, ports=[{"port": 80, "targetPort": "http"}]),
        pod(1, ports=[port("http", 8080)]),
        pod(2, ports=[port("http", 9090), {"containerPort": 1}]),
        pod(3, ports=[port("http", 8080)]),
        pod(4, ports=[port("http", 5353, protocol="UDP")]),
        pod(5),
    )
    found = {
        part.name.name: [e.address for e in part.endpoints[PortKey("", "TCP")]]
        for part in result.slices
    }
    assert found == {
        "web-ipv4": [Address("10.244.1.1", 8080), Address("10.244.1.3", 8080)],
        "web-ipv4-2": [Address("10.244.1.2", 9090)],
    }


def test_a_port_of_a_sidecar_counts_and_that_of_another_init_container_does_not():
    document = pod()
    document["spec"]["initContainers"] = [
        {"ports": [port("once", 1)]},
        {"restartPolicy": "Always", "ports": [port("http", 8080)]},
    ]
    ports = [
        {"name": "a", "port": 80, "targetPort": "http"},
        {"name": "b", "port": 81, "targetPort": "once"},
    ]
    (made,) = resolved(service(selector=SELECTOR, ports=ports), document).slices
    assert list(made.endpoints) == [PortKey("a", "TCP")]


@pytest.mark.parametrize(
    ("distribution", "zones", "nodes"),
    [
        pytest.param(None, set(), set(), id="none"),
        pytest.param("PreferClose", {"zone-a"}, set(), id="old name of the same zone"),
        pytest.param("PreferSameZone", {"zone-a"}, set(), id="same zone"),
        pytest.param("PreferSameNode", {"zone-a"}, {"here"}, id="same node"),
    ],
)
def test_traffic_distribution_becomes_hints(distribution, zones, nodes):
    web = service(selector=SELECTOR, trafficDistribution=distribution)
    (made,) = resolved(web, pod(), node("here", "zone-a")).slices
    ((found,),) = made.endpoints.values()
    assert (found.zone_hints, found.node_hints) == (zones, nodes)


def test_a_slice_written_by_hand_serves_a_service_without_a_selector():
    result = resolved(service(), hand_written())
    member = Endpoint(Address("10.9.9.9", 8080))
    name = ObjectName("default", "by-hand")
    assert result.slices == (EndpointSlice(name, WEB, 4, {PortKey("", "TCP"): (member,)}),)
