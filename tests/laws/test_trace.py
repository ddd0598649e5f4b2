"""A packet has the same fate by the plan and by what each mode makes of it."""

from ipaddress import ip_address, ip_network
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from pyproxy.cache import Cache
from pyproxy.model import (
    BALANCER_TRAFFIC,
    Address,
    Drop,
    EndpointSlice,
    Forward,
    ObjectName,
    PortKey,
    PortPlan,
    Reject,
    Service,
    SpecPort,
    Upsert,
    WeightRule,
)
from pyproxy.plan import Planner, Site
from pyproxy.rules import iptables
from pyproxy.rules.capture_code import SERVING_TCP, SERVING_UDP
from pyproxy.rules.listeners import has_affinity
from pyproxy.rules.nftables import Ruleset, compile_owner
from tests.builders import HERE, owner
from tests.laws.test_core import endpoints
from tests.trace.iptables import Rules as IptablesRules
from tests.trace.nft import Rules
from tests.trace.packet import (
    DROPPED,
    LOOPBACK,
    REFUSED,
    UNTOUCHED,
    Delivered,
    Packet,
    Sender,
    World,
)
from tests.trace.plan import cluster_ips, fate, route_of
from tests.trace.userspace import Captured, Listeners

FAMILIES = pytest.mark.parametrize("family", [4, 6])


class Places(NamedTuple):
    """Addresses of one family."""

    node: str
    gateway: str  # also the node's, in the range of its pods
    loopback: str
    pods_here: str
    pods: str
    pod: str  # without being an endpoint; those are pod 1 to 6
    services: str
    others: tuple[str, ...]
    ranges: tuple[str, ...]


PLACES = {
    4: Places(
        "192.0.2.11", "10.244.1.254", "127.0.0.1", "10.244.1.0/24", "10.244.0.0/16",
        "10.244.1.{}", "10.96.0.{}",
        ("10.244.2.9", "203.0.113.7", "198.51.100.7"),
        ("10.244.0.0/16", "10.244.1.0/24", "192.0.2.0/26", "203.0.113.7/32", "0.0.0.0/1"),
    ),
    6: Places(
        "fd00:c0de::11", "fd00:244:1::fe", "::1", "fd00:244:1::/64", "fd00:244::/32",
        "fd00:244:1::{}", "fd00:96::{}",
        ("fd00:244:2::9", "2001:db8::7", "2001:db9::7"),
        ("fd00:244::/32", "fd00:244:1::/64", "fd00:c0de::/112", "2001:db8::7/128", "::/1"),
    ),
}  # fmt: skip
EXTERNAL = {4: ("198.18.0.1", "198.18.0.2"), 6: ("fd00:18::1", "fd00:18::2")}
BALANCED = {4: "203.0.113.9", 6: "2001:db8::9"}
NOWHERE = {4: "198.51.100.250", 6: "2001:db9::250"}
PORTS = {"a": 30080, "b": 30081, "c": 30080}


class Cluster(NamedTuple):
    world: World
    ports: tuple
    ruleset: Ruleset


def services(family, name):
    place, flags = PLACES[family], st.booleans()
    chosen = st.lists(
        st.sampled_from([*EXTERNAL[family], place.node]), max_size=2, unique=True
    ).map(tuple)
    return st.builds(
        Service,
        name=st.just(ObjectName("default", name)),
        type=st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"]),
        ports=st.sampled_from(["TCP", "UDP"]).flatmap(
            lambda proto: st.sampled_from([0, PORTS[name]]).map(
                lambda node_port: (SpecPort("", proto, 80, node_port),)
            )
        ),
        external_ips=chosen,
        load_balancer_ips=st.sampled_from([(), (BALANCED[family],)]),
        source_ranges=st.lists(st.sampled_from(place.ranges), max_size=3, unique=True).map(
            lambda found: tuple(map(ip_network, found))
        ),
        affinity_seconds=st.sampled_from([None, None, 10800]),
        internal_local=flags,
        external_local=flags,
        scheduler=st.sampled_from([None, "rr", "sh"]),
        balancer_traffic=st.sampled_from([None, *BALANCER_TRAFFIC]),
        weights=st.sampled_from(
            [
                (),
                (
                    WeightRule("ip", place.pod.format(1), 0),
                    WeightRule("ip", place.pod.format(2), 3),
                ),
                (WeightRule("node", "here", 2),),
            ]
        ),
        **{f"cluster_ip{family}": st.integers(1, 2).map(place.services.format)},
    )


