"""What this node must do with packets, whatever the mode.

A plan covers one family. It is made owner by owner: each is planned from its whole input, and
``Planner`` remembers the rest, so that a change costs what changed. The rules are kube-proxy's.
"""

from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_address, ip_network

from msgspec import Struct, structs

from pyproxy.cache import Cache, Owners
from pyproxy.model import (
    Action,
    Backend,
    Drop,
    Endpoint,
    Forward,
    Frontend,
    HealthPort,
    Network,
    ObjectName,
    Pass,
    Pool,
    PortPlan,
    Reject,
    Route,
    ServicePort,
    ServicePortName,
)
from pyproxy.report import told
from pyproxy.topology import EndpointSets, Place, endpoint_sets, is_local, weight_of

REJECT = Reject()
DROP = Drop()
PASS = Pass()


class Site(Struct, frozen=True):
    """What this node contributes to a plan, for one family.

    ``detects_pods`` says that connections of the node's own pods can be told from others; where
    they cannot, they are planned like those from outside.
    """

    place: Place
    node_ip: str | None = None
    detects_pods: bool = True
    masquerade_all: bool = False


class Plan:
    """The duties of this node for every owner. Changed by its ``Planner``, between syncs only."""

    def __init__(self) -> None:
        self.ports: dict[ServicePortName, PortPlan] = {}
        self.conflicts: dict[ServicePortName, tuple[str, ...]] = {}
        self.failed: dict[ServicePortName, str] = {}  # they stay as they were, by our mistake
        self.without_local_internal: Owners = set()
        self.without_local_external: Owners = set()
        self._health: dict[ServicePortName, HealthPort] = {}

    def health_ports(self) -> dict[ObjectName, HealthPort]:
        """Return the health check node port of each Service that has one.

        Its local addresses are those of all ports of the Service: a pod counts once.
        """
        united: dict[ObjectName, HealthPort] = {}
        for owner, health in self._health.items():
            known = united.get(owner.service_name, health)
            united[owner.service_name] = HealthPort(health.port, known.local_ips | health.local_ips)
        return united

    def put(self, owner: ServicePortName, port: PortPlan | None) -> bool:
        """Set the plan of an owner, None to forget it; say whether it is another one now."""
        before = self.ports.pop(owner, None)
        for owners in (self.without_local_internal, self.without_local_external):
            owners.discard(owner)
        self._health.pop(owner, None)
        if port is None:
            return before is not None
        self.ports[owner] = port
        if port.health is not None:
            self._health[owner] = port.health
        if port.no_local_internal:
            self.without_local_internal.add(owner)
        if port.no_local_external:
            self.without_local_external.add(owner)
        return port != before


class Planner:
    """Remembers the plan and renews the owners it is told of."""

    def __init__(self) -> None:
        self.plan = Plan()
        self._wanted: dict[ServicePortName, PortPlan] = {}
        self._claims: dict[Frontend, list[ServicePortName]] = {}

    def update(self, owners: Iterable[ServicePortName], cache: Cache, site: Site) -> Owners:
        """Plan ``owners`` again and return the owners whose plan is different now.

        These may be others too: a frontend that two owners ask for belongs to the first of them
        in the order of names, and passes to the next when it lets go.

        An owner that cannot be planned, by a mistake of ours, keeps the plan it has; it is among
        ``plan.failed``, and tried again at each update.
        """
        affected: Owners = set()
        for owner in {*owners, *self.plan.failed}:
            try:
                port = cache.port(owner)
                wanted = plan_port(port, cache.endpoints(owner), site) if port is not None else None
            except Exception as mistake:
                self.plan.failed[owner] = told(mistake)
                continue
            self.plan.failed.pop(owner, None)
            affected.add(owner)
            affected |= self._claim(owner, wanted)
        return {owner for owner in affected if self._grant(owner)}

    def _claim(self, owner: ServicePortName, wanted: PortPlan | None) -> Owners:
        """Register the frontends an owner wants; return the other owners that ask for them."""
        before = self._wanted.pop(owner, None)
        if wanted is not None:
            self._wanted[owner] = wanted
        old, new = frontends(before), frontends(wanted)
        rivals: Owners = set()
        for frontend in old - new:
            claimants = self._claims[frontend]
            claimants.remove(owner)
            rivals.update(claimants)
            if not claimants:
                del self._claims[frontend]
        for frontend in new - old:
            claimants = self._claims.setdefault(frontend, [])
            rivals.update(claimants)
            claimants.append(owner)
            claimants.sort()
        return rivals

    def _grant(self, owner: ServicePortName) -> bool:
        """Give an owner the frontends that are its; say whether its plan is another one now."""
        wanted = self._wanted.get(owner)
        self.plan.conflicts.pop(owner, None)
        if wanted is None:
            return self.plan.put(owner, None)
        lost = [route for route in wanted.routes if self._claims[route.frontend][0] != owner]
        if lost:
            self.plan.conflicts[owner] = tuple(
                f"{route.frontend} of {owner} is taken by {self._claims[route.frontend][0]}"
                for route in lost
            )
            kept = tuple(route for route in wanted.routes if route not in lost)
            wanted = structs.replace(wanted, routes=kept)
        return self.plan.put(owner, wanted)


