from ipaddress import ip_network

import pytest

from pyproxy.kube.decode import decode_object
from pyproxy.kube.events import Skipped
from pyproxy.model import ObjectName, Service, SpecPort, WeightRule

WEB = ObjectName("default", "web")
PROXY_NAME = "service.kubernetes.io/service-proxy-name"


def service(metadata=None, status=None, **spec):
    """What is decoded from a Service with these fields of its spec."""
    spec = {"clusterIP": "10.96.0.1", **spec}
    metadata = {"name": "web", "namespace": "default", **(metadata or {})}
    return decode_object("Service", {"metadata": metadata, "spec": spec, "status": status})


def test_a_service_is_read_in_full():
    decoded = service(
        metadata={
            "annotations": {
                "pyproxy.io/weights": "zone/a=2",
                "pyproxy.io/scheduler": "wrr",
                "other": "x",
            }
        },
        status={"loadBalancer": {"ingress": [{"ip": "203.0.113.9"}]}},
        type="LoadBalancer",
        clusterIPs=["10.96.0.1", "FD00::1"],
        ipFamilies=["IPv4", "IPv6"],
        ports=[
            {"name": "http", "port": 80, "nodePort": 30080, "targetPort": "web"},
            {"name": "dns", "port": 53, "protocol": "UDP"},
        ],
        externalIPs=["198.51.100.7"],
        loadBalancerSourceRanges=["192.0.2.0/24"],
        sessionAffinity="ClientIP",
        sessionAffinityConfig={"clientIP": {"timeoutSeconds": 60}},
        internalTrafficPolicy="Local",
        externalTrafficPolicy="Local",
        healthCheckNodePort=32000,
    )
    assert decoded == Service(
        WEB,
        type="LoadBalancer",
        cluster_ip4="10.96.0.1",
        cluster_ip6="fd00::1",
        ports=(SpecPort("http", "TCP", 80, 30080), SpecPort("dns", "UDP", 53)),
        external_ips=("198.51.100.7",),
        load_balancer_ips=("203.0.113.9",),
        source_ranges=(ip_network("192.0.2.0/24"),),
        affinity_seconds=60,
        internal_local=True,
        external_local=True,
        health_check_node_port=32000,
        scheduler="wrr",
        weights=(WeightRule("zone", "a", 2),),
    )


def test_a_bare_service_has_the_apis_defaults():
    decoded = decode_object("Service", {"metadata": {"name": "web"}, "spec": {}})
    assert decoded == Service(WEB, type="ClusterIP")


@pytest.mark.parametrize(
    ("spec", "ips"),
    [
        pytest.param({}, ("10.96.0.1", None), id="E05: family from the text, IPv4"),
        pytest.param({"clusterIP": "fd00::1"}, (None, "fd00::1"), id="E05: from the text, IPv6"),
        pytest.param({"clusterIP": "172.30.0.041"}, ("172.30.0.41", None), id="E08: lenient"),
        pytest.param({"clusterIP": ""}, (None, None), id="E01: no address"),
        pytest.param({"clusterIP": "None"}, (None, None), id="E01: headless"),
        pytest.param({"type": "ExternalName"}, (None, None), id="E02: ExternalName"),
        pytest.param(
            {"ipFamilies": ["IPv6"], "clusterIPs": ["fd00::1"]},
            (None, "fd00::1"),
            id="E03: only IPv6",
        ),
        pytest.param(
            {"ipFamilies": ["IPv6", "IPv4"], "clusterIPs": ["fd00::1", "10.96.0.2"]},
            ("10.96.0.2", "fd00::1"),
            id="dual stack: the place in ipFamilies counts",
        ),
        pytest.param(
            {"ipFamilies": ["IPv4", "IPv6"], "clusterIPs": ["10.96.0.2"]},
            ("10.96.0.2", None),
            id="an index is missing",
        ),
        pytest.param({"ipFamilies": ["IPv4"]}, (None, None), id="families without clusterIPs"),
    ],
)
def test_the_cluster_ip_of_each_family(spec, ips):
    decoded = service(**spec)
    assert (decoded.cluster_ip4, decoded.cluster_ip6, decoded.warnings) == (*ips, ())


@pytest.mark.parametrize(
    ("clusterips", "warning"),
    [
        pytest.param(["10.96.0"], 'spec.clusterIPs[0]: "10.96.0" is not an address', id="no IP"),
        pytest.param(["0.0.0.0"], 'spec.clusterIPs[0]: "0.0.0.0" is not an address', id="nobody's"),
        pytest.param(
            ["fd00::1"],
            "spec.clusterIPs[0]: fd00::1 is not of the family in ipFamilies",
            id="not of its family",
        ),
    ],
)
def test_a_bad_cluster_ip_is_none_and_a_warning(clusterips, warning):
    decoded = service(ipFamilies=["IPv4"], clusterIPs=clusterips)
    assert (decoded.cluster_ip4, decoded.cluster_ip6) == (None, None)
    assert decoded.warnings == (warning,)


def test_external_ips_are_valid_and_canonical_and_each_there_once():
    decoded = service(
        externalIPs=["", " ", "1.2.3.004", "1.2.3.4", "FD00::2", "host.example", "::"]
    )
    assert decoded.external_ips == ("1.2.3.4", "fd00::2")
    assert decoded.warnings == (
        'spec.externalIPs: "host.example" is not an address; it is ignored',
        'spec.externalIPs: "::" is not an address; it is ignored',
    )


