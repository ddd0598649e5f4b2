"""What is wrong in manifests, and where it is said to be."""

from ipaddress import ip_network

import pytest

from pyproxy.manifests.resolve import Settings
from tests.manifest_builders import faults, hand_written, node, pod, resolved, service

IPV4_ONLY = Settings("here", (ip_network("10.96.0.0/16"),))
TINY = Settings("here", (ip_network("10.96.0.0/30"),))


def two_ports(first, second):
    return service(ports=[{"name": "a", **first}, {"name": "b", **second}])


@pytest.mark.parametrize(
    ("document", "error"),
    [
        pytest.param(service(port=70000), "spec.ports[0].port: 70000 is not a port", id="port"),
        pytest.param(service(port=-1), "spec.ports[0].port: -1 is not a port", id="negative"),
        pytest.param(service(port=0), "spec.ports[0].port: 0 is not a port", id="zero"),
        pytest.param(service(port=True), "spec.ports[0].port: True is not a number", id="boolean"),
        pytest.param(service(port="x"), 'spec.ports[0].port: "x" is not a number', id="word"),
        pytest.param(service(port=None), "spec.ports[0].port: it is missing", id="no port"),
        pytest.param(service(ports=[]), "spec.ports: there is none", id="no ports"),
        pytest.param(service(ports={}), "spec.ports: an object is not a list", id="no list"),
        pytest.param(service(ports=[7]), "spec.ports[0]: 7 is not an object", id="no object"),
        pytest.param(
            service(ports=[{"port": 80, "protocol": "HTTP"}]),
            'spec.ports[0].protocol: "HTTP" is not one of TCP, UDP, SCTP',
            id="protocol",
        ),
        pytest.param(
            service(ports=[{"port": 80, "targetPort": 99999}]),
            "spec.ports[0].targetPort: 99999 is not a port",
            id="target number",
        ),
        pytest.param(
            service(ports=[{"port": 80, "targetPort": "HTTP!"}]),
            'spec.ports[0].targetPort: "HTTP!" is not a name',
            id="target name",
        ),
        pytest.param(
            service(type="NodePort", ports=[{"port": 80, "nodePort": 65536}]),
            "spec.ports[0].nodePort: 65536 is not a port",
            id="node port",
        ),
        pytest.param(
            service(ports=[{"port": 80, "nodePort": 30080}]),
            "spec.ports[0].nodePort: a Service of type ClusterIP has none",
            id="node port of a ClusterIP",
        ),
        pytest.param(
            service(ports=[{"name": "a", "port": 80}, {"port": 81}]),
            "spec.ports[1].name: it is missing",
            id="unnamed among several",
        ),
        pytest.param(
            service(ports=[{"name": "a", "port": 80}, {"name": "a", "port": 81}]),
            'spec.ports[1].name: "a" is there twice',
            id="name twice",
        ),
        pytest.param(
            two_ports({"port": 80}, {"port": 80}),
            "spec.ports[1].port: 80/TCP is there twice",
            id="port twice",
        ),
        pytest.param(
            service(
                type="NodePort",
                ports=[
                    {"name": "a", "port": 80, "nodePort": 30080},
                    {"name": "b", "port": 81, "nodePort": 30080},
                ],
            ),
            "spec.ports[1].nodePort: 30080/TCP is there twice",
            id="node port twice",
        ),
        pytest.param(
            service(ports=[{"name": 'x"; flush', "port": 80}]),
            'spec.ports[0].name: "x"; flush" is not a name',
            id="port name",
        ),
        pytest.param(
            service(clusterIP="10.96.0.300"),
            'spec.clusterIP: "10.96.0.300" is not an IP address',
            id="cluster IP",
        ),
        pytest.param(
            service(clusterIP="127.0.0.1"),
            "spec.clusterIP: 127.0.0.1 cannot be the address of a Service",
            id="loopback",
        ),
        pytest.param(
            service(clusterIP="10.96.0.1", clusterIPs=["10.96.0.2"]),
            'spec.clusterIP: "10.96.0.1" is not the first of clusterIPs',
            id="two opinions",
        ),
        pytest.param(
            service(clusterIPs=["10.96.0.1", "10.96.0.2"]),
            "spec.clusterIPs: both are of one family",
            id="one family twice",
        ),
        pytest.param(
            service(clusterIPs=["10.96.0.1", "fd00::1", "fd00::2"]),
            "spec.clusterIPs: there are more than two",
            id="three addresses",
        ),
        pytest.param(
            service(clusterIP="10.96.0.1", ipFamilies=["IPv6"]),
            'spec.ipFamilies[0]: "IPv6" is not the family of 10.96.0.1',
            id="other family",
        ),
        pytest.param(
            service(ipFamilies=["IPv5"]),
            'spec.ipFamilies[0]: "IPv5" is not one of IPv4, IPv6',
            id="family",
        ),
        pytest.param(
            service(ipFamilies=["IPv4", "IPv6"], ipFamilyPolicy="SingleStack"),
            "spec.ipFamilyPolicy: SingleStack, and there are two families",
            id="policy against families",
        ),
        pytest.param(
            service(type="NodePort", clusterIP="None"),
            "spec.clusterIP: a Service of type NodePort needs one",
            id="headless NodePort",
        ),
        pytest.param(
            service(type="Nodeport"),
            'spec.type: "Nodeport" is not one of ClusterIP, NodePort, LoadBalancer, ExternalName',
            id="type",
        ),
        pytest.param(
            service(sessionAffinity="Cookie"),
            'spec.sessionAffinity: "Cookie" is not one of None, ClientIP',
            id="affinity",
        ),
        pytest.param(
            service(selector={"version": 1.0}),
            "spec.selector.version: 1.0 is not a string (quote it)",
            id="selector of a number",
        ),
        pytest.param(
            service(selector={"app": "a b"}),
            'spec.selector.app: "a b" is not the value of a label',
            id="selector",
        ),
        pytest.param(
            service(publishNotReadyAddresses="yes"),
            'spec.publishNotReadyAddresses: "yes" is neither true nor false',
            id="boolean as text",
        ),
        pytest.param(
            service(type="LoadBalancer", loadBalancerIP="x"),
            'spec.loadBalancerIP: "x" is not an IP address',
            id="load balancer IP",
        ),
        pytest.param(service(status=7), "status: 7 is not an object", id="status"),
        pytest.param(
            service(externalIPs="192.0.2.1"),
            'spec.externalIPs: "192.0.2.1" is not a list',
            id="found while decoding",
        ),
    ],
)
def test_what_is_wrong_with_a_service_is_said_with_its_place_and_field(document, error):
    assert faults(None, document) == [f"shop.yaml: document 2: Service default/web: {error}"]