def endpoints_of(family):
    """The endpoints of all laws in this family, some of them in the node's own network."""

    def moved(endpoint, on_host):
        ip = PLACES[family].pod.format(endpoint.address.ip.rsplit(".", 1)[1])
        if on_host and endpoint.node == "here":
            ip = PLACES[family].node
        return structs.replace(endpoint, address=Address(ip, endpoint.address.port))

    rarely = st.sampled_from([False, False, False, True])
    return st.lists(st.builds(moved, endpoints, rarely), max_size=4)


@st.composite
def clusters(draw, family):
    place, flags = PLACES[family], st.booleans()
    networks = tuple(map(ip_network, (place.pods_here, place.pods)))
    cidr = ip_network(place.services.format(0) + ("/16" if family == 4 else "/112"))
    world = World(
        family,
        frozenset({place.node, place.gateway}),
        draw(st.sampled_from([None, "cni0", *networks])),
        draw(st.sampled_from([None, (place.node,)])),
        draw(st.sampled_from([(), (cidr,)])),
    )
    masquerade_all = draw(flags)
    cache, planner = Cache(family), Planner()
    for name in "abc"[: draw(st.integers(1, 3))]:
        service = draw(services(family, name))
        key = PortKey("", service.ports[0].proto)
        found = {key: tuple(draw(endpoints_of(family)))}
        cache.apply(Upsert("Service", service))
        cache.apply(
            Upsert("EndpointSlice", EndpointSlice(service.name, service.name, family, found))
        )
    site = Site(HERE, place.node, world.pods is not None, masquerade_all)
    planner.update(cache.owners(), cache, site)
    ruleset = Ruleset(
        family,
        pods=world.pods,
        masquerade_all=masquerade_all,
        node_port_ips=world.node_port_ips,
        service_cidrs=world.service_cidrs,
    )
    return Cluster(world, tuple(planner.plan.ports.values()), ruleset)


def senders(family):
    place = PLACES[family]
    pods = [Sender(place.pod.format(number), "cni0") for number in (1, 2, 99)]
    others = [Sender(ip, "eth0") for ip in place.others]
    return [*pods, *others, *(Sender(ip) for ip in (place.node, place.gateway, place.loopback))]


def packets(cluster):
    """Packets of everybody to everything, and to what is next to it."""
    family = cluster.world.family
    place = PLACES[family]
    frontends = {route.frontend for port in cluster.ports for route in port.routes}
    own = (place.node, place.gateway, place.loopback)
    targets = {
        (ip, f.proto, f.port) for f in frontends for ip in ([f.ip] if f.ip else own)
    } | {
        *((ip, "TCP", 81) for ip in cluster_ips(cluster.ports)),
        (place.services.format(99), "TCP", 80),
        (NOWHERE[family], "UDP", 80),
        *((NOWHERE[family], f.proto, f.port) for f in frontends if not f.ip),
        (place.node, "TCP", 22),
    }  # fmt: skip
    for target in sorted(targets):
        for sender in senders(family):
            yield Packet(sender, *target)


@FAMILIES
@given(st.data())
def test_the_rules_of_nftables_do_what_the_plan_says(family, data):
    cluster = data.draw(clusters(family))
    rules = Rules(cluster.ruleset, cluster.ports)
    for packet in packets(cluster):
        planned = fate(cluster.ports, packet, cluster.world)
        assert rules.fate(packet, cluster.world) == planned, packet


