"""Values with good defaults, so that a test shows only what matters."""

from ipaddress import ip_network

from pyproxy.model import (
    Address,
    Endpoint,
    EndpointSlice,
    Forward,
    ObjectName,
    PortKey,
    Service,
    ServicePort,
    ServicePortName,
    SpecPort,
    WeightRule,
)
from pyproxy.plan import Site
from pyproxy.topology import Place

HERE = Place("here", "zone-a")
SITE = Site(HERE, node_ip="192.0.2.11")
VIP = "10.96.0.1"


def owner(name="web", port="", proto="TCP", namespace="default"):
    return ServicePortName(namespace, name, port, proto)


def address(number, port=8080):
    return Address(f"10.244.1.{number}", port)


def endpoint(number=1, *, port=8080, node="here", zones=(), nodes=(), **conditions):
    """An endpoint 10.244.1.NUMBER, on this node unless said otherwise."""
    return Endpoint(
        address(number, port),
        node=node,
        zone_hints=frozenset(zones),
        node_hints=frozenset(nodes),
        **conditions,
    )


def remote(number=1, **rest):
    return endpoint(number, node="elsewhere", **rest)


def draining(number=1, **rest):
    return endpoint(number, ready=False, serving=True, terminating=True, **rest)


def service_port(**fields):
    fields.setdefault("name", owner())
    fields.setdefault("cluster_ip", VIP)
    fields.setdefault("port", 80)
    fields["source_ranges"] = tuple(map(ip_network, fields.get("source_ranges", ())))
    fields["weights"] = tuple(WeightRule(*rule) for rule in fields.get("weights", ()))
    return ServicePort(**fields)


def service(name="web", ip=VIP, *, ports=(("", "TCP", 80),), namespace="default", **fields):
    return Service(
        ObjectName(namespace, name),
        cluster_ip4=ip,
        ports=tuple(SpecPort(*port) for port in ports),
        **fields,
    )


def endpoint_slice(name, *endpoints, of="web", port="", proto="TCP", family=4, **fields):
    return EndpointSlice(
        ObjectName("default", name),
        ObjectName("default", of),
        family,
        {PortKey(port, proto): tuple(endpoints)},
        **fields,
    )


def numbers(action):
    """The last parts of the addresses an action forwards to, or the action's name."""
    if not isinstance(action, Forward):
        return type(action).__name__.lower()
    return [int(b.address.ip.rsplit(".", 1)[1]) for b in action.pool.backends]