@pytest.mark.parametrize(
    ("document", "error"),
    [
        pytest.param([1], "a list is not an object", id="no object"),
        pytest.param({"metadata": {}}, "kind: it is missing", id="no kind"),
        pytest.param(
            {"kind": "Service", "metadata": {}},
            "Service without a name: metadata.name: it is missing",
            id="no name",
        ),
        pytest.param(
            {"kind": "Service", "metadata": {"name": "Web_1"}},
            'Service Web_1: metadata.name: "Web_1" is not a name',
            id="name",
        ),
        pytest.param(
            {"kind": "Pod", "metadata": {"name": "a.b", "namespace": "a.b"}},
            'Pod a.b: metadata.namespace: "a.b" is not a name',
            id="namespace",
        ),
        pytest.param(
            pod(ip="10.1"), 'Pod default/pod-1: status.podIP: "10.1" is not an IP address', id="IP"
        ),
        pytest.param(
            pod(ports=[{"name": "http"}]),
            "Pod default/pod-1: spec.containers[0].ports[0].containerPort: it is missing",
            id="container port",
        ),
        pytest.param(
            node("here", "zone a"),
            'Node here: metadata.labels.topology.kubernetes.io/zone: "zone a" is not the value of '
            "a label",
            id="zone",
        ),
        pytest.param(
            hand_written(addressType=None),
            "EndpointSlice default/by-hand: addressType: None is not one of IPv4, IPv6, FQDN",
            id="address type",
        ),
        pytest.param(
            hand_written(of="web/x"),
            "EndpointSlice default/by-hand: metadata.labels.kubernetes.io/service-name: "
            '"web/x" is not a name',
            id="owner of a slice",
        ),
        pytest.param(
            hand_written(ports=[{"port": 70000}]),
            "EndpointSlice default/by-hand: ports[0].port: 70000 is not a port",
            id="port of a slice",
        ),
        pytest.param(
            {"kind": "List", "items": [service(port="x" * 99)]},
            f'items[0]: Service default/web: spec.ports[0].port: "{"x" * 59}... is not a number',
            id="item of a list, long value",
        ),
    ],
)
def test_what_is_wrong_with_other_objects_is_said_likewise(document, error):
    assert faults(document) == [f"shop.yaml: document 1: {error}"]