@FAMILIES
@given(st.data())
def test_rules_that_grew_out_of_others_do_what_the_plan_says(family, data):
    earlier, cluster = data.draw(clusters(family)), data.draw(clusters(family))
    before = {p.owner: compile_owner(earlier.ruleset, p, {}) for p in earlier.ports}
    rules = Rules(cluster.ruleset, cluster.ports, before)
    for packet in packets(cluster):
        planned = fate(cluster.ports, packet, cluster.world)
        assert rules.fate(packet, cluster.world) == planned, packet


@FAMILIES
@given(st.data())
def test_a_client_that_an_affinity_set_knows_goes_where_it_went(family, data):
    cluster = data.draw(clusters(family))
    for packet in packets(cluster):
        planned = fate(cluster.ports, packet, cluster.world)
        route = route_of(cluster.ports, packet, cluster.world)
        if not isinstance(planned, Delivered) or not is_affine(route):
            continue
        chosen = min(planned.backends)
        rules = Rules(cluster.ruleset, cluster.ports)
        rules.remember(packet.sender.ip, chosen)
        found = rules.fate(packet, cluster.world)
        assert found == Delivered(frozenset({chosen}), planned.masqueraded & {chosen}), packet
        break


def is_affine(route):
    action = route.from_node
    return isinstance(action, Forward) and action.pool.affinity_seconds is not None


def forwarder(data, family):
    """A cluster with the world that mode userspace sees, and the networks of its pods."""
    cluster = data.draw(clusters(family))
    world = cluster.world._replace(node_ports_on_loopback=True)
    pods = () if world.pods is None else (
        ip_network(PLACES[family].pods_here) if world.pods == "cni0" else world.pods,
    )  # fmt: skip
    return cluster, world, pods


@FAMILIES
@settings(max_examples=40)  # an interpreter in an interpreter
@given(st.data())
def test_the_program_at_the_socket_lookup_does_what_the_plan_says(family, data):
    cluster, world, pods = forwarder(data, family)
    captured = Captured(cluster.ports, world, pods)
    for packet in packets(cluster):
        planned = fate(cluster.ports, packet, world)
        if isinstance(planned, Delivered):
            planned = Delivered(planned.backends)
        elif route_of(cluster.ports, packet, world) is None:
            planned = as_forwarder(planned, cluster.ports, packet, world)
        assert captured.fate(packet, world) == planned, packet


@FAMILIES
@settings(max_examples=10)  # each asks many times
@given(st.data(), st.integers(2, 5))
def test_a_packet_finds_one_worker_whatever_the_port_of_an_affine_client(family, data, workers):
    cluster, world, pods = forwarder(data, family)
    alone, captured = (Captured(cluster.ports, world, pods, n) for n in (1, workers))
    for packet in packets(cluster):
        served, found = alone.socket(packet), captured.socket(packet)
        if served not in (SERVING_TCP, SERVING_UDP):
            assert found == served, packet
            continue
        assert found in range(served, served + 2 * workers, 2), packet
        others = {captured.socket(packet, remote_port=port) for port in range(40000, 40016)}
        if has_affinity(route_of(cluster.ports, packet, world)):
            assert others == {found}
        else:
            assert len(others) > 1


@FAMILIES
@given(st.data())
def test_the_listeners_of_userspace_do_what_the_plan_says(family, data):
    cluster, world, pods = forwarder(data, family)
    listeners = Listeners(cluster.ports, world, pods)
    for packet in packets(cluster):
        expected = as_forwarder(fate(cluster.ports, packet, world), cluster.ports, packet, world)
        assert listeners.fate(packet, world) == expected, packet


