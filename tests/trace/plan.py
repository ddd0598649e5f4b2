"""The fate of a packet by the plan alone: the oracle that every mode must agree with."""

from ipaddress import ip_address

from pyproxy.model import Drop, Forward, Frontend, Pass, Reject
from tests.trace.packet import DROPPED, REFUSED, UNTOUCHED, Delivered


def fate(ports, packet, world):
    """``ports`` are the plans of all owners, of one family."""
    route = route_of(ports, packet, world)
    if route is None:
        return unclaimed(ports, packet, world)
    if isinstance(action_of(route, packet, world), Pass):
        return UNTOUCHED
    source = ip_address(packet.sender.ip)
    if route.allowed_sources is not None and not any(source in n for n in route.allowed_sources):
        return DROPPED
    match action_of(route, packet, world):
        case Reject():
            return REFUSED
        case Drop():
            return DROPPED
        case Forward(pool=pool, masquerade=masquerade):
            back = hairpins(ports, packet)
            return delivered(pool, packet, world, back, masquerade=masquerade)


def route_of(ports, packet, world):
    """Frontends with an address come before node ports."""
    routes = {route.frontend: route for port in ports for route in port.routes}
    wanted = Frontend(packet.destination, packet.port, packet.proto)
    if wanted in routes:
        return routes[wanted]
    if world.serves_node_ports(packet.destination):
        return routes.get(Frontend("", packet.port, packet.proto))
    return None


def action_of(route, packet, world):
    """kube-proxy looks for pods first: an address of the node in their range is one of theirs."""
    if world.is_pod(packet.sender):
        return route.from_pod
    return route.from_node if world.is_local(packet.sender.ip) else route.from_outside


def hairpins(ports, packet):
    """The backends that would answer themselves: endpoints of this node, of any Service."""
    return {
        backend.address
        for port in ports
        if port.owner.proto == packet.proto
        for route in port.routes
        for action in (route.from_pod, route.from_node, route.from_outside)
        if isinstance(action, Forward)
        for backend in action.pool.backends
        if backend.is_local and backend.address.ip == packet.sender.ip
    }


def delivered(pool, packet, world, back, *, masquerade):
    masqueraded = {
        backend.address
        for backend in pool.backends
        if (masquerade or backend.address in back)
        # What ends on this node without having begun here leaves through no interface.
        and (packet.sender.is_here or not world.is_local(backend.address.ip))
    }
    return Delivered(frozenset(b.address for b in pool.backends), frozenset(masqueraded))


def unclaimed(ports, packet, world):
    """What no Service asked for: a cluster IP's other ports refuse, unused cluster IPs are silent.

    That is so where this node forwards or sends: not for an address of its own.
    """
    if world.is_local(packet.destination):
        return UNTOUCHED
    if packet.destination in cluster_ips(ports):
        return REFUSED
    destination = ip_address(packet.destination)
    return DROPPED if any(destination in n for n in world.service_cidrs) else UNTOUCHED


def cluster_ips(ports):
    return {r.frontend.ip for port in ports for r in port.routes if r.kind == "ClusterIP"}