def test_one_bad_object_does_not_stop_the_others():
    result = resolved(service("bad", port=0), service("good"))
    assert [found.name.name for found in result.services] == ["good"]


@pytest.mark.parametrize(
    ("documents", "error"),
    [
        pytest.param(
            [service("b", clusterIP="10.96.0.9"), service("a", clusterIP="10.96.0.9")],
            "document 1: Service default/b: spec.clusterIP: 10.96.0.9 is taken by Service "
            "default/a",
            id="cluster IP",
        ),
        pytest.param(
            [
                service(name, type="NodePort", ports=[{"port": 80, "nodePort": 30080}])
                for name in "ab"
            ],
            "document 2: Service default/b: spec.ports[0].nodePort: 30080/TCP is taken by Service "
            "default/a",
            id="node port",
        ),
        pytest.param(
            [
                service("a", type="NodePort", ports=[{"port": 80, "nodePort": 31000}]),
                service(
                    "b",
                    type="LoadBalancer",
                    externalTrafficPolicy="Local",
                    healthCheckNodePort=31000,
                ),
            ],
            "document 2: Service default/b: spec.healthCheckNodePort: 31000/TCP is taken by "
            "Service default/a",
            id="health check node port",
        ),
        pytest.param(
            [service("a"), service("a", port=81)],
            "document 2: Service default/a: it is already in shop.yaml, document 1",
            id="twice",
        ),
        pytest.param(
            [service(selector={"app": "web"}), pod(), hand_written("web-ipv4")],
            "document 3: EndpointSlice default/web-ipv4: a slice made of Pods has this name",
            id="name of a slice that is made",
        ),
    ],
)
def test_of_two_that_claim_the_same_one_is_refused(documents, error):
    result = resolved(*documents)
    assert [str(fault) for fault in result.faults] == [f"shop.yaml: {error}"]
    assert len(result.services) == 1


def test_a_node_port_may_be_shared_by_protocols():
    udp = [{"port": 53, "nodePort": 30053, "protocol": "UDP"}]
    tcp = [{"port": 53, "nodePort": 30053, "protocol": "TCP"}]
    assert (
        faults(service("a", type="NodePort", ports=udp), service("b", type="NodePort", ports=tcp))
        == []
    )


@pytest.mark.parametrize(
    ("settings", "spec", "error"),
    [
        pytest.param(
            IPV4_ONLY,
            {"ipFamilyPolicy": "RequireDualStack"},
            "there is no --service-cidr of IPv6 to take an address from",
            id="no range of the family",
        ),
        pytest.param(
            Settings("here", ()),
            {},
            "there is no --service-cidr of IPv4 to take an address from",
            id="no range",
        ),
    ],
)
def test_an_address_cannot_come_from_nowhere(settings, spec, error):
    expected = f"shop.yaml: document 1: Service default/web: spec.clusterIP: {error}"
    assert faults(service(**spec), settings=settings) == [expected]


def test_a_full_range_is_an_error_of_the_last_service():
    assert faults(*map(service, "abc"), settings=TINY) == [
        "shop.yaml: document 3: Service default/c: spec.clusterIP: no IPv4 address of "
        "--service-cidr is free"
    ]
