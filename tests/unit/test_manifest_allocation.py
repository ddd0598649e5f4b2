"""Which numbers are given to Services that leave them open."""

from ipaddress import ip_address, ip_network

import pytest

from pyproxy.manifests.allocation import (
    CLUSTER_IP,
    NODE_PORTS,
    Allocation,
    Band,
    Refusal,
    Slot,
    addresses,
    allocate,
)
from pyproxy.model import ObjectName

FEW = Band(1, 1, 4)  # 1, 2 and 3
BANDS = {"IPv4": FEW, "TCP": FEW, "UDP": FEW}


def ip_of(name):
    return Slot(ObjectName("default", name), CLUSTER_IP, "IPv4")


def port_of(name, port=80, proto="TCP"):
    return Slot(ObjectName("default", name), port, proto)


A, B, C, D = map(ip_of, "abcd")


@pytest.mark.parametrize(
    ("wanted", "held", "granted", "refused"),
    [
        pytest.param({}, {A: 1}, {}, {}, id="what nobody wants is free again"),
        pytest.param({A: 9}, {}, {A: 9}, {}, id="by name, also outside of the range"),
        pytest.param({A: None}, {A: 2}, {A: 2}, {}, id="held"),
        pytest.param({A: 1}, {A: 2}, {A: 1}, {}, id="held another"),
        pytest.param({A: 2, B: None}, {B: 2}, {B: 2}, {A: Refusal(B)}, id="the holder keeps it"),
        pytest.param({A: 2, B: 2}, {B: 2}, {B: 2}, {A: Refusal(B)}, id="likewise by name"),
        pytest.param({A: 2, B: 2}, {}, {A: 2}, {B: Refusal(A)}, id="the first name"),
        pytest.param({A: 1, B: 2}, {A: 2, B: 1}, {A: 1, B: 2}, {}, id="exchanged"),
        pytest.param({A: 1, B: 2, C: None}, {}, {A: 1, B: 2, C: 3}, {}, id="around the others"),
        pytest.param(
            {A: 1, B: 2, C: 3, D: None}, {}, {A: 1, B: 2, C: 3}, {D: Refusal(None)}, id="full"
        ),
    ],
)
def test_allocation(wanted, held, granted, refused):
    assert allocate(wanted, held, BANDS) == Allocation(granted, refused)


def test_a_held_number_outside_of_the_range_is_replaced():
    assert allocate({A: None}, {A: 99}, BANDS).granted[A] in range(1, 4)


def test_a_slot_without_a_range_stays_empty():
    assert allocate({A: None}, {A: 2}, {}) == Allocation({}, {A: Refusal(None)})


ONE_NUMBER = {"TCP": Band(1, 1, 2), "UDP": Band(1, 1, 2)}


@pytest.mark.parametrize(
    ("other", "allocation"),
    [
        pytest.param(port_of("web", 80, "UDP"), {port_of("web", 80, "UDP"): 1}, id="one Service"),
        pytest.param(port_of("shop", 80, "UDP"), {}, id="two Services"),
        pytest.param(port_of("web", 81), {}, id="two ports of one protocol"),
    ],
)
def test_only_the_protocols_of_one_service_share_a_node_port(other, allocation):
    web = port_of("web")
    assert allocate({web: 1, other: None}, {}, ONE_NUMBER).granted == {web: 1, **allocation}


@pytest.mark.parametrize(
    ("network", "band"),
    [
        pytest.param("10.96.0.0/16", ("10.96.0.1", "10.96.1.0", "10.96.255.255"), id="/16"),
        pytest.param("10.96.0.0/24", ("10.96.0.1", "10.96.0.16", "10.96.0.255"), id="/24"),
        pytest.param("10.96.0.0/28", ("10.96.0.1", "10.96.0.1", "10.96.0.15"), id="small"),
        pytest.param(
            "fd00:10:96::/112",
            ("fd00:10:96::1", "fd00:10:96::100", "fd00:10:96::ffff"),
            id="IPv6",
        ),
    ],
)
def test_the_addresses_of_a_range(network, band):
    assert tuple(map(ip_address, addresses(ip_network(network)))) == tuple(map(ip_address, band))


@pytest.mark.parametrize("network", ["10.96.0.0/32", "10.96.0.0/31", "fd00::/128"])
def test_a_range_may_be_too_small_for_any_address(network):
    assert list(addresses(ip_network(network)).candidates("default/web")) == []


def test_the_numbers_that_people_choose_are_given_last():
    numbers = list(NODE_PORTS.candidates("default/web/80"))
    assert sorted(numbers) == list(range(30000, 32768))
    assert numbers[-86:] == list(range(30000, 30086))
