"""What becomes of connections to a Service, or of one connection, and why: from the plan.

The plan alone decides; the words are those of ``reasons``.
"""

from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from typing import Final, get_args

from msgspec.structs import replace

from pyproxy.health import rfc3339
from pyproxy.ip import canonical_ip
from pyproxy.listing import effect
from pyproxy.model import (
    PROTOS,
    Action,
    Endpoint,
    Forward,
    Frontend,
    Pool,
    PortPlan,
    Proto,
    Route,
    Service,
    ServicePort,
    family_of,
)
from pyproxy.reasons import (
    Subject,
    listed,
    why,
    why_masquerade,
    why_not_admitted,
)
from pyproxy.remarks import age, not_ours, owner_of, remarks
from pyproxy.rules.listeners import Origin, origin_of
from pyproxy.rules.shares import shares
from pyproxy.view import Answer, FamilyView, NotThereError, Query, QueryError, View, asked_service

ORIGINS: Final[tuple[Origin, ...]] = get_args(Origin)


class Share(Answer, frozen=True):
    """An endpoint, and the part of new connections that it gets, 0 to 1; None: it varies."""

    address: str
    node: str
    pod: str
    zone: str
    probability: float | None


class Case(Answer, frozen=True):
    """What becomes of connections of some origins, and what decided it."""

    origins: tuple[str, ...]  # of pod, node, outside
    action: str  # forward, reject, drop, pass
    reason: str
    object: str  # that decided,
    field: str  # and which part of it
    masquerade: bool = False
    masquerade_reason: str = ""
    endpoints: tuple[Share, ...] = ()
    affinity_seconds: int | None = None
    scheduler: str = ""


class FrontendCases(Answer, frozen=True):
    """A frontend of a Service, and what it does for each origin."""

    frontend: str
    kind: str
    port: str
    family: int
    state: str
    since: str | None
    allowed_sources: tuple[str, ...] | None
    cases: tuple[Case, ...]
    problems: tuple[str, ...] = ()


class NotOurs(Answer, frozen=True):
    """An address that one might expect this node to serve, and why it does not."""

    address: str
    reason: str


class Explanation(Answer, frozen=True):
    """The answer of ``/v1/explain``.

    About a connection there is one case of one frontend at most; ``not_ours`` says why there is
    none.
    """

    node: str
    mode: str
    about: str
    service: str = ""
    resource_version: str = ""
    selector: str = ""
    slices: str = ""
    frontends: tuple[FrontendCases, ...] = ()
    not_ours: tuple[NotOurs, ...] = ()
    remarks: tuple[str, ...] = ()


def explain(view: View, query: Query) -> Explanation:
    """Answer ``service=NAMESPACE/NAME``, or ``from=WHO`` and ``to=IP:PORT[/PROTO]``."""
    answer = explained(view, query)
    return replace(answer, remarks=(*age(view), *answer.remarks))


def explained(view: View, query: Query) -> Explanation:
    if query.get("to"):
        return explain_connection(view, query)
    name = asked_service(query)
    if name is None:
        raise QueryError("explain: it needs a service, or from and to")
    service = view.service(name)
    return about_service(view, service, tuple(frontends(view, service)))


def about_service(
    view: View, service: Service, found: tuple[FrontendCases, ...], about: str = ""
) -> Explanation:
    slices = [part for family in view.families for part in family.cache.slices(service.name)]
    return Explanation(
        node=view.node,
        mode=view.mode,
        about=about or f"Service {service.name}",
        service=str(service.name),
        resource_version=service.resource_version,
        selector=service.selector,
        slices=listed([part.name.name for part in slices]),
        frontends=found,
        not_ours=() if about else tuple(NotOurs(*pair) for pair in not_ours(view, service)),
        remarks=tuple(remarks(view, service)),
    )


def frontends(view: View, service: Service) -> Iterator[FrontendCases]:
    for family in view.families:
        for port in family.cache.ports(service.name):
            plan = family.plan.ports.get(port.name)
            if plan is not None:
                for route in plan.routes:
                    cases = tuple(cases_of(view, family, subject_of(family, service, port), route))
                    yield frontend_cases(family, plan, route, cases)


