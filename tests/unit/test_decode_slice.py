import json

import pytest

from pyproxy.kube.decode import decode_list, decode_object
from pyproxy.kube.events import Skipped
from pyproxy.model import Address, Endpoint, EndpointSlice, ObjectName, PortKey

WEB = ObjectName("default", "web")
HTTP = PortKey("http", "TCP")


def slice_of(*endpoints, ports=None, annotations=None, labels=None, family="IPv4"):
    labels = {"kubernetes.io/service-name": "web", **(labels or {})}
    metadata = {"name": "web", "namespace": "default", "labels": labels, "annotations": annotations}
    mapping = {
        "metadata": metadata,
        "addressType": family,
        "ports": [{"name": "http", "port": 8080}] if ports is None else ports,
        "endpoints": list(endpoints),
    }
    return decode_object("EndpointSlice", mapping)


def at(ip, **fields):
    return {"addresses": [ip], **fields}


def only(endpoint_slice):
    """The one endpoint of a slice."""
    [(found,)] = endpoint_slice.endpoints.values()
    return found


def test_a_slice_is_its_ports_times_its_endpoints():
    decoded = slice_of(
        at("10.1.0.1", nodeName="here", zone="a", targetRef={"kind": "Pod", "name": "web-0"}),
        at("10.180.00.001", conditions={"ready": False, "serving": True, "terminating": True}),
        ports=[{"name": "http", "port": 8080}, {"name": "dns", "port": 53, "protocol": "UDP"}],
    )
    first = {"node": "here", "zone": "a", "pod": "web-0"}
    draining = {"ready": False, "serving": True, "terminating": True}
    assert decoded == EndpointSlice(
        WEB,
        WEB,
        4,
        {
            HTTP: (
                Endpoint(Address("10.1.0.1", 8080), **first),
                Endpoint(Address("10.180.0.1", 8080), **draining),
            ),
            PortKey("dns", "UDP"): (
                Endpoint(Address("10.1.0.1", 53), **first),
                Endpoint(Address("10.180.0.1", 53), **draining),
            ),
        },
    )


@pytest.mark.parametrize(
    ("port", "keys"),
    [
        pytest.param({"name": "http", "port": 8080, "protocol": None}, [HTTP], id="nil is TCP"),
        pytest.param({"name": "", "port": 8080}, [PortKey("", "TCP")], id="the empty name is one"),
        pytest.param({"port": 8080}, [], id="E11: no name"),
        pytest.param({"name": None, "port": 8080}, [], id="E11: nil name"),
        pytest.param({"name": "http"}, [], id="E11: no number"),
        pytest.param({"name": "http", "port": None}, [], id="E11: nil number"),
        pytest.param({"name": "http", "port": 0}, [], id="number zero"),
        pytest.param(
            {"name": "x", "port": 1, "protocol": "SCTP"}, [PortKey("x", "SCTP")], id="SCTP"
        ),
    ],
)
def test_a_port_counts_when_it_has_a_name_and_a_number(port, keys):
    decoded = slice_of(at("10.1.0.1"), ports=[port])
    assert (list(decoded.endpoints), decoded.warnings) == (keys, ())


def test_a_port_name_given_twice_has_the_endpoints_of_both_numbers():
    decoded = slice_of(
        at("10.1.0.1"), ports=[{"name": "http", "port": 80}, {"name": "http", "port": 8080}]
    )
    assert [e.address.port for e in decoded.endpoints[HTTP]] == [80, 8080]


def test_a_slice_without_usable_endpoints_has_no_port():
    assert slice_of().endpoints == {}


@pytest.mark.parametrize(
    ("conditions", "flags"),
    [
        pytest.param(None, (True, True, False), id="none"),
        pytest.param({}, (True, True, False), id="empty"),
        pytest.param(
            {"ready": None, "serving": None, "terminating": None}, (True, True, False), id="nil"
        ),
        pytest.param({"ready": False}, (False, True, False), id="not ready: serving stays nil"),
        pytest.param({"serving": False}, (True, False, False), id="not serving"),
        pytest.param({"terminating": True}, (True, True, True), id="terminating"),
    ],
)
def test_conditions_that_are_not_told_mean_healthy(conditions, flags):
    found = only(slice_of(at("10.1.0.1", conditions=conditions)))
    assert (found.ready, found.serving, found.terminating) == flags


