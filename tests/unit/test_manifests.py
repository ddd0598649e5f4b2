"""What manifest files mean: Services with their numbers, slices from Pods, errors and repair."""

from pathlib import Path

import pytest

from pyproxy.manifests.resolve import Memory, Settings, resolve
from pyproxy.manifests.text import documents_of
from pyproxy.model import (
    Node,
    ObjectName,
    Service,
    ServiceCIDR,
    SpecPort,
)
from tests.manifest_builders import DUAL, hand_written, node, resolved, service

WEB = ObjectName("default", "web")
PROXY_NAME = "service.kubernetes.io/service-proxy-name"
SELECTOR = {"app": "web"}
TUTORIAL = Path(__file__).parents[1] / "data/manifests"


def only_service(*documents, **rest):
    result = resolved(*documents, **rest)
    assert [str(fault) for fault in result.faults] == []
    (found,) = result.services
    return found


# --- defaults and allocation --------------------------------------------------------------------


def test_a_service_of_one_port_gets_an_address_and_the_defaults():
    assert only_service(service()) == Service(
        WEB, cluster_ip4="10.96.203.244", ports=(SpecPort("", "TCP", 80),)
    )


@pytest.mark.parametrize(
    ("spec", "families"),
    [
        pytest.param({}, (True, False), id="family of the first range"),
        pytest.param({"ipFamilies": ["IPv6"]}, (False, True), id="the family that is asked for"),
        pytest.param({"ipFamilyPolicy": "SingleStack"}, (True, False), id="single stack"),
        pytest.param({"ipFamilyPolicy": "PreferDualStack"}, (True, True), id="dual preferred"),
        pytest.param({"ipFamilyPolicy": "RequireDualStack"}, (True, True), id="dual required"),
        pytest.param({"ipFamilies": ["IPv6", "IPv4"]}, (True, True), id="two families, no policy"),
        pytest.param({"clusterIP": "fd00:10:96::9"}, (False, True), id="family of the address"),
        pytest.param(
            {"clusterIP": "10.96.0.9", "ipFamilyPolicy": "PreferDualStack"},
            (True, True),
            id="one address written, the other allocated",
        ),
        pytest.param({"clusterIP": "None"}, (False, False), id="headless"),
        pytest.param({"clusterIPs": ["None"]}, (False, False), id="headless by the list"),
        pytest.param(
            {"type": "ExternalName", "externalName": "example.com"},
            (False, False),
            id="ExternalName",
        ),
    ],
)
def test_a_service_has_an_address_of_each_of_its_families(spec, families):
    found = only_service(service(**spec))
    assert (found.cluster_ip4 is not None, found.cluster_ip6 is not None) == families


def test_dual_stack_is_preferred_only_where_both_ranges_exist():
    one = Settings("here", DUAL[1:])
    found = only_service(service(ipFamilyPolicy="PreferDualStack"), settings=one)
    assert (found.cluster_ip4, found.cluster_ip6 is None) == (None, False)


def test_written_addresses_are_kept_in_their_canonical_form():
    found = only_service(service(clusterIPs=["fd00:10:96:0::A", "172.30.0.041"]))
    assert (found.cluster_ip4, found.cluster_ip6) == ("172.30.0.41", "fd00:10:96::a")


@pytest.mark.parametrize(
    ("spec", "has_node_port", "has_health_port"),
    [
        pytest.param({}, False, False, id="ClusterIP"),
        pytest.param({"type": "NodePort"}, True, False, id="NodePort"),
        pytest.param({"type": "LoadBalancer"}, True, False, id="LoadBalancer"),
        pytest.param(
            {"type": "LoadBalancer", "externalTrafficPolicy": "Local"},
            True,
            True,
            id="LoadBalancer, Local",
        ),
        pytest.param(
            {"type": "NodePort", "externalTrafficPolicy": "Local"},
            True,
            False,
            id="NodePort, Local",
        ),
        pytest.param(
            {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": False},
            False,
            False,
            id="LoadBalancer that wants none",
        ),
    ],
)
def test_node_ports_are_allocated_by_type(spec, has_node_port, has_health_port):
    found = only_service(service(**spec))
    numbers = (found.ports[0].node_port, found.health_check_node_port)
    assert [n in range(30000, 32768) for n in numbers] == [has_node_port, has_health_port]
    assert [n == 0 for n in numbers] == [not has_node_port, not has_health_port]


def test_a_written_node_port_is_kept_even_where_none_is_allocated():
    ports = [{"port": 80, "nodePort": 8080}]
    found = only_service(
        service(type="LoadBalancer", allocateLoadBalancerNodePorts=False, ports=ports)
    )
    assert found.ports == (SpecPort("", "TCP", 80, 8080),)


def test_a_written_health_check_node_port_is_kept():
    found = only_service(
        service(type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=31999)
    )
    assert found.health_check_node_port == 31999


def test_both_protocols_of_one_port_get_the_same_node_port():
    ports = [
        {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
    ]
    udp, tcp = only_service(service(type="NodePort", ports=ports)).ports
    assert udp.node_port == tcp.node_port != 0


@pytest.mark.parametrize(
    ("fields", "ips"),
    [
        pytest.param({}, (), id="nothing is invented"),
        pytest.param({"loadBalancerIP": "203.0.113.7"}, ("203.0.113.7",), id="deprecated field"),
        pytest.param(
            {
                "loadBalancerIP": "203.0.113.7",
                "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.8"}]}},
            },
            ("203.0.113.8",),
            id="status wins",
        ),
    ],
)
def test_a_load_balancer_has_the_addresses_of_its_manifest(fields, ips):
    assert only_service(service(type="LoadBalancer", **fields)).load_balancer_ips == ips