@FAMILIES
@given(st.data())
def test_the_rules_of_iptables_do_what_the_plan_says(family, data):
    cluster = data.draw(clusters(family))
    world, rules = as_iptables_node(cluster, data.draw(st.booleans()))
    for packet in packets(cluster):
        planned = fate(cluster.ports, packet, world)
        expected = as_iptables(planned, cluster.ports, packet, world)
        assert rules.fate(packet, world) == expected, packet


@FAMILIES
@given(st.data())
def test_a_client_that_iptables_remembers_goes_where_it_went(family, data):
    cluster = data.draw(clusters(family))
    world, rules = as_iptables_node(cluster, False)
    for packet in packets(cluster):
        planned = fate(cluster.ports, packet, world)
        route = route_of(cluster.ports, packet, world)
        if isinstance(planned, Delivered) and is_affine(route):
            chosen = min(planned.backends)
            rules.remember(packet.sender.ip, chosen)
            found = rules.fate(packet, world)
            assert found == Delivered(frozenset({chosen}), planned.masqueraded & {chosen}), packet
            break


def as_iptables_node(cluster, localhost):
    """Return the world and the rules of a node whose node ports may answer on loopback."""
    localhost = localhost and cluster.world.family == 4 and cluster.world.node_port_ips is None
    world = cluster.world._replace(node_ports_on_loopback=localhost)
    ruleset = iptables.Ruleset(
        world.family,
        pods=world.pods,
        masquerade_all=cluster.ruleset.masquerade_all,
        node_port_ips=world.node_port_ips,
        localhost_node_ports=localhost,
    )
    return world, IptablesRules(ruleset, cluster.ports)


def as_iptables(planned, ports, packet, world):
    """Return the fate that kube-proxy's mode iptables gives instead, and ours.

    What no Service wants is left alone. A rule that refuses comes before one that looks at
    source ranges, and is not asked about what this node sends away. It is one rule for a node
    port at all addresses of the node, whichever serve it. Loopback addresses are guarded against
    strangers.
    """
    route = route_of(ports, packet, world)
    if route is None:
        return at_other_addresses(ports, packet, world)
    if isinstance(planned, Delivered):
        return planned
    if is_loopback(packet.destination, world) and not is_loopback(packet.sender.ip, world):
        return DROPPED
    if route.allowed_sources is not None:
        allowed_for_all = structs.replace(route, allowed_sources=None)
        if fate((only(allowed_for_all),), packet, world) == REFUSED:
            planned = REFUSED
        else:
            return planned
    leaves = packet.sender.is_here and not world.is_local(packet.destination)
    return UNTOUCHED if leaves and route.kind != "ClusterIP" else planned


def at_other_addresses(ports, packet, world):
    everywhere = world._replace(node_port_ips=None, node_ports_on_loopback=True)
    route = route_of(ports, packet, everywhere)
    if route is None:
        return UNTOUCHED
    if isinstance(route.from_node, Reject):
        return REFUSED
    return DROPPED if isinstance(route.from_outside, Drop) else UNTOUCHED


def is_loopback(ip, world):
    return ip_address(ip) in LOOPBACK[world.family]


def as_forwarder(planned, ports, packet, world):
    """Return the fate that a forwarder without packet filter rules gives instead.

    Backends see its own address. It holds cluster IPs and keeps their other ports silent; what
    is no frontend's it never sees. Where nobody can be served no socket exists, and the kernel
    refuses everybody, as in mode iptables also those whom source ranges keep out.
    """
    route = route_of(ports, packet, world)
    if route is None:
        return DROPPED if packet.destination in cluster_ips(ports) else UNTOUCHED
    if route.allowed_sources is not None:
        allowed_for_all = structs.replace(route, allowed_sources=None)
        if fate((only(allowed_for_all),), packet, world) == REFUSED:
            return REFUSED
    return Delivered(planned.backends) if isinstance(planned, Delivered) else planned


def only(route):
    """A plan that has nothing but this route."""
    return PortPlan(owner(), (route,))
