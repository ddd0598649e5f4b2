"""Which endpoints this node may use: conditions, traffic policies, hints.

One ``EndpointSets`` holds everything that a plan asks about the endpoints of one Service port.
The rules are kube-proxy's (CategorizeEndpoints): ready endpoints are used; where a set has none,
its serving terminating ones are, so that a rolling update loses no connection.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from msgspec import Struct

from pyproxy.model import Endpoint, ServicePort, WeightRule


class Place(Struct, frozen=True):
    """Where this node is. An empty name makes nothing local, an empty zone matches no hint."""

    node: str
    zone: str = ""


class EndpointSets(Struct, frozen=True):
    """The endpoints of one Service port, sorted by who may use them.

    ``cluster`` and ``local`` are empty where the Service port does not use them. ``anywhere``
    says that some node could serve: it tells refusing from dropping.
    """

    cluster: tuple[Endpoint, ...] = ()
    local: tuple[Endpoint, ...] = ()
    anywhere: bool = False


def endpoint_sets(port: ServicePort, endpoints: Sequence[Endpoint], place: Place) -> EndpointSets:
    """Sort the endpoints of a Service port into the sets of both traffic policies.

    Endpoints of weight zero are left out first: they keep the connections they have and count
    for nothing else, so that a zone whose endpoints all have it is served by the others.
    """
    if port.weights:
        endpoints = [e for e in endpoints if weight_of(e, port.weights) > 0]
    uses_cluster = not port.internal_local or port.externally_accessible
    uses_local = (
        port.internal_local
        or (port.external_local and port.externally_accessible)
        or port.balancer_traffic == "local-else-pass-through"
    )
    cluster = usable(near(endpoints, place)) if uses_cluster else ()
    if not uses_local:
        return EndpointSets(cluster=cluster, anywhere=bool(cluster))
    return EndpointSets(
        cluster=cluster,
        local=usable([e for e in endpoints if is_local(e, place)]),
        anywhere=any(e.ready or is_draining(e) for e in endpoints),
    )


def usable(endpoints: Sequence[Endpoint]) -> tuple[Endpoint, ...]:
    """Return the ready endpoints, or the draining ones where none is ready."""
    ready = tuple(e for e in endpoints if e.ready)
    return ready or tuple(e for e in endpoints if is_draining(e))


def near(endpoints: Sequence[Endpoint], place: Place) -> Sequence[Endpoint]:
    """Return the endpoints that topology hints leave to this node.

    A kind of hint counts only where every ready endpoint has one, and one of them is for us;
    endpoints that are not ready neither switch hints on nor off, and none of them stays.
    """
    ready = [e for e in endpoints if e.ready]
    if not ready:
        return endpoints
    if all(e.node_hints for e in ready):
        same_node = [e for e in ready if place.node in e.node_hints]
        if same_node:
            return same_node
    if place.zone and all(e.zone_hints for e in ready):
        same_zone = [e for e in ready if place.zone in e.zone_hints]
        if same_zone:
            return same_zone
    return endpoints


def is_local(endpoint: Endpoint, place: Place) -> bool:
    return endpoint.node != "" and endpoint.node == place.node


def is_draining(endpoint: Endpoint) -> bool:
    """Say whether the endpoint still serves while it is on its way out."""
    return endpoint.serving and endpoint.terminating and not endpoint.ready


def weight_of(endpoint: Endpoint, rules: Iterable[WeightRule]) -> int:
    """Return the weight that the first matching rule gives; 1 where none matches."""
    for rule in rules:
        if matches(rule, endpoint):
            return rule.weight
    return 1


def matches(rule: WeightRule, endpoint: Endpoint) -> bool:
    match rule.kind:
        case "ip":
            return rule.pattern == endpoint.address.ip
        case "pod":
            return endpoint.pod != "" and fnmatchcase(endpoint.pod, rule.pattern)
        case "node":
            return rule.pattern == endpoint.node
        case "zone":
            return rule.pattern == endpoint.zone
