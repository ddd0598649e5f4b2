"""What is programmed: Services, endpoints, routes and conflicts, as rows. ``pyproxy get``."""

from collections.abc import Iterable, Iterator, Sequence

from msgspec import field

from pyproxy.health import rfc3339
from pyproxy.model import (
    Action,
    Drop,
    Endpoint,
    Forward,
    Pass,
    Pool,
    PortPlan,
    Reject,
    Route,
    Service,
    ServicePort,
)
from pyproxy.progress import Progress
from pyproxy.services import why_no_ports
from pyproxy.topology import is_local
from pyproxy.view import Answer, FamilyView, Query, QueryError, View, asked_service


class SliceVersion(Answer, frozen=True):
    """An EndpointSlice, and at which version it is known."""

    name: str
    resource_version: str


class PortStatus(Answer, frozen=True):
    """How far one port of a Service is, in one family."""

    family: int
    port: str  # its name; may be empty
    proto: str
    number: int
    state: str  # programmed, pending, refused; planned, where nothing is written
    since: str | None  # RFC 3339, when it was written as it is
    backends: int  # different endpoints that its frontends lead to
    endpoints: int  # in its slices, whatever their conditions
    problems: tuple[str, ...] = ()


class ServiceStatus(Answer, frozen=True):
    """What this node does for a Service."""

    namespace: str
    name: str
    type: str
    cluster_ips: tuple[str, ...] = field(name="clusterIPs")
    resource_version: str
    slices: tuple[SliceVersion, ...]
    ports: tuple[PortStatus, ...]
    not_served: tuple[str, ...] = ()  # why a family has no ports


class Applied(Answer, frozen=True):
    """Up to which resourceVersion all objects of a kind are written; 0: they have none."""

    family: int
    kind: str
    resource_version: int


class Services(Answer, frozen=True):
    """The answer of ``/v1/services``."""

    node: str
    mode: str
    items: tuple[ServiceStatus, ...]
    applied: tuple[Applied, ...] = ()
    errors: tuple[str, ...] = ()  # of the last sync of each family, if it failed


def services(view: View, items: Sequence[ServiceStatus]) -> Services:
    return Services(view.node, view.mode, tuple(items), tuple(applied(view)), tuple(errors(view)))


class Status(Answer, frozen=True):
    """The answer of ``/v1/status``: of one Service, also of one that is not there."""

    node: str
    item: ServiceStatus | None  # null: this node knows of none
    leaving: int  # ports whose removal is still to be written
    errors: tuple[str, ...] = ()


def status(view: View, query: Query) -> Status:
    name = asked_service(query)
    if name is None:
        raise QueryError("status: it needs a service")
    known = view.families[0].cache.services().get(name) if view.families else None
    leaving = [o for f in view.families for o in f.leaving() if o.service_name == name]
    (item,) = service_rows(view, known) if known is not None else (None,)
    return Status(view.node, item, len(leaving), tuple(errors(view)))


def errors(view: View) -> Iterator[str]:
    for family in view.families:
        if family.progress is not None and family.progress.error is not None:
            yield f"IPv{family.family}: {family.progress.error}"


def applied(view: View) -> Iterator[Applied]:
    for family in view.families:
        if family.progress is not None:
            written = family.progress.written(family.cache.versions)
            for kind, version in sorted(written.items()):
                yield Applied(family.family, kind, version)


def service_rows(view: View, service: Service) -> Iterator[ServiceStatus]:
    ips = (service.cluster_ip4, service.cluster_ip6)
    yield ServiceStatus(
        namespace=service.name.namespace,
        name=service.name.name,
        type=service.type,
        cluster_ips=tuple(ip for ip in ips if ip is not None),
        resource_version=service.resource_version,
        slices=tuple(
            SliceVersion(part.name.name, part.resource_version)
            for family in view.families
            for part in family.cache.slices(service.name)
        ),
        ports=tuple(
            port_status(family, port)
            for family in view.families
            for port in family.cache.ports(service.name)
        ),
        not_served=tuple(not_served(view, service)),
    )


def not_served(view: View, service: Service) -> list[str]:
    """Return why families have no ports; one family that a Service never asked for is no news."""
    reasons = [why_no_ports(service, family.family) for family in view.families]
    return list(dict.fromkeys(r for r in reasons if r is not None)) if all(reasons) else []


def port_status(family: FamilyView, port: ServicePort) -> PortStatus:
    plan = family.plan.ports.get(port.name)
    return PortStatus(
        family=family.family,
        port=port.name.port,
        proto=port.name.proto,
        number=port.port,
        state=family.state(port.name) or "planned",
        since=since(family.progress, port),
        backends=len(backends(plan)) if plan is not None else 0,
        endpoints=len(family.cache.endpoints(port.name)),
        problems=family.problems(port.name),
    )


def since(progress: Progress | None, port: ServicePort) -> str | None:
    at = progress.since(port.name) if progress is not None else None
    return rfc3339(at) if at is not None else None