def subject_of(family: FamilyView, service: Service, port: ServicePort) -> Subject:
    endpoints = family.cache.endpoints(port.name)
    return Subject(service, port, endpoints, family.cache.slices(service.name), family.site)


def frontend_cases(
    family: FamilyView, plan: PortPlan, route: Route, cases: tuple[Case, ...]
) -> FrontendCases:
    progress, sources = family.progress, route.allowed_sources
    since = progress.since(plan.owner) if progress is not None else None
    return FrontendCases(
        frontend=str(route.frontend),
        kind=route.kind,
        port=plan.owner.port,
        family=family.family,
        state=family.state(plan.owner) or "planned",
        since=rfc3339(since) if since is not None else None,
        allowed_sources=None if sources is None else tuple(map(str, sources)),
        cases=cases,
        problems=family.problems(plan.owner),
    )


def cases_of(view: View, family: FamilyView, subject: Subject, route: Route) -> Iterator[Case]:
    """Yield what becomes of each origin; those that fare alike are one case."""
    alike: dict[Case, list[str]] = {}
    for origin in ORIGINS:
        case = case_of(view, family, subject, route, origin)
        alike.setdefault(case, []).append(origin)
    for case, origins in alike.items():
        yield replace(case, origins=tuple(origins))


def case_of(
    view: View,
    family: FamilyView,
    subject: Subject,
    route: Route,
    origin: Origin,
    origins: tuple[str, ...] = (),
) -> Case:
    action = action_from(route, origin)
    reason = why(subject, route.kind, origin)
    if not isinstance(action, Forward):
        return Case(origins, effect(action), reason.text, reason.object, reason.field)
    masquerade = why_masquerade(subject, route.kind, origin)
    kept_where = ""
    if view.mode == "userspace" and masquerade is None:
        if view.keeps_client_address and family.around.pods:
            kept_where = "only where answers would not come back by this node"
        else:
            masquerade = "mode userspace makes a connection of its own"
    return Case(
        origins,
        "forward",
        reason.text,
        reason.object,
        reason.field,
        masquerade is not None,
        masquerade or kept_where,
        tuple(shares_of(view, route, action.pool, subject.endpoints)),
        action.pool.affinity_seconds,
        action.pool.scheduler or "",
    )


def action_from(route: Route, origin: Origin) -> Action:
    match origin:
        case "pod":
            return route.from_pod
        case "node":
            return route.from_node
        case "outside":
            return route.from_outside


def shares_of(
    view: View, route: Route, pool: Pool, endpoints: Sequence[Endpoint]
) -> Iterator[Share]:
    known = {endpoint.address: endpoint for endpoint in endpoints}
    chances = shares(view.mode, route, pool, view.ipvs_scheduler)
    for number, backend in enumerate(pool.backends):
        it = known.get(backend.address) or Endpoint(backend.address)
        chance = round(chances[number], 6) if chances is not None else None
        yield Share(str(backend.address), it.node, it.pod, it.zone, chance)


# --- one connection -------------------------------------------------------------------------------


def explain_connection(view: View, query: Query) -> Explanation:
    ip, port, proto = destination(query["to"])
    family = family_for(view, ip)
    origin, source = sender(view, family, query.get("from", "outside"))
    about = f"{said(origin, source)} to {Frontend(ip, port, proto)}"
    found = matching(family, Frontend(ip, port, proto))
    if found is None:
        owner, reason = owner_of(view, family, ip, port, proto)
        stranger = NotOurs(str(Frontend(ip, port, proto)), reason)
        if owner is None:
            return Explanation(view.node, view.mode, about, not_ours=(stranger,))
        return replace(about_service(view, owner, (), about), not_ours=(stranger,))
    plan, route = found
    service = view.service(plan.owner.service_name)
    (own_port,) = (p for p in family.cache.ports(service.name) if p.name == plan.owner)
    case = connection_case(
        view, family, subject_of(family, service, own_port), route, origin, source
    )
    return about_service(view, service, (frontend_cases(family, plan, route, (case,)),), about)


