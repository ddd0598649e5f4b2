"""What mode ipvs keeps for a plan: virtual servers, local addresses, and items of a small table.

A virtual server is for one address, protocol and port, and has the backends of connections from
beyond the cluster, or of the cluster IP: those that most connections come for. What no virtual
server can do is for table ``pyproxy-ipvs``: to refuse, drop, guard and masquerade; and where pods
and the node reach more backends than strangers, it picks for them as mode nftables does.

So it does for everybody where clients are to be remembered for a short time only: a virtual server
remembers a client for as long as any connection of the client, and that one for two minutes after
its end, or five minutes after the last datagram.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

from msgspec import Struct

from pyproxy.model import (
    Address,
    Frontend,
    Pass,
    Pool,
    PortPlan,
    Route,
    Scheduler,
    ServicePortName,
)
from pyproxy.rules import nftables
from pyproxy.rules.nft import Element, Rule, SetMark, Verdict, packed_ip
from pyproxy.rules.nft_affinity import CHAIN, Entrance
from pyproxy.rules.nft_affinity import Content as TableContent
from pyproxy.rules.nftables import (
    NODE_PORT,
    PRESENT,
    SERVICE,
    Item,
    Place,
    frontend_key,
    guarded,
    hairpin_key,
    local_backends,
    local_only,
    masquerades,
    numbered_endpoints,
    pool_entrance,
    pool_of,
    refusal,
    refused,
    silenced,
    whole_entrance,
)

SERVED = "served"  # a set: the frontends that virtual servers serve
FALLBACK = "rr"  # the scheduler in the stead of one that the kernel has not
# Schedulers that go on sending new connections to a destination of weight 0, and refuse them.
WITHOUT_DRAINING = frozenset({"dh"})
BRIEF_SECONDS = 300  # of session affinity: less is not for virtual servers
WEIGHTED: Mapping[str, str] = {"rr": "wrr", "lc": "wlc"}


class Server(Struct, frozen=True):
    """A virtual server but for its place, which is its key."""

    scheduler: str
    affinity_seconds: int | None = None


class Destination(NamedTuple):
    """The key of one backend of a virtual server; its content is its weight."""

    server: Frontend
    address: Address


class LocalAddress(NamedTuple):
    """The key of an address that is led to this node, or of one port of it."""

    ip: str
    only: Frontend | None
    owner: ServicePortName | None = None


class Bound(Struct, frozen=True):
    """The content of a local address: its key says it all."""


Key = Item | Frontend | Destination | LocalAddress
Content = TableContent | Server | int | Bound
Items = dict[Key, Content]
BOUND = Bound()


class Ruleset(Struct, frozen=True):
    """What the items depend on besides the plan."""

    table: nftables.Ruleset
    node_ips: tuple[str, ...]  # that serve node ports
    scheduler: str = FALLBACK  # of Services that name none
    missing: frozenset[str] = frozenset()  # schedulers that the kernel has not


def entrance_of(name: str, *rules: Rule) -> Entrance:
    return Entrance(name, ((CHAIN, name, rules),))


CARRIED = entrance_of("carried", Rule("carried", (Verdict("accept"),)))


def masked(ruleset: nftables.Ruleset) -> Entrance:
    return entrance_of("masquerade", Rule("masquerade", (SetMark(ruleset.mark),)))


def compile_owner(ruleset: Ruleset, port: PortPlan, before: Mapping[Key, Content]) -> Items:
    """Return the items of one owner; ``before`` has those it had."""
    if is_brief(port):
        part = nftables.compile_owner(ruleset.table, port, table_part(before))
        return widened(part) | local_cluster_ips(port)
    items = local_cluster_ips(port)
    for route in port.routes:
        place = SERVICE if route.frontend.ip else NODE_PORT
        key = frontend_key(route.frontend)
        items |= table_items(ruleset.table, port, route, place, key, before)
        if route.kind == "ClusterIP":
            ip = route.frontend.ip
            items[Item("cluster-ips", packed_ip(ip), port.owner)] = PRESENT
        if route.allowed_sources is not None:
            items |= widened(guarded(key, route))
        pool = carried_pool(route)
        if pool is not None:
            items |= carried(ruleset, port, route, pool, before)
    for address in local_backends(port):
        items[Item("hairpin", hairpin_key(address, port.owner.proto), port.owner)] = PRESENT
    return items


def is_brief(port: PortPlan) -> bool:
    """Say whether clients are remembered for too short a time for virtual servers."""
    pools = (pool_of(route.from_node) for route in port.routes)
    seconds = next((pool.affinity_seconds for pool in pools if pool is not None), None)
    return seconds is not None and seconds < BRIEF_SECONDS


def local_cluster_ips(port: PortPlan) -> Items:
    ips = (route.frontend.ip for route in port.routes if route.kind == "ClusterIP")
    return {LocalAddress(ip, None, port.owner): BOUND for ip in ips}


def carried_pool(route: Route) -> Pool | None:
    """Return the pool of a frontend's virtual server; None if it has none.

    A virtual server also takes what the node sends: where that is to pass by, the table serves.
    """
    if isinstance(route.from_node, Pass) or refusal(route) is not None:
        return None
    return pool_of(route.from_outside)


def carried(
    ruleset: Ruleset, port: PortPlan, route: Route, pool: Pool, before: Mapping[Key, Content]
) -> Items:
    """Return the virtual servers of a frontend, and what leads to them."""
    items: Items = {}
    ip = route.frontend.ip
    if ip:
        items[Item(SERVED, frontend_key(route.frontend))] = PRESENT
    if ip and route.kind != "ClusterIP":
        items[LocalAddress(ip, route.frontend, port.owner)] = BOUND
    for frontend in placed(route.frontend, ruleset.node_ips):
        items |= server(ruleset, frontend, pool, port, before)
    return items


def placed(frontend: Frontend, node_ips: tuple[str, ...]) -> Iterator[Frontend]:
    """Yield a frontend, or one for each address where a node port is served."""
    if frontend.ip:
        yield frontend
    else:
        for ip in node_ips:
            yield Frontend(ip, frontend.port, frontend.proto)


# --- virtual servers ------------------------------------------------------------------------------


def server(
    ruleset: Ruleset,
    frontend: Frontend,
    pool: Pool,
    port: PortPlan,
    before: Mapping[Key, Content],
) -> Items:
    """Return a virtual server with its destinations.

    Flows of a protocol without connections stay with a backend that serves on, though it is
    given no more of them: it keeps its place, with a weight of 0, where the scheduler minds that.
    """
    scheduler = scheduler_of(ruleset, pool)
    if scheduler in ruleset.missing:
        scheduler = FALLBACK
    items: Items = {frontend: Server(scheduler, pool.affinity_seconds)}
    for address in port.serving if scheduler not in WITHOUT_DRAINING else ():
        if Destination(frontend, address) in before:
            items[Destination(frontend, address)] = 0
    for backend in pool.backends:
        items[Destination(frontend, backend.address)] = backend.weight
    return items


def wanted_schedulers(ruleset: Ruleset, port: PortPlan) -> frozenset[str]:
    """Return the schedulers that the virtual servers of an owner should have."""
    if is_brief(port):
        return frozenset()
    pools = {id(pool): pool for route in port.routes if (pool := carried_pool(route)) is not None}
    return frozenset(scheduler_of(ruleset, pool) for pool in pools.values())


def scheduler_of(ruleset: Ruleset, pool: Pool) -> str:
    weighted = any(backend.weight != 1 for backend in pool.backends)
    return kernel_scheduler(pool.scheduler, ruleset.scheduler, weighted=weighted)


def kernel_scheduler(name: Scheduler | None, default: str, *, weighted: bool) -> str:
    """Return the kernel's name of a scheduler: some have a form that minds weights.

    Who asks for ``rr`` by name asks for equal shares, as in all modes.
    """
    word: str = name or default
    if word == "random":  # the kernel has none that is
        word = "rr"
    return WEIGHTED.get(word, word) if weighted and name != "rr" else word


# --- the table ------------------------------------------------------------------------------------


def table_items(
    ruleset: nftables.Ruleset,
    port: PortPlan,
    route: Route,
    place: Place,
    key: bytes,
    before: Mapping[Key, Content],
) -> Items:
    """Return what the table has for a frontend: a refusal, or a chain if it needs one."""
    verdict = refusal(route)
    if verdict is not None:
        return {Item(place.refusals, key): refused(ruleset, port.owner, key, verdict)}
    if route.kind == "ClusterIP":
        return {}  # masquerading is a rule of the fixed part
    passes = isinstance(route.from_node, Pass)
    entrance = (whole_entrance if passes else entrance_for)(ruleset, port, route, place)
    items: Items = {Item(box, name, port.owner): what for box, name, what in entrance.needs}
    goto = Verdict("goto", entrance.chain)
    items[Item(place.frontends, key)] = Element(key, data=goto, comment=str(port.owner))
    items |= widened(silenced(route, place, key))
    if passes or picks_apart(route):
        numbered = numbered_endpoints(route, place, key, table_part(before))
        items |= {i: c for i, c in numbered.items() if i.container == place.endpoints}
    return items


def picks_apart(route: Route) -> bool:
    """Say whether pods and the node reach other backends than strangers."""
    return pool_of(route.from_node) != pool_of(route.from_outside)


def entrance_for(ruleset: nftables.Ruleset, port: PortPlan, route: Route, place: Place) -> Entrance:
    """Return the chain for an external frontend that forwards at least one origin."""
    whole, outside = pool_of(route.from_node), pool_of(route.from_outside)
    assert whole is not None, "what the node cannot reach, nobody can"
    strangers = masked(ruleset) if masquerades(route.from_outside) else CARRIED
    if not picks_apart(route):
        if masquerades(route.from_pod):
            return strangers
        return local_only(ruleset, port.owner, CARRIED, strangers, place)
    pick = pool_entrance(port, whole, place, place.endpoints)
    return local_only(ruleset, port.owner, pick, strangers if outside else None, place)


def widened(part: Mapping[Item, TableContent]) -> Items:
    """Return items of the table as what they are among others."""
    return cast(Items, part)


def table_part(before: Mapping[Key, Content]) -> Mapping[Item, TableContent]:
    """Return the same mapping, of which nobody will look at more than the table's part."""
    return before  # type: ignore[return-value]  # the keys of the rest are never asked for
