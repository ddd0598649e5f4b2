"""Why a plan is as it is: for each decision of ``plan``, the object and the field that decided.

Nothing is decided here. A law holds these words against the actions of the plan, for any cluster.
"""

from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from typing import Final, Literal

from msgspec import Struct

from pyproxy.model import (
    Endpoint,
    EndpointSlice,
    FrontendKind,
    Network,
    PortKey,
    Service,
    ServicePort,
    family_of,
)
from pyproxy.plan import Site
from pyproxy.rules.listeners import Origin
from pyproxy.topology import EndpointSets, endpoint_sets, is_draining, is_local, weight_of

Code = Literal["endpoints", "no-endpoints", "no-local-endpoints", "source-ranges", "pass-through"]

SHOWN: Final = 4  # of a list of names


class Reason(Struct, frozen=True):
    """What decided: ``field`` is of ``object``, and ``text`` says it in a sentence."""

    code: Code
    object: str
    field: str
    text: str


class Subject(Struct, frozen=True):
    """A Service port with all that its plan depends on."""

    service: Service
    port: ServicePort
    endpoints: Sequence[Endpoint]
    slices: Sequence[EndpointSlice]
    site: Site

    @property
    def sets(self) -> EndpointSets:
        return endpoint_sets(self.port, self.endpoints, self.site.place)

    @property
    def name(self) -> str:
        return f"Service {self.service.name}"


def why(subject: Subject, kind: FrontendKind, origin: Origin) -> Reason:
    """Say why connections of an origin that a frontend of this kind admits fare as they do."""
    sets = subject.sets
    if is_balanced(subject, kind, origin):
        return why_balanced(subject, sets)
    if not sets.anywhere:
        return why_nowhere(subject)
    if not bound_to_node(subject, kind, origin):
        return why_forwarded(subject, kind, sets.cluster)
    if sets.local:
        return why_forwarded_here(subject, kind, sets.local)
    return why_silent(subject, kind)


def why_masquerade(subject: Subject, kind: FrontendKind, origin: Origin) -> str | None:
    """Say why what is forwarded gets this node's address; None if it keeps the client's."""
    port, site = subject.port, subject.site
    if is_balanced(subject, kind, origin):
        return "the connection is the node's own" if origin == "node" else None
    if kind != "ClusterIP":
        if not port.external_local:
            return "externalTrafficPolicy: Cluster, so replies must pass through this node"
        return "the connection is the node's own" if origin == "node" else None
    if site.masquerade_all:
        return "masqueradeAll"
    if site.detects_pods and origin != "pod":
        return "the client is no pod of this node"
    return None


def why_not_admitted(
    service: Service, allowed: Sequence[Network] | None, source: str
) -> Reason | None:
    """Say why a client may not use a frontend at all; None if it may."""
    if allowed is None or any(ip_address(source) in network for network in allowed):
        return None
    ranges = listed([str(network) for network in allowed])
    return Reason(
        "source-ranges",
        f"Service {service.name}",
        "spec.loadBalancerSourceRanges",
        f"client {source} is outside loadBalancerSourceRanges {ranges}",
    )


def bound_to_node(subject: Subject, kind: FrontendKind, origin: Origin) -> bool:
    """Say whether traffic policy Local keeps this origin to the endpoints of this node."""
    if kind == "ClusterIP":
        return subject.port.internal_local
    return subject.port.external_local and not is_inside(subject, origin)


def is_balanced(subject: Subject, kind: FrontendKind, origin: Origin) -> bool:
    """Say whether the Service itself tells who carries connections to its load balancer."""
    told = subject.port.balancer_traffic != "short-circuit"
    return kind == "LoadBalancer" and told and is_inside(subject, origin)


def is_inside(subject: Subject, origin: Origin) -> bool:
    return origin == "node" or (origin == "pod" and subject.site.detects_pods)


# --- forwarded ------------------------------------------------------------------------------------


def policy(kind: FrontendKind) -> str:
    return "internalTrafficPolicy" if kind == "ClusterIP" else "externalTrafficPolicy"


def why_forwarded(subject: Subject, kind: FrontendKind, used: Sequence[Endpoint]) -> Reason:
    hint = hinted(subject, used)
    if hint is not None:
        return hint
    if not used[0].ready:
        return drained(subject, used, "")
    field = policy(kind)
    local = kind != "ClusterIP" and subject.port.external_local
    text = (
        "externalTrafficPolicy: Local binds clients outside, others may reach every ready endpoint"
        if local
        else f"{field}: Cluster, so it may be any ready endpoint"
    )
    left_out = len(subject.endpoints) - len(weighted(subject))
    count = f"{len(used)}, and {left_out} of weight 0 get none" if left_out else f"{len(used)}"
    return Reason("endpoints", subject.name, f"spec.{field}", f"{text} ({count})")


def why_forwarded_here(subject: Subject, kind: FrontendKind, used: Sequence[Endpoint]) -> Reason:
    where = f" on {subject.site.place.node}"
    if not used[0].ready:
        return drained(subject, used, where)
    field = policy(kind)
    return Reason(
        "endpoints",
        subject.name,
        f"spec.{field}",
        f"{field}: Local, and {counted(len(used), 'ready endpoint')} {be(used)}{where}",
    )


