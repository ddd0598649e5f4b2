"""The frontends of the userspace mode: which of them listen, and to whom."""

from collections.abc import Mapping
from ipaddress import ip_address
from types import MappingProxyType
from typing import Literal

from msgspec import Struct

from pyproxy.model import (
    Action,
    Address,
    Drop,
    Forward,
    Frontend,
    Network,
    Pass,
    PortPlan,
    Reject,
    Route,
    ServicePortName,
)

Origin = Literal["pod", "node", "outside"]
Stance = Literal["serve", "refuse", "silent"]


NONE: "Mapping[Frontend, Listener]" = MappingProxyType({})


class Listener(Struct, frozen=True):
    """What stands behind a frontend."""

    owner: ServicePortName
    route: Route
    serving: frozenset[Address] = frozenset()  # UDP: backends that flows may stay with


class Surroundings(Struct, frozen=True):
    """Where connections come from, as far as this node can tell by their source address."""

    node_ips: frozenset[str] = frozenset()
    pods: tuple[Network, ...] = ()
    loopback: tuple[Network, ...] = ()


def compile_owner(
    port: PortPlan, _before: Mapping[Frontend, Listener] = NONE
) -> Mapping[Frontend, Listener]:
    """Return the listeners of one owner."""
    return {route.frontend: Listener(port.owner, route, port.serving) for route in port.routes}


def stance(route: Route) -> Stance:
    """Say what a frontend does as a whole.

    A frontend that refuses has no socket: the kernel answers with a reset or with port
    unreachable. One that is silent has a socket that admits nobody.
    """
    actions = (route.from_pod, route.from_node, route.from_outside)
    if any(isinstance(action, Forward) for action in actions):
        return "serve"
    return "refuse" if any(isinstance(action, Reject) for action in actions) else "silent"


def origin_of(ip: str, around: Surroundings) -> Origin:
    if ip in around.node_ips:
        return "node"
    address = ip_address(ip)
    if any(address in network for network in around.loopback):
        return "node"
    return "pod" if any(address in network for network in around.pods) else "outside"


def action_for(route: Route, ip: str, around: Surroundings) -> Action:
    """Return what becomes of a connection from ``ip``.

    Sources that are not allowed are dropped, whatever their origin, unless theirs passes by. Where
    the origin makes no difference it is not looked at.
    """
    action = route.from_outside
    if route.from_pod is not action or route.from_node is not action:
        match origin_of(ip, around):
            case "pod":
                action = route.from_pod
            case "node":
                action = route.from_node
            case "outside":
                pass
    if route.allowed_sources is not None and not isinstance(action, Pass):
        address = ip_address(ip)
        if not any(address in network for network in route.allowed_sources):
            return Drop()
    return action


def action_for_all(route: Route) -> Action | None:
    """Return what becomes of every connection; None if that depends on where it comes from."""
    same = route.from_outside
    if route.from_pod is same and route.from_node is same and route.allowed_sources is None:
        return same
    return None


def needs_guard(route: Route) -> bool:
    """Say whether some sources must meet silence, which only the kernel can give them."""
    actions = (route.from_pod, route.from_node, route.from_outside)
    return route.allowed_sources is not None or any(isinstance(a, Drop) for a in actions)


def admits_all(route: Route) -> bool:
    """Say whether everybody is served at this frontend."""
    actions = (route.from_pod, route.from_node, route.from_outside)
    return route.allowed_sources is None and all(isinstance(a, Forward) for a in actions)


def passes_by(route: Route) -> bool:
    """Say whether what pods and the node send goes past this frontend, to the load balancer."""
    return isinstance(route.from_node, Pass)


def has_affinity(route: Route) -> bool:
    """Say whether a client of this frontend keeps its backend."""
    actions = (route.from_pod, route.from_node, route.from_outside)
    return any(isinstance(a, Forward) and a.pool.affinity_seconds is not None for a in actions)


def owns_address(route: Route) -> bool:
    """Say whether a frontend's whole address is its Service's, and not another machine's."""
    return route.kind == "ClusterIP"
