"""The plan itself as rows, with the very backends: what routes in words leave out. No I/O."""

from collections.abc import Iterator, Sequence
from typing import Literal, assert_never

from pyproxy.ip import parse_network
from pyproxy.model import (
    Action,
    Address,
    Backend,
    Drop,
    Forward,
    Frontend,
    FrontendKind,
    Pass,
    Pool,
    PortPlan,
    Proto,
    Reject,
    Route,
    Service,
    ServicePortName,
)
from pyproxy.view import Answer, View


class PlannedBackend(Answer, frozen=True):
    """A backend that an origin's connections may be given."""

    ip: str
    port: int
    local: bool


class PlannedAction(Answer, frozen=True):
    """What becomes of connections of one origin; only those that are forwarded have backends."""

    action: Literal["forward", "reject", "drop", "pass"]
    backends: tuple[PlannedBackend, ...] = ()


class PlannedRoute(Answer, frozen=True):
    """A frontend. The address of a node port is empty."""

    ip: str
    port: int
    kind: FrontendKind
    from_pod: PlannedAction
    from_node: PlannedAction
    from_outside: PlannedAction
    allowed_sources: tuple[str, ...] | None


class PlanRow(Answer, frozen=True):
    """A port of a Service, in one family."""

    family: int
    namespace: str
    service: str
    port: str
    proto: Proto
    routes: tuple[PlannedRoute, ...]
    serving: tuple[tuple[str, int], ...]  # addresses that flows of UDP may stay with


class Plans(Answer, frozen=True):
    """The answer of ``/v1/plan``."""

    node: str
    mode: str
    items: tuple[PlanRow, ...]


def plan_rows(view: View, service: Service) -> Iterator[PlanRow]:
    for family in view.families:
        for plan in family.ports(service.name):
            routes, serving = tuple(map(planned_route, plan.routes)), tuple(sorted(plan.serving))
            yield PlanRow(family.family, *plan.owner, routes, serving)


def plans(view: View, items: Sequence[PlanRow]) -> Plans:
    return Plans(view.node, view.mode, tuple(items))


def planned_route(route: Route) -> PlannedRoute:
    sources = route.allowed_sources
    return PlannedRoute(
        route.frontend.ip,
        route.frontend.port,
        route.kind,
        planned_action(route.from_pod),
        planned_action(route.from_node),
        planned_action(route.from_outside),
        None if sources is None else tuple(map(str, sources)),
    )


def planned_action(action: Action) -> PlannedAction:
    match action:
        case Forward(pool=pool):
            found = (PlannedBackend(*b.address, b.is_local) for b in pool.backends)
            return PlannedAction("forward", tuple(found))
        case Reject():
            return PlannedAction("reject")
        case Drop():
            return PlannedAction("drop")
        case Pass():
            return PlannedAction("pass")


def port_plan(row: PlanRow) -> PortPlan:
    """Return the plan that a row tells of, but for what its answer leaves out: weights and so."""
    owner = ServicePortName(row.namespace, row.service, row.port, row.proto)
    serving = frozenset(Address(*address) for address in row.serving)
    return PortPlan(owner, tuple(route_of(row.proto, route) for route in row.routes), serving)


def route_of(proto: Proto, row: PlannedRoute) -> Route:
    sources = row.allowed_sources
    if sources is not None:
        networks = tuple(net for text in sources if (net := parse_network(text)) is not None)
    return Route(
        Frontend(row.ip, row.port, proto),
        row.kind,
        action_of(row.from_pod),
        action_of(row.from_node),
        action_of(row.from_outside),
        None if sources is None else networks,
    )


def action_of(row: PlannedAction) -> Action:
    match row.action:
        case "forward":
            found = (Backend(Address(b.ip, b.port), is_local=b.local) for b in row.backends)
            return Forward(Pool(tuple(found)))
        case "reject":
            return Reject()
        case "drop":
            return Drop()
        case "pass":
            return Pass()
        case _:
            assert_never(row.action)
