"""The programs of socket load balancing do what the plan says, or leave it to the listeners."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pyproxy.model import Address, Drop, Forward, Pass, Reject
from tests.laws.test_trace import FAMILIES, PLACES, clusters, is_affine, packets
from tests.trace.packet import REFUSED, UNTOUCHED
from tests.trace.plan import route_of
from tests.trace.socketlb import Sockets


def cluster_of(data, family):
    cluster = data.draw(clusters(family))
    return cluster, cluster.world._replace(node_ports_on_loopback=True)


def sockets_of(cluster, world):
    """Packets as sockets of this node send them: a pod's, and the node's own."""
    place = PLACES[world.family]
    for packet in packets(cluster):
        if packet.sender.ip in (place.pod.format(1), place.node):
            yield packet


def planned(route, packet):
    return route.from_node if packet.sender.is_here else route.from_pod


@FAMILIES
@settings(max_examples=40)  # an interpreter in an interpreter
@given(st.data())
def test_a_socket_is_given_what_the_plan_gives_it(family, data):
    cluster, world = cluster_of(data, family)
    sockets = Sockets(cluster.ports, world)
    for packet in sockets_of(cluster, world):
        route = route_of(cluster.ports, packet, world)
        given_ = sockets.connected(packet)
        if given_ == UNTOUCHED:
            assert is_left(route, packet, world), packet
        elif given_ == REFUSED:
            assert isinstance(planned(route, packet), Reject), packet
        else:
            assert given_ in {b.address for b in planned(route, packet).pool.backends}, packet
            assert sockets.shown(given_) == Address(packet.destination, packet.port)


def is_left(route, packet, world):
    """Say whether a connection is one that programs must or may leave to the listeners."""
    if route is None or route.allowed_sources is not None:
        return True
    if not packet.sender.is_here and packet.destination == PLACES[world.family].loopback:
        return True
    actions = (route.from_pod, route.from_node)
    if any(isinstance(a, Forward) and a.pool.scheduler == "sh" for a in actions):
        return True
    action = planned(route, packet)
    if packet.sender.is_here or not isinstance(action, Forward):
        return isinstance(action, Drop | Pass)
    itself = any(b.address.ip == packet.sender.ip for b in action.pool.backends)
    return action.masquerade or itself


def is_served(route, packet, cluster):
    """Say whether flows may stay with every backend: a ready endpoint may claim not to serve."""
    port = next(port for port in cluster.ports if route in port.routes)
    action = planned(route, packet)
    backends = action.pool.backends if isinstance(action, Forward) else ()
    return packet.proto == "UDP" and {b.address for b in backends} <= port.serving


@FAMILIES
@settings(max_examples=20)
@given(st.data())
def test_a_client_with_affinity_and_a_flow_keep_their_backend(family, data):
    cluster, world = cluster_of(data, family)
    for packet in sockets_of(cluster, world):
        route = route_of(cluster.ports, packet, world)
        if route is not None and (is_affine(route) or is_served(route, packet, cluster)):
            event = "sendmsg" if packet.proto == "UDP" else "connect"
            sockets = Sockets(cluster.ports, world)
            assert len({sockets.connected(packet, event) for _ in range(4)}) == 1, packet