@pytest.mark.parametrize(
    ("hints", "zones", "nodes"),
    [
        pytest.param(None, set(), set(), id="none"),
        pytest.param({}, set(), set(), id="empty"),
        pytest.param({"forZones": []}, set(), set(), id="an empty list is no hint"),
        pytest.param({"forZones": [{"name": "a"}, {"name": "b"}]}, {"a", "b"}, set(), id="zones"),
        pytest.param(
            {"forZones": [{"name": "a"}], "forNodes": [{"name": "n"}]}, {"a"}, {"n"}, id="both"
        ),
    ],
)
def test_hints_are_sets(hints, zones, nodes):
    found = only(slice_of(at("10.1.0.1", hints=hints)))
    assert (found.zone_hints, found.node_hints) == (zones, nodes)


def test_an_endpoint_without_a_node_is_nowhere():
    assert only(slice_of(at("10.1.0.1", nodeName=None))).node == ""


def test_a_target_that_is_no_pod_names_no_pod():
    target = {"kind": "Node", "name": "web-0"}
    assert only(slice_of(at("10.1.0.1", targetRef=target))).pod == ""


def test_only_the_first_address_of_an_endpoint_counts():
    found = only(slice_of({"addresses": ["10.1.0.1", "10.1.0.2"]}))
    assert found.address == Address("10.1.0.1", 8080)


@pytest.mark.parametrize(
    ("addresses", "words"),
    [
        pytest.param([], "there is none", id="none"),
        pytest.param(None, "there is none", id="null"),
        pytest.param(["x"], '"x" is not an IPv4 address', id="not an address"),
        pytest.param(["0.0.0.0"], '"0.0.0.0" is not an IPv4 address', id="of nobody"),
        pytest.param(["fd00::1"], '"fd00::1" is not an IPv4 address', id="of the other family"),
    ],
)
def test_an_endpoint_without_an_address_of_the_family_is_left_out(addresses, words):
    decoded = slice_of({"addresses": addresses}, at("10.1.0.2"))
    assert only(decoded).address.ip == "10.1.0.2"
    assert decoded.warnings == (f"endpoints[0].addresses: {words}; the endpoint is ignored",)


def test_ipv6_endpoints_are_canonical():
    assert only(slice_of(at("FD00:0::A"), family="IPv6")).address.ip == "fd00::a"


@pytest.mark.parametrize(
    ("labels", "family", "reason"),
    [
        pytest.param(
            {"kubernetes.io/service-name": ""},
            "IPv4",
            "it has no label kubernetes.io/service-name",
            id="of no Service",
        ),
        pytest.param(
            {"service.kubernetes.io/headless": ""},
            "IPv4",
            "it has the label service.kubernetes.io/headless",
            id="headless",
        ),
        pytest.param({}, "FQDN", 'its addressType is "FQDN"', id="E12: names"),
        pytest.param({}, "", 'its addressType is ""', id="no address type"),
    ],
)
def test_a_slice_that_is_not_for_us_is_skipped(labels, family, reason):
    assert slice_of(at("10.1.0.1"), labels=labels, family=family) == Skipped("", WEB, reason)


def test_a_slice_without_labels_is_skipped():
    mapping = {"metadata": {"name": "web"}, "addressType": "IPv4"}
    assert isinstance(decode_object("EndpointSlice", mapping), Skipped)


@pytest.mark.parametrize(
    ("text", "seconds", "warning_count"),
    [
        pytest.param("1970-01-01T00:00:01.5Z", 1.5, 0, id="told"),
        pytest.param("", None, 0, id="empty"),
        pytest.param("soon", None, 1, id="E20: invalid"),
    ],
)
def test_the_trigger_time_of_a_slice(text, seconds, warning_count):
    decoded = slice_of(annotations={"endpoints.kubernetes.io/last-change-trigger-time": text})
    assert (decoded.triggered_at, len(decoded.warnings)) == (seconds, warning_count)


def test_equal_words_and_hints_of_many_endpoints_are_one_object():
    first, second = (
        only(decode_list(body, "EndpointSlice").objects[0])
        for body in [
            json.dumps(
                {
                    "metadata": {},
                    "items": [
                        {
                            "metadata": {
                                "name": "web",
                                "labels": {"kubernetes.io/service-name": "web"},
                            },
                            "addressType": "IPv4",
                            "ports": [{"name": "http", "port": 1}],
                            "endpoints": [
                                at(ip, nodeName="n 1", hints={"forZones": [{"name": "z 1"}]})
                            ],
                        }
                    ],
                }
            ).encode()
            for ip in ("10.1.0.1", "10.1.0.2")
        ]
    )
    assert first.node is second.node
    assert first.zone_hints is second.zone_hints
    assert first.node_hints is second.node_hints
