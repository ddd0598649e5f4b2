"""Which tracked connections a new plan makes wrong.

The kernel sends a tracked flow where its first packet was sent, whatever the rules say by then.
Flows of UDP and SCTP whose backend no longer serves are *stale*: their client would talk to
nobody for as long as it talks. Flows of any protocol that a stricter policy, source range or
node port would no longer let through are *broken*. kube-proxy lets these go on, and so does
``conntrack.endForbiddenFlows: false``.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from ipaddress import ip_address
from typing import NamedTuple

from msgspec import Struct

from pyproxy.model import (
    Action,
    Address,
    Backend,
    Drop,
    Forward,
    Frontend,
    Network,
    PortPlan,
    Proto,
    Route,
    ServicePortName,
)
from pyproxy.rules.listeners import Surroundings, origin_of

Lookup = Mapping[Frontend, frozenset[Address]]  # frontends, and who may serve their flows

NOBODY: frozenset[Address] = frozenset()


class Flow(NamedTuple):
    """A tracked connection. ``backend`` is where its answers come from."""

    proto: Proto
    source: Address
    destination: Address  # as the client sees it
    backend: Address
    identity: bytes  # what the kernel needs to find it again; opaque


class Tightened(Struct, frozen=True):
    """A frontend whose flows a new plan may forbid.

    ``allowed_sources`` is None unless the ranges are new. The rest are the backends that each
    origin had, and may not be sent to any more.
    """

    frontend: Frontend
    allowed_sources: tuple[Network, ...] | None = None
    from_pod: frozenset[Address] = NOBODY
    from_node: frozenset[Address] = NOBODY
    from_outside: frozenset[Address] = NOBODY


class Review(Struct, frozen=True):
    """What to look for in connection tracking. It is false where nothing has to be."""

    services: Lookup
    tightened: Mapping[Frontend, tuple[Tightened, ...]]

    def __bool__(self) -> bool:
        return bool(self.services or self.tightened)

    @property
    def frontends(self) -> frozenset[Frontend]:
        return frozenset(self.services) | frozenset(self.tightened)


class Pending:
    """Knows the plan that the flows of each owner were made under, and which to look at again.

    ``ends_forbidden``: flows that a new plan would not let through are looked for, too.
    """

    def __init__(self, *, ends_forbidden: bool) -> None:
        self._ends_forbidden = ends_forbidden
        self._known: dict[ServicePortName, PortPlan] | None = None  # before the first review
        self._due: set[ServicePortName] = set()

    def note(self, owners: Iterable[ServicePortName]) -> None:
        """Remember owners whose plan is another one, until a sync succeeds."""
        self._due.update(owners)

    def take(
        self,
        ports: Mapping[ServicePortName, PortPlan],
        unwritten: Collection[ServicePortName] = (),
    ) -> Review:
        """Return what the owners noted call for, now that ``ports`` is in force.

        Those that are ``unwritten`` remain noted: for them it is not.

        The first review is of all owners, for the flows of before this process. Whatever broke
        an older rule then stays: nobody knows that rule.
        """
        if self._known is None:
            self._known, self._due = {}, set(ports)
        services: dict[Frontend, frozenset[Address]] = {}
        tightened: dict[Frontend, tuple[Tightened, ...]] = {}
        later = self._due.intersection(unwritten)
        for owner in sorted(self._due - later):
            old, new = self._known.pop(owner, None), ports.get(owner)
            if new is not None:
                self._known[owner] = new
                services |= dict.fromkeys(affected(old, new), new.serving)
            for rule in broken(old, new) if self._ends_forbidden else ():
                tightened[rule.frontend] = (*tightened.get(rule.frontend, ()), rule)
        self._due = later
        return Review(services, tightened)


# --- stale: the backend does not serve any more ---------------------------------------------------


def lookup(ports: Iterable[PortPlan]) -> Lookup:
    """Return who may serve the flows of each frontend.

    Frontends of TCP are left out: a connection ends by itself. So are those that nobody serves:
    their flows have nowhere better to go.
    """
    return {
        route.frontend: port.serving
        for port in ports
        if port.owner.proto != "TCP" and port.serving
        for route in port.routes
    }


def stale(flow: Flow, services: Lookup) -> bool:
    """Say whether the backend of a flow is none of those that serve where its client sent it.

    A flow of a Service address that nobody translated is stale: it is older than the rules. A
    node port is one at whatever address: which are the node's own is not looked at, as in
    kube-proxy, and a stranger's flow to that port somewhere else is begun anew.
    """
    if flow.proto == "TCP":
        return False
    ip, port = flow.destination
    for frontend in (Frontend(ip, port, flow.proto), Frontend("", port, flow.proto)):
        serving = services.get(frontend)
        if serving is not None and flow.backend not in serving:
            return True
    return False


def affected(old: PortPlan | None, new: PortPlan | None) -> frozenset[Frontend]:
    """Return the frontends that stale flows may exist for since ``new`` replaced ``old``.

    That is all of them once a backend is lost or the first one is there, and else those that are
    new: until then their flows went untranslated, or to another owner's backends. Policy,
    topology and affinity do not count.
    """
    if new is None or new.owner.proto == "TCP" or not new.serving:
        return frozenset()
    frontends = frozenset(route.frontend for route in new.routes)
    if old is None or not old.serving or old.serving - new.serving:
        return frontends
    return frontends - {route.frontend for route in old.routes}


# --- broken: a rule became stricter ---------------------------------------------------------------


def broken(old: PortPlan | None, new: PortPlan | None) -> tuple[Tightened, ...]:
    """Return the frontends whose traffic policy, source ranges or node port became stricter.

    A Service that is gone leaves its connections alone, as does an endpoint that is gone: only
    flows that certainly break a rule of the new plan are meant. Without an old plan there are
    none.

    Where policy Local leaves a Service without external frontends some endpoints of this node,
    nothing in the plan tells it from endpoints that are gone; its flows stay.
    """
    if old is None or new is None:
        return ()
    routes = {route.frontend: route for route in new.routes}
    remote = remote_backends(new)
    found = []
    for before in old.routes:
        after = routes.get(before.frontend)
        if after is before:
            continue
        rule = narrowed(before, after, remote) if after is not None else withdrawn(before)
        if rule is not None and rule != Tightened(before.frontend):
            found.append(rule)
    return tuple(found)


def breaks(flow: Flow, rule: Tightened, around: Surroundings) -> bool:
    """Say whether a flow of the rule's frontend certainly breaks it.

    Where pods cannot be told by their address, a flow must break the rule for pods and for
    strangers.
    """
    ip = flow.source.ip
    if rule.allowed_sources is not None:
        address = ip_address(ip)
        if not any(address in network for network in rule.allowed_sources):
            return True
    match origin_of(ip, around):
        case "pod":
            return flow.backend in rule.from_pod
        case "node":
            return flow.backend in rule.from_node
        case "outside":
            told_apart = around.pods or rule.from_pod == rule.from_outside
            refused = rule.from_outside if told_apart else rule.from_outside & rule.from_pod
            return flow.backend in refused


def narrowed(before: Route, after: Route, remote: frozenset[Address]) -> Tightened:
    ranges_are_new = after.allowed_sources != before.allowed_sources
    return Tightened(
        before.frontend,
        after.allowed_sources if ranges_are_new else None,
        confined(before.from_pod, after.from_pod, remote),
        confined(before.from_node, after.from_node, remote),
        confined(before.from_outside, after.from_outside, remote),
    )


def withdrawn(before: Route) -> Tightened | None:
    """Return the rule of a frontend that is gone; only a node port is the Service's to give up.

    Its flows are told from others by their backend: the address says nothing.
    """
    if before.kind != "NodePort":
        return None
    return Tightened(
        before.frontend,
        None,
        addresses(before.from_pod),
        addresses(before.from_node),
        addresses(before.from_outside),
    )


def confined(before: Action, after: Action, remote: frozenset[Address]) -> frozenset[Address]:
    """Return the remote backends that became out of bounds because the policy is Local now.

    Only policy Local answers with silence where endpoints exist. Else a remote backend that was
    in the pool and is not must still be in another pool of the plan: the endpoint did not go,
    nor did a topology hint or a weight take it away, which hold for all pools alike.
    """
    lost = {b.address for b in backends(before) if not b.is_local} - addresses(after)
    match after:
        case Drop():
            return frozenset(lost)
        case Forward():
            return frozenset(lost & remote)
        case _:
            return NOBODY


def remote_backends(port: PortPlan) -> frozenset[Address]:
    """Return the backends on other nodes that this node may use, for whichever origin."""
    found: set[Address] = set()
    looked_at: set[int] = set()
    for route in port.routes:
        for action in (route.from_pod, route.from_node, route.from_outside):
            if isinstance(action, Forward) and id(action.pool) not in looked_at:
                looked_at.add(id(action.pool))
                found.update(b.address for b in action.pool.backends if not b.is_local)
    return frozenset(found)


# --- both -----------------------------------------------------------------------------------------


def condemned(flows: Iterable[Flow], review: Review, around: Surroundings) -> Iterator[Flow]:
    """Yield the flows that have to go."""
    for flow in flows:
        if stale(flow, review.services) or any(
            breaks(flow, rule, around) for rule in rules_for(flow, review)
        ):
            yield flow


def rules_for(flow: Flow, review: Review) -> tuple[Tightened, ...]:
    if not review.tightened:
        return ()
    ip, port = flow.destination
    rules = review.tightened
    return rules.get(Frontend(ip, port, flow.proto), ()) + rules.get(
        Frontend("", port, flow.proto), ()
    )


def backends(action: Action) -> Iterator[Backend]:
    if isinstance(action, Forward):
        yield from action.pool.backends


def addresses(action: Action) -> frozenset[Address]:
    return frozenset(backend.address for backend in backends(action))