def plan_port(port: ServicePort, endpoints: Sequence[Endpoint], site: Site) -> PortPlan:
    """Return this node's duty for one Service port: a pure function of all it depends on."""
    sets = endpoint_sets(port, endpoints, site.place)
    cluster = pool(port, sets.cluster, site.place)
    local = pool(port, sets.local, site.place)
    udp = port.name.proto != "TCP"
    return PortPlan(
        owner=port.name,
        routes=tuple(routes(port, sets, cluster, local, site)),
        serving=frozenset(e.address for e in endpoints if e.serving) if udp else frozenset(),
        health=health_port(port, endpoints, site.place),
        no_local_internal=port.internal_local and sets.anywhere and local is None,
        no_local_external=(
            port.external_local and port.externally_accessible and sets.anywhere and local is None
        ),
    )


def routes(
    port: ServicePort, sets: EndpointSets, cluster: Pool | None, local: Pool | None, site: Site
) -> Iterator[Route]:
    """Yield the routes of a Service port, each frontend once.

    An address that is both an external IP and a load balancer IP is an external IP: kube-proxy
    looks at those first.
    """
    seen: set[Frontend] = set()
    internal = internal_actions(port, sets, cluster, local, site)
    external = external_actions(port, sets, cluster, local, site)
    balanced = balanced_actions(port, external, local, site)
    allowed = allowed_sources(port, site)
    number, proto = port.port, port.name.proto
    candidates = [Route(Frontend(port.cluster_ip, number, proto), "ClusterIP", *internal)]
    candidates += [
        Route(Frontend(ip, number, proto), "ExternalIP", *external) for ip in port.external_ips
    ]
    candidates += [
        Route(Frontend(ip, number, proto), "LoadBalancer", *balanced, allowed)
        for ip in port.load_balancer_ips
    ]
    if port.node_port:
        candidates.append(Route(Frontend("", port.node_port, proto), "NodePort", *external))
    for route in candidates:
        if route.frontend not in seen:
            seen.add(route.frontend)
            yield route


def internal_actions(
    port: ServicePort, sets: EndpointSets, cluster: Pool | None, local: Pool | None, site: Site
) -> tuple[Action, Action, Action]:
    """Return what becomes of connections to the cluster IP from pods, the node and outside."""
    chosen = local if port.internal_local else cluster
    inside = action(sets, chosen, masquerade=site.masquerade_all)
    masked = action(sets, chosen, masquerade=site.masquerade_all or site.detects_pods)
    return inside, masked, masked


def external_actions(
    port: ServicePort, sets: EndpointSets, cluster: Pool | None, local: Pool | None, site: Site
) -> tuple[Action, Action, Action]:
    """Return what becomes of connections to an external frontend.

    With external policy Local, pods and the node reach all endpoints, as if their connection had
    come through the cluster's load balancer; strangers reach this node's, and keep their address.
    """
    masked = action(sets, cluster, masquerade=True)
    if not port.external_local:
        return masked, masked, masked
    outside = action(sets, local, masquerade=False)
    inside = action(sets, cluster, masquerade=False) if site.detects_pods else outside
    return inside, masked, outside


def balanced_actions(
    port: ServicePort, external: tuple[Action, Action, Action], local: Pool | None, site: Site
) -> tuple[Action, Action, Action]:
    """Return what becomes of connections to a load balancer's address.

    Pods and the node may have to go by the load balancer, as strangers do: always, or where no
    endpoint is on this node.
    """
    if port.balancer_traffic == "short-circuit":
        return external
    _, _, outside = external
    from_pod: Action = PASS
    from_node: Action = PASS
    if port.balancer_traffic == "local-else-pass-through" and local is not None:
        from_pod = Forward(local, masquerade=False)
        from_node = Forward(local, masquerade=True)
    return from_pod if site.detects_pods else outside, from_node, outside


def action(sets: EndpointSets, chosen: Pool | None, *, masquerade: bool) -> Action:
    if not sets.anywhere:
        return REJECT
    return Forward(chosen, masquerade) if chosen is not None else DROP


def pool(port: ServicePort, members: Sequence[Endpoint], place: Place) -> Pool | None:
    if not members:
        return None
    weights = port.weights
    return Pool(
        backends=tuple(
            Backend(e.address, weight_of(e, weights) if weights else 1, is_local(e, place))
            for e in members
        ),
        scheduler=port.scheduler,
        affinity_seconds=port.affinity_seconds,
    )


def allowed_sources(port: ServicePort, site: Site) -> tuple[Network, ...] | None:
    """Return who may use the load balancer IPs; None for everybody.

    Where the node may, so may the load balancer IPs: the node's own connections carry the
    address they are made to.
    """
    if not port.source_ranges:
        return None
    ranges = port.source_ranges
    if site.node_ip and any(ip_address(site.node_ip) in network for network in ranges):
        return ranges + tuple(ip_network(ip) for ip in port.load_balancer_ips)
    return ranges


def health_port(
    port: ServicePort, endpoints: Sequence[Endpoint], place: Place
) -> HealthPort | None:
    if not port.health_check_node_port:
        return None
    local = frozenset(e.address.ip for e in endpoints if e.ready and is_local(e, place))
    return HealthPort(port.health_check_node_port, local)


def frontends(plan: PortPlan | None) -> set[Frontend]:
    return {route.frontend for route in plan.routes} if plan is not None else set()