def backends(plan: PortPlan) -> set[object]:
    return {backend.address for pool in pools(plan.routes) for backend in pool.backends}


def pools(routes: Iterable[Route]) -> Iterator[Pool]:
    for route in routes:
        for action in (route.from_pod, route.from_node, route.from_outside):
            if isinstance(action, Forward):
                yield action.pool


# --- endpoints ------------------------------------------------------------------------------------


class EndpointRow(Answer, frozen=True):
    """An endpoint of a port of a Service, and whether a frontend leads to it from here."""

    namespace: str
    service: str
    port: str
    address: str
    node: str
    zone: str
    pod: str
    conditions: tuple[str, ...]  # those of ready, serving, terminating that it has
    local: bool
    used: bool


class Endpoints(Answer, frozen=True):
    """The answer of ``/v1/endpoints``."""

    node: str
    items: tuple[EndpointRow, ...]


def endpoint_rows(view: View, service: Service) -> Iterator[EndpointRow]:
    for family in view.families:
        for port in family.cache.ports(service.name):
            used = used_by(family, port)
            for endpoint in family.cache.endpoints(port.name):
                yield endpoint_row(family, port, endpoint, used)


def endpoints(view: View, items: Sequence[EndpointRow]) -> Endpoints:
    return Endpoints(view.node, tuple(items))


def used_by(family: FamilyView, port: ServicePort) -> set[object]:
    plan = family.plan.ports.get(port.name)
    return backends(plan) if plan is not None else set()


def endpoint_row(
    family: FamilyView, port: ServicePort, endpoint: Endpoint, used: set[object]
) -> EndpointRow:
    return EndpointRow(
        namespace=port.name.namespace,
        service=port.name.service,
        port=port.name.port,
        address=str(endpoint.address),
        node=endpoint.node,
        zone=endpoint.zone,
        pod=endpoint.pod,
        conditions=conditions(endpoint),
        local=is_local(endpoint, family.site.place),
        used=endpoint.address in used,
    )


def conditions(endpoint: Endpoint) -> tuple[str, ...]:
    told = {
        "ready": endpoint.ready,
        "serving": endpoint.serving,
        "terminating": endpoint.terminating,
    }
    return tuple(name for name, is_so in told.items() if is_so)


# --- routes ---------------------------------------------------------------------------------------


class RouteRow(Answer, frozen=True):
    """A frontend, and what becomes of connections to it by where they come from."""

    namespace: str
    service: str
    port: str
    frontend: str
    kind: str
    family: int
    from_pod: str
    from_node: str
    from_outside: str
    allowed_sources: tuple[str, ...] | None
    state: str


class Routes(Answer, frozen=True):
    """The answer of ``/v1/routes``."""

    node: str
    items: tuple[RouteRow, ...]
    mode: str = ""


def route_rows(view: View, service: Service) -> Iterator[RouteRow]:
    for family in view.families:
        for plan in family.ports(service.name):
            for route in plan.routes:
                yield route_row(family, plan, route)


def routes(view: View, items: Sequence[RouteRow]) -> Routes:
    return Routes(view.node, tuple(items), view.mode)


def route_row(family: FamilyView, plan: PortPlan, route: Route) -> RouteRow:
    sources = route.allowed_sources
    return RouteRow(
        namespace=plan.owner.namespace,
        service=plan.owner.service,
        port=plan.owner.port,
        frontend=str(route.frontend),
        kind=route.kind,
        family=family.family,
        from_pod=action_text(route.from_pod),
        from_node=action_text(route.from_node),
        from_outside=action_text(route.from_outside),
        allowed_sources=None if sources is None else tuple(map(str, sources)),
        state=family.state(plan.owner) or "planned",
    )


def action_text(action: Action) -> str:
    match action:
        case Forward(pool=pool, masquerade=masquerade):
            count = len(pool.backends)
            return f"forward to {count}{', masquerade' if masquerade else ''}"
        case _:
            return effect(action)


def effect(action: Action) -> str:
    match action:
        case Forward():
            return "forward"
        case Reject():
            return "reject"
        case Drop():
            return "drop"
        case Pass():
            return "pass"


# --- conflicts ------------------------------------------------------------------------------------


class Conflict(Answer, frozen=True):
    """Something that a Service asks for and does not get from this node."""

    namespace: str
    service: str
    port: str
    kind: str  # conflict: another Service has it; refused: the mode or the node cannot
    problem: str


class Conflicts(Answer, frozen=True):
    """The answer of ``/v1/conflicts``."""

    node: str
    items: tuple[Conflict, ...]


def conflict_rows(view: View, service: Service) -> Iterator[Conflict]:
    for family in view.families:
        for port in family.cache.ports(service.name):
            where = port.name[:3]
            for text in family.plan.conflicts.get(port.name, ()):
                yield Conflict(*where, "conflict", text)
            for text in family.refusals(port.name):
                yield Conflict(*where, "refused", text)


def conflicts(view: View, items: Sequence[Conflict]) -> Conflicts:
    return Conflicts(view.node, tuple(items))
