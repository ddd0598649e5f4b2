from ipaddress import ip_network

import pytest

from pyproxy.model import (
    KINDS,
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
from pyproxy.state import (
    BATCH,
    END,
    LENGTH_BYTES,
    LastKnown,
    StateError,
    appended,
    read,
    read_head,
)
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
NODE_NAME = ObjectName("", "here")
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
    found = known(*(change for changes in read(data) for change in changes))
    return [obj for kind in KINDS for obj in found.objects(kind)]


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
    assert list(map(len, found)) == [BATCH, BATCH, 1]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        pytest.param(b"", "does not begin", id="empty"),
        pytest.param(b"\0\0\0\1x", "does not begin", id="something else"),
        pytest.param(written(*ALL).replace(b"state 2", b"state 0"), "another version", id="older"),
        pytest.param(written().replace(b"cluster_ip4", b"cluster_ipX"), "another", id="fields"),
    ],
)
def test_a_strange_file_says_what_it_is(data, why):
    with pytest.raises(StateError, match=why):
        read_head(data)


def test_a_file_that_is_cut_off_is_not_used():
    with pytest.raises(StateError, match="cut off"):
        objects(written(*ALL)[:-1])


@pytest.mark.parametrize("end", [b"", b"\0\0\1", b"\0\0\0\1x", bytes(4096)])
def test_what_was_appended_counts_as_far_as_it_is_whole(end):
    other = service("other")
    since = [Upsert("Service", other), Remove("Service", WEB.name), Remove("Node", NODE_NAME)]
    assert objects(written(*ALL) + b"".join(map(appended, since)) + end) == [other, SLICE]


def test_a_file_without_its_end_is_not_used():
    with pytest.raises(StateError, match="cut off"):
        objects(written(*ALL)[: -LENGTH_BYTES - len(END)])


def test_a_damaged_record_is_not_used():
    with pytest.raises(StateError, match="damaged"):
        objects(written(*ALL).replace(b"10.0.0.0/8", b"10.0.0.0/x"))
