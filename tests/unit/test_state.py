from ipaddress import ip_network

import pytest

from pyproxy.model import (
    EndpointSlice,
    Node,
    ObjectName,
    PortKey,
    Remove,
    Replace,
    ServiceCIDR,
    Upsert,
    WeightRule,
)
from pyproxy.state import BATCH, LastKnown, StateError, read, read_head
from tests.builders import endpoint, service

ORIGIN = "Node here of http://api"
WEB = service(
    ports=(("http", "TCP", 80, 30080),),
    source_ranges=(ip_network("10.0.0.0/8"), ip_network("fd00::/8")),
    weights=(WeightRule("pod", "web-*", 3),),
    warnings=("odd",),
)
NAME = ObjectName("default", "web-x")
PORT = PortKey("http", "TCP")
SLICE = EndpointSlice(NAME, WEB.name, 4, {PORT: (endpoint(1, zones=("a", "b")),)}, 12.5)
NODE = Node("here", "zone-a", ("192.0.2.11",), ("10.244.1.0/24",), "uid-1")
CIDR = ServiceCIDR("kubernetes", ("10.96.0.0/16",))
ALL = (Upsert("Service", WEB), Upsert("EndpointSlice", SLICE), Upsert("Node", NODE))


def known(*changes):
    found = LastKnown()
    for change in changes:
        found.see(change)
    return found


def written(*changes):
    return b"".join(known(*changes).records(ORIGIN, 1000.5))


def objects(data):
    return [obj for _kind, some in read(data) for obj in some]


def test_what_is_written_can_be_read():
    data = written(*ALL, Upsert("ServiceCIDR", CIDR))
    head = read_head(data)
    assert (head.origin, head.saved_at) == (ORIGIN, 1000.5)
    assert objects(data) == [WEB, SLICE, NODE, CIDR]


def test_the_latest_of_each_object_is_written():
    other = service("other")
    data = written(
        Replace("Service", (WEB, other)), Upsert("Service", WEB), Remove("Service", other.name),
        Replace("Node", (NODE,)), Replace("Node", ()),
    )  # fmt: skip
    assert objects(data) == [WEB]


def test_many_objects_are_several_records():
    many = tuple(service(f"web-{number}") for number in range(2 * BATCH + 1))
    found = list(read(written(Replace("Service", many))))
    assert [len(some) for _kind, some in found] == [BATCH, BATCH, 1]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        pytest.param(b"", "does not begin", id="empty"),
        pytest.param(b"\0\0\0\1x", "does not begin", id="something else"),
        pytest.param(written(*ALL).replace(b"state 1", b"state 0"), "another version", id="older"),
        pytest.param(written().replace(b"cluster_ip4", b"cluster_ipX"), "another", id="fields"),
    ],
)
def test_a_strange_file_says_what_it_is(data, why):
    with pytest.raises(StateError, match=why):
        read_head(data)


def test_a_file_that_is_cut_off_is_not_used():
    with pytest.raises(StateError, match="cut off"):
        objects(written(*ALL)[:-1])


def test_a_damaged_record_is_not_used():
    with pytest.raises(StateError, match="damaged"):
        objects(written(*ALL).replace(b"10.0.0.0/8", b"10.0.0.0/x"))