def connection_case(
    view: View,
    family: FamilyView,
    subject: Subject,
    route: Route,
    origin: Origin,
    source: str | None,
) -> Case:
    """Return what becomes of one connection: only what passes by needs not be allowed."""
    stranger = why_not_admitted(subject.service, route.allowed_sources, source) if source else None
    case = case_of(view, family, subject, route, origin, (origin,))
    if stranger is not None and case.action != "pass":
        return Case((origin,), "drop", stranger.text, stranger.object, stranger.field)
    hairpins = [s for s in case.endpoints if source and s.address.startswith(f"{source}:")]
    if case.masquerade or not hairpins:
        return case
    return replace(case, masquerade_reason=f"only where {source} would answer itself (hairpin)")


def destination(text: str) -> tuple[str, int, Proto]:
    """Read ``IP:PORT``, ``IP:PORT/udp`` or ``[IPv6]:PORT``. Raises ``QueryError``."""
    where, _, proto = text.partition("/")
    host, _, number = where.rpartition(":")
    ip = canonical_ip(host.removeprefix("[").removesuffix("]"))
    if ip is None or not (number.isdecimal() and 0 < int(number) < 65536):
        raise QueryError(f"to: {text} is not IP:PORT or IP:PORT/udp")
    for known in PROTOS:
        if known == (proto.upper() or "TCP"):
            return ip, int(number), known
    raise QueryError(f"to: {proto} is not tcp, udp or sctp")


def family_for(view: View, ip: str) -> FamilyView:
    for family in view.families:
        if family.family == family_of(ip):
            return family
    raise NotThereError(f"to: {view.node} serves no IPv{family_of(ip)}")


def sender(view: View, family: FamilyView, text: str) -> tuple[Origin, str | None]:
    """Return where a connection comes from, and its address if that is known."""
    if text == "node":
        return "node", family.site.node_ip
    if text == "outside":
        return "outside", None
    ip = (
        pod_ip(family, text.removeprefix("pod/")) if text.startswith("pod/") else canonical_ip(text)
    )
    if ip is None:
        raise QueryError(f"from: {text} is not node, outside, pod/NAMESPACE/NAME or an address")
    if family_of(ip) != family.family:
        raise QueryError(f"from: {ip} cannot connect to an address of IPv{family.family}")
    return origin_in(view.mode, family, ip), ip


def origin_in(mode: str, family: FamilyView, ip: str) -> Origin:
    """Return the origin as the mode sees it: kernel modes look for pods first."""
    pods = family.around.pods if mode != "userspace" else ()
    if any(ip_address(ip) in network for network in pods):
        return "pod"
    return origin_of(ip, family.around)


def pod_ip(family: FamilyView, text: str) -> str:
    namespace, _, name = text.partition("/")
    for service in family.cache.services():
        if service.namespace == namespace:
            for part in family.cache.slices(service):
                for endpoints in part.endpoints.values():
                    for endpoint in endpoints:
                        if endpoint.pod == name:
                            return endpoint.address.ip
    raise NotThereError(
        f"from: no EndpointSlice of IPv{family.family} names pod {text}; give its address instead"
    )


def matching(family: FamilyView, frontend: Frontend) -> tuple[PortPlan, Route] | None:
    """Return the route of a destination: addresses come before node ports."""
    node_port = Frontend("", frontend.port, frontend.proto)
    serves = frontend.ip in family.node_port_ips
    found: tuple[PortPlan, Route] | None = None
    for plan in family.plan.ports.values():
        for route in plan.routes:
            if route.frontend == frontend:
                return plan, route
            if serves and route.frontend == node_port:
                found = plan, route
    return found


def said(origin: Origin, source: str | None) -> str:
    names = {"pod": "a pod", "node": "the node itself", "outside": "outside"}
    return f"from {source} ({names[origin]})" if source else f"from {names[origin]}"