def hinted(subject: Subject, used: Sequence[Endpoint]) -> Reason | None:
    """Say which hint narrowed the endpoints; None if none did."""
    place = subject.site.place
    ready = [e for e in weighted(subject) if e.ready]
    if len(used) >= len(ready) or not used[0].ready:
        return None
    by_node = all(place.node in e.node_hints for e in used) and all(e.node_hints for e in ready)
    field, name = ("forNodes", place.node) if by_node else ("forZones", place.zone)
    return Reason(
        "endpoints",
        slices_text(subject),
        f"endpoints[].hints.{field}",
        f"hints leave {len(used)} of {counted(len(ready), 'ready endpoint')} to {name}",
    )


def drained(subject: Subject, used: Sequence[Endpoint], where: str) -> Reason:
    return Reason(
        "endpoints",
        slices_text(subject),
        "endpoints[].conditions",
        f"no endpoint{where} is ready, so those that still serve while they terminate are used "
        f"({len(used)})",
    )


# --- past this node -------------------------------------------------------------------------------


def why_balanced(subject: Subject, sets: EndpointSets) -> Reason:
    """Say why pods and the node go by the load balancer, or stay on this node."""
    service, place, told = subject.service, subject.site.place, subject.port.balancer_traffic
    is_own = service.balancer_traffic is not None
    annotation = "pyproxy.io/load-balancer-traffic" if is_own else "kubernetes.io/elb.pass-through"
    field = f"metadata.annotations[{annotation}]"
    if told == "pass-through":
        text = f"{annotation} asks {told}: what pods and the node send goes by the load balancer"
        return Reason("pass-through", subject.name, field, text)
    if sets.local:
        text = f"{annotation} asks {told}, and {counted(len(sets.local), 'endpoint')}"
        return Reason("endpoints", subject.name, field, f"{text} {be(sets.local)} on {place.node}")
    text = f"{annotation} asks {told}, and no ready endpoint is on {place.node}"
    return Reason("pass-through", subject.name, field, text)


# --- neither --------------------------------------------------------------------------------------


def why_silent(subject: Subject, kind: FrontendKind) -> Reason:
    """Say that the endpoints there are, are on other nodes."""
    place, field = subject.site.place, policy(kind)
    there = [e for e in weighted(subject) if e.ready or is_draining(e)]
    nodes = sorted({e.node or "no node" for e in there})
    unready = sum(is_local(e, place) for e in subject.endpoints)
    some = f" ({counted(unready, 'endpoint')} there {be(range(unready))} not)" if unready else ""
    return Reason(
        "no-local-endpoints",
        subject.name,
        f"spec.{field}",
        f"{field}: Local and no ready endpoint on {place.node}{some}; "
        f"endpoints exist on {listed(nodes)}",
    )


def why_nowhere(subject: Subject) -> Reason:
    """Say why no node has an endpoint to use."""
    if not subject.slices:
        return why_no_slice(subject)
    if not subject.endpoints:
        return why_empty(subject)
    if not weighted(subject):
        text = f"pyproxy.io/weights gives {every(subject.endpoints)} the weight 0"
        return Reason("no-endpoints", subject.name, "metadata.annotations", text)
    states = sorted({f"{e.address} ready={str(e.ready).lower()}" for e in weighted(subject)})
    few = len(states) == 1
    text = f"none of {counted(len(states), 'endpoint')} is ready: {listed(states)}"
    if few:
        text = f"its only endpoint is not ready: {states[0]}"
    return Reason("no-endpoints", slices_text(subject), "endpoints[].conditions.ready", text)


def why_no_slice(subject: Subject) -> Reason:
    service, family = subject.service, family_of(subject.port.cluster_ip)
    if service.selector:
        text = f"selector {service.selector} matches no ready pod: no EndpointSlice of IPv{family}"
    else:
        text = f"it has no selector, and nobody has made an EndpointSlice of IPv{family} for it"
    return Reason("no-endpoints", subject.name, "spec.selector", text)


def why_empty(subject: Subject) -> Reason:
    """Say why slices that are there have nothing for this port."""
    owner, service = subject.port.name, subject.service
    keys = {key for part in subject.slices for key, found in part.endpoints.items() if found}
    if keys:
        there = listed([named(key) for key in sorted(keys)])
        text = f"no port is {named(PortKey(owner.port, owner.proto))}; there is: {there}"
        return Reason("no-endpoints", slices_text(subject), "ports[].name", text)
    empty = f"{slices_text(subject)} {'have' if len(subject.slices) > 1 else 'has'} 0 endpoints"
    if not service.selector:
        return Reason("no-endpoints", slices_text(subject), "endpoints", empty)
    text = f"selector {service.selector} matches no ready pod: {empty}"
    return Reason("no-endpoints", subject.name, "spec.selector", text)


# --- words ----------------------------------------------------------------------------------------


def weighted(subject: Subject) -> list[Endpoint]:
    """Return the endpoints without those of weight zero, which count for nothing."""
    weights = subject.port.weights
    return [e for e in subject.endpoints if not weights or weight_of(e, weights) > 0]


def slices_text(subject: Subject) -> str:
    names = [part.name.name for part in subject.slices]
    return f"EndpointSlice{'s' if len(names) > 1 else ''} {listed(names)}"


def named(key: PortKey) -> str:
    return f'"{key.name}" ({key.proto})'


def listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def every(things: Sequence[object]) -> str:
    return "its only endpoint" if len(things) == 1 else f"all {len(things)} endpoints"


def be(things: Sequence[object] | Iterable[object]) -> str:
    return "is" if len(list(things)) == 1 else "are"