@pytest.mark.parametrize(
    ("ingress", "ips"),
    [
        pytest.param({"ip": "203.0.113.1"}, ("203.0.113.1",), id="E06: no ipMode"),
        pytest.param({"ip": "203.0.113.1", "ipMode": "VIP"}, ("203.0.113.1",), id="E06: VIP"),
        pytest.param({"ip": "203.0.113.1", "ipMode": "Proxy"}, (), id="E06: Proxy"),
        pytest.param({"ip": "203.0.113.1", "ipMode": "New"}, (), id="a mode of the future"),
        pytest.param({"hostname": "lb.example"}, (), id="only a name"),
    ],
)
def test_load_balancer_ips_are_those_that_end_here(ingress, ips):
    assert service(status={"loadBalancer": {"ingress": [ingress]}}).load_balancer_ips == ips


def test_load_balancer_ips_that_a_node_should_leave_alone_are_known():
    ingress = [{"ip": "203.0.113.1", "ipMode": "Proxy"}, {"ip": "203.0.113.2"}]
    decoded = service(status={"loadBalancer": {"ingress": ingress}})
    assert (decoded.proxied_ips, decoded.load_balancer_ips) == (("203.0.113.1",), ("203.0.113.2",))


def test_source_ranges_are_read_leniently_and_the_bad_ones_told():
    decoded = service(
        loadBalancerSourceRanges=[" 203.0.113.000/025", "10.1.2.3/8", "x", "10.0.0.0/8", "fd00::/8"]
    )
    assert decoded.source_ranges == tuple(
        map(ip_network, ("203.0.113.0/25", "10.0.0.0/8", "fd00::/8"))
    )
    assert decoded.warnings == ('spec.loadBalancerSourceRanges: "x" is not a range; it is ignored',)


@pytest.mark.parametrize(
    ("spec", "seconds", "warning_count"),
    [
        pytest.param({}, None, 0, id="none"),
        pytest.param({"sessionAffinity": "None"}, None, 0, id="said to be none"),
        pytest.param({"sessionAffinity": "ClientIP"}, 10800, 0, id="no config"),
        pytest.param(
            {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {}}, 10800, 0, id="empty"
        ),
        pytest.param(
            {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {}}},
            10800,
            0,
            id="no time",
        ),
        pytest.param(
            {
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86400}},
            },
            86400,
            0,
            id="a day",
        ),
        pytest.param(
            {
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}},
            },
            10800,
            1,
            id="no time at all",
        ),
        pytest.param(
            {"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}},
            None,
            0,
            id="a time without affinity",
        ),
    ],
)
def test_affinity_seconds(spec, seconds, warning_count):
    decoded = service(**spec)
    assert (decoded.affinity_seconds, len(decoded.warnings)) == (seconds, warning_count)


def test_bad_annotations_are_warnings_and_leave_the_defaults():
    annotations = {"pyproxy.io/weights": "zone/a=2,x", "pyproxy.io/scheduler": "y"}
    assert service(metadata={"annotations": annotations}) == Service(
        WEB,
        cluster_ip4="10.96.0.1",
        warnings=(
            'annotation pyproxy.io/weights: "x" is not SELECTOR=WEIGHT with a weight of 0 to 65535;'
            " the whole annotation is ignored",
            'annotation pyproxy.io/scheduler: "y" is not one of rr, wrr, random, lc, wlc, sh, '
            "dh, mh, sed, nq; it is ignored",
        ),
    )


@pytest.mark.parametrize("value", ["", "other", None])
def test_a_service_of_another_proxy_is_skipped_whatever_the_label_says(value):
    labels = {PROXY_NAME: value}
    assert service(metadata={"labels": labels, "resourceVersion": "7"}) == Skipped(
        "7", WEB, f"it has the label {PROXY_NAME}"
    )


@pytest.mark.parametrize("labels", [{}, {PROXY_NAME: ""}, {PROXY_NAME: "canary-2"}, None])
def test_a_proxy_with_a_name_skips_what_has_another(labels):
    mapping = {"metadata": {"name": "web", "labels": labels}, "spec": {}}
    assert decode_object("Service", mapping, "canary") == Skipped(
        "", WEB, f"it has no label {PROXY_NAME}: canary"
    )


def test_a_proxy_with_a_name_takes_what_has_it():
    mapping = {"metadata": {"name": "web", "labels": {PROXY_NAME: "canary"}}, "spec": {}}
    assert decode_object("Service", mapping, "canary") == Service(WEB)


def test_numbers_in_quotes_are_read_from_manifests():
    assert service(ports=[{"port": "80"}]).ports == (SpecPort("", "TCP", 80),)


def test_what_people_ask_about_is_kept():
    ingress = [{"ip": "203.0.113.9"}, {"ip": "203.0.113.11", "ipMode": "Proxy"}, {"hostname": "x"}]
    found = service(
        metadata={
            "annotations": {
                "kubernetes.io/elb.pass-through": "true",
                "kubernetes.io/elb.class": "performance",
            }
        },
        selector={"app": "web", "tier": "b"},
        status={"loadBalancer": {"ingress": ingress}},
    )
    assert (found.selector, found.hostnames) == ("app=web,tier=b", ("x",))
    assert (found.load_balancer_ips, found.proxied_ips) == (("203.0.113.9",), ("203.0.113.11",))
    assert (found.cloud_traffic, found.elb_class) == ("pass-through", "performance")