def test_load_balancer_ip_counts_for_no_other_type():
    assert only_service(service(loadBalancerIP="203.0.113.7")).load_balancer_ips == ()


def test_quoted_numbers_are_numbers():
    ports = [{"port": "80", "targetPort": "8080", "nodePort": "30080"}]
    found = only_service(service(type="NodePort", ports=ports))
    assert found.ports == (SpecPort("", "TCP", 80, 30080),)


# --- the node, ranges, and what is passed over --------------------------------------------------


def test_without_a_manifest_the_node_has_its_name_and_nothing_else():
    assert resolved(node("other", "zone-b")).node == Node("here")


def test_the_node_is_the_one_with_this_name():
    document = node("here", "zone-a") | {
        "spec": {"podCIDRs": ["10.244.1.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.11"}]},
    }
    assert resolved(document).node == Node("here", "zone-a", ("192.0.2.11",), ("10.244.1.0/24",))


def cidr(name, *cidrs):
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": name},
        "spec": {"cidrs": list(cidrs)},
    }


def test_service_ranges_are_those_of_the_flag_and_of_the_manifests():
    default = ServiceCIDR("kubernetes", ("10.96.0.0/16", "fd00:10:96::/112"))
    more = ServiceCIDR("more", ("10.97.0.0/16",))
    assert resolved(cidr("more", "10.97.0.0/16")).service_cidrs == (default, more)


def test_a_manifest_may_take_the_name_of_the_default_range():
    result = resolved(cidr("kubernetes", "10.0.0.0/8"))
    assert result.service_cidrs == (ServiceCIDR("kubernetes", ("10.0.0.0/8",)),)


def test_without_any_range_there_is_no_service_cidr():
    assert resolved(settings=Settings("here", ())).service_cidrs == ()


def test_lists_are_expanded():
    items = [{"metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}}]
    plain = {"apiVersion": "v1", "kind": "List", "items": [service("shop")]}
    implied = {"apiVersion": "v1", "kind": "ServiceList", "items": items}
    assert [s.name.name for s in resolved(plain, implied).services] == ["shop", "web"]


@pytest.mark.parametrize(
    ("document", "note"),
    [
        pytest.param(
            {"apiVersion": "v1", "kind": "ConfigMap"}, "kind ConfigMap of v1 is ignored", id="kind"
        ),
        pytest.param(
            {"apiVersion": "serving.knative.dev/v1", "kind": "Service"},
            "kind Service of serving.knative.dev/v1 is ignored",
            id="a Service of others",
        ),
        pytest.param({"kind": "PodList"}, "kind PodList is ignored", id="a list without items"),
        pytest.param(
            {"apiVersion": "apps/v1", "kind": "Deployment"},
            "kind Deployment of apps/v1 is ignored; nothing here starts Pods: write them, or an "
            "EndpointSlice",
            id="what would start Pods",
        ),
        pytest.param(
            service() | {"metadata": {"name": "x", "labels": {PROXY_NAME: "other"}}},
            f"Service default/x is ignored: it has the label {PROXY_NAME}",
            id="a Service for another proxy",
        ),
        pytest.param(
            hand_written() | {"metadata": {"name": "x"}},
            "EndpointSlice default/x is ignored: it has no label kubernetes.io/service-name",
            id="a slice of nobody",
        ),
    ],
)
def test_what_is_of_no_interest_is_a_note_and_no_fault(document, note):
    result = resolved(document)
    assert (result.notes, result.faults, result.services) == ((note,), (), ())


def test_a_kind_of_no_interest_is_noted_once():
    result = resolved(*[{"kind": "Secret", "metadata": {"name": name}} for name in "abc"])
    assert result.notes == ("kind Secret is ignored",)


def test_the_tutorial_becomes_what_it_promises():
    files = {
        path.name: documents_of(path.read_text(), is_json=path.suffix == ".json")
        for path in TUTORIAL.iterdir()
    }
    result = resolve(files, Memory(), Settings("node-1", DUAL))
    services = {service.name.name: service for service in result.services}
    assert result.faults == ()
    assert services["my-nginx-nodeport"].ports == (SpecPort("", "TCP", 80, 30080),)
    assert services["my-nginx-svc"].load_balancer_ips == ("203.0.113.10",)
    assert services["my-nginx-headless"].cluster_ip4 is None
    endpoints = {
        part.service.name: [(str(e.address), e.ready) for e in group]
        for part in result.slices
        for group in part.endpoints.values()
    }
    pods = [("10.244.1.11:80", True), ("10.244.2.12:80", True), ("10.244.2.13:80", False)]
    assert endpoints == {
        "my-nginx": pods,
        "my-nginx-nodeport": pods,
        "my-nginx-svc": pods,
        "database": [("198.51.100.7:5432", True)],
    }
    assert result.node.zone == "zone-a"
