"""What table ``pyproxy`` of nf_tables contains for a plan: a fixed part, and items of each owner.

No chain belongs to a Service. A frontend is an element of a verdict map and goes to a chain that
all pools of its size share; its endpoints are numbered elements of a data map, from which that
chain picks. So a change is a few elements, whatever the size of the cluster. Services with
session affinity alone have chains and sets of their own, one for each endpoint (``nft_affinity``).
Long, because an owner's items are one compilation: keys, endpoints and chains refer to each other.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from ipaddress import collapse_addresses
from typing import NamedTuple

from msgspec import Struct, structs

from pyproxy.model import (
    Action,
    Address,
    Drop,
    Family,
    Forward,
    Frontend,
    Network,
    Pass,
    Pool,
    PortPlan,
    Proto,
    Reject,
    Route,
    Scheduler,
    ServicePortName,
)
from pyproxy.rules.nft import (
    PROTO_NUMBERS,
    DnatPick,
    Element,
    Field,
    MatchInput,
    MatchLocal,
    MatchNetwork,
    Pick,
    Rule,
    SetMark,
    Statement,
    Verdict,
    packed_ip,
    packed_slot,
)
from pyproxy.rules.nft_affinity import (
    CHAIN,
    PICKS,
    Content,
    Entrance,
    affine,
    identity,
    turn,
    turn_length,
)
from pyproxy.rules.slots import settled

REFUSE = Verdict("goto", "refuse")
REFUSE_STRANGERS = Verdict("goto", "refuse-strangers")
DROP_STRANGERS = Verdict("goto", "drop-strangers")
DROP_SILENTLY = Verdict("goto", "drop-by-policy")


class Item(NamedTuple):
    """One thing that an owner has in the table. ``owner`` only where others may want the same."""

    container: str
    key: bytes | str
    owner: ServicePortName | None = None


Items = dict[Item, Content]
PRESENT = b""  # the content of an element that has none


class Place(NamedTuple):
    """Where frontends of one kind are kept."""

    prefix: str
    fields: tuple[Field, ...]
    frontends: str
    refusals: str
    endpoints: str
    local_endpoints: str
    silent: str  # a set: the frontends that strangers get no answer at


SERVICE = Place(
    "", ("daddr", "l4proto", "dport"), "service-ips", "no-endpoints",
    "endpoints", "local-endpoints", "silent-ips",
)  # fmt: skip
NODE_PORT = Place(
    "node-", ("l4proto", "dport"), "node-ports", "no-endpoint-node-ports",
    "node-port-endpoints", "local-node-port-endpoints", "silent-node-ports",
)  # fmt: skip


class Ruleset(Struct, frozen=True):
    """What the rules of one family depend on besides the plan.

    ``pods`` recognises connections of this node's pods: a network of theirs, or an interface's
    name, with a star at the end for a prefix; None if nothing does.
    """

    family: Family
    mark: int = 0x4000
    pods: Network | str | None = None
    masquerade_all: bool = False
    node_port_ips: tuple[str, ...] | None = None  # None: every address of the node
    service_cidrs: tuple[Network, ...] = ()
    service_metrics: str = "off"  # what is counted, as in the configuration


def compile_owner(ruleset: Ruleset, port: PortPlan, before: Mapping[Item, Content]) -> Items:
    """Return the items of one owner.

    ``before`` has those it had: endpoints keep the slots they are in, so that one that comes or
    goes moves at most one other.
    """
    items: Items = {}
    for route in port.routes:
        place = SERVICE if route.frontend.ip else NODE_PORT
        key = frontend_key(route.frontend)
        verdict = refusal(route)
        if verdict is not None:
            items[Item(place.refusals, key)] = refused(ruleset, port.owner, key, verdict)
        else:
            entrance = whole_entrance(ruleset, port, route, place)
            for container, name, content in entrance.needs:
                items[Item(container, name, port.owner)] = content
            goto = Verdict("goto", entrance.chain)
            items[Item(place.frontends, key)] = Element(
                key, data=goto, comment=str(port.owner), counted=is_counted(ruleset, route, place)
            )
            items |= numbered_endpoints(route, place, key, before) | silenced(route, place, key)
        if route.kind == "ClusterIP":
            items[Item("cluster-ips", packed_ip(route.frontend.ip), port.owner)] = PRESENT
        if route.allowed_sources is not None:
            items |= guarded(key, route)
    for address in local_backends(port):
        items[Item("hairpin", hairpin_key(address, port.owner.proto), port.owner)] = PRESENT
    return items


def refusal(route: Route) -> Verdict | None:
    """Return what meets everybody at this frontend who does not pass by, if it is no pool."""
    actions = (route.from_pod, route.from_node, route.from_outside)
    actors = [action for action in actions if not isinstance(action, Pass)]
    some_pass = len(actors) < len(actions)
    if all(isinstance(action, Reject) for action in actors):
        return REFUSE_STRANGERS if some_pass else REFUSE
    if all(isinstance(action, Drop) for action in actors):
        return DROP_STRANGERS if some_pass else Verdict("drop")
    return None


def refused(ruleset: Ruleset, owner: ServicePortName, key: bytes, verdict: Verdict) -> Element:
    """Return the element of a frontend that nobody is forwarded at."""
    counted = ruleset.service_metrics != "off"
    return Element(key, data=verdict, comment=str(owner), counted=counted)


def is_counted(ruleset: Ruleset, route: Route, place: Place) -> bool:
    """Say whether a frontend that forwards counts its connections.

    It does not where its endpoints do: those of session affinity are in no map.
    """
    if ruleset.service_metrics != "endpoint":
        return ruleset.service_metrics == "service"
    return any(pool.affinity_seconds is not None for pool, _ in pools_of(route, place))


def silenced(route: Route, place: Place, key: bytes) -> Items:
    """Return what counts the strangers whom policy Local leaves without an answer."""
    drops = isinstance(route.from_outside, Drop)
    return {Item(place.silent, key): PRESENT} if drops else {}


# --- keys -----------------------------------------------------------------------------------------


def frontend_key(frontend: Frontend) -> bytes:
    """Return the packed address, protocol and port; of a node port, only the last two."""
    ip = packed_ip(frontend.ip) if frontend.ip else b""
    return ip + port_key(frontend.proto, frontend.port)


@lru_cache(maxsize=8192)
def port_key(proto: Proto, port: int) -> bytes:
    return bytes([PROTO_NUMBERS[proto], 0, 0, 0]) + port.to_bytes(2, "big") + b"\0\0"


def endpoint_data(address: Address) -> bytes:
    return packed_ip(address.ip) + address.port.to_bytes(2, "big") + b"\0\0"


def hairpin_key(address: Address, proto: Proto) -> bytes:
    ip = packed_ip(address.ip)
    return ip + ip + port_key(proto, address.port)


def guarded(key: bytes, route: Route) -> Items:
    """Return what lets only the allowed sources in at a frontend, and whom it does not concern.

    Networks that overlap are united: the kernel's kind of set refuses to hold both.
    """
    assert route.allowed_sources is not None, "it is for few"
    items: Items = {Item("guarded", key): PRESENT, Item("denied", key): PRESENT}
    if isinstance(route.from_node, Pass):
        items[Item("passed", key)] = PRESENT
    for network in collapse_addresses(route.allowed_sources):  # type: ignore[type-var]  # a union is no TypeVar
        first = key + network.network_address.packed
        last = key + network.broadcast_address.packed
        items[Item("allowed", first + last)] = Element(first, key_end=last)
    return items


# --- endpoints ------------------------------------------------------------------------------------


def numbered_endpoints(
    route: Route, place: Place, key: bytes, before: Mapping[Item, Content]
) -> Items:
    """Return the numbered endpoints of a frontend: of all its pool, and of the local one apart."""
    items: Items = {}
    for pool, container in pools_of(route, place):
        if pool.affinity_seconds is None:
            addresses = [endpoint_data(address) for address in turn(pool)]
            slots = [Item(container, key + packed_slot(slot)) for slot in range(len(addresses))]
            old = [data_of(before.get(slot)) for slot in slots] if before else []
            items.update(zip(slots, settled(addresses, old), strict=True))
    return items


def data_of(content: Content | None) -> bytes | None:
    return content if isinstance(content, bytes) else None


def pools_of(route: Route, place: Place) -> Iterator[tuple[Pool, str]]:
    """Yield the pools of a route, with the map that has their endpoints."""
    route = for_strangers(route)
    shared, outside = pool_of(route.from_node), pool_of(route.from_outside)
    if shared is not None:
        yield shared, place.endpoints
    if outside is not None and outside != shared:
        yield outside, place.local_endpoints


def pool_of(action: Action) -> Pool | None:
    return action.pool if isinstance(action, Forward) else None


def local_backends(port: PortPlan) -> set[Address]:
    """Return the backends on this node: one may be given a connection of its own."""
    pools: dict[int, Pool] = {}
    for route in port.routes:
        for action in (route.from_node, route.from_outside):
            if isinstance(action, Forward):
                pools[id(action.pool)] = action.pool
    return {b.address for pool in pools.values() for b in pool.backends if b.is_local}


# --- chains ---------------------------------------------------------------------------------------


def whole_entrance(ruleset: Ruleset, port: PortPlan, route: Route, place: Place) -> Entrance:
    """Return the chain for a frontend that forwards at least one origin."""
    if not isinstance(route.from_node, Pass):
        return entrance_for(ruleset, port, route, place)
    pool = pool_of(route.from_outside)
    assert pool is not None, "somebody is forwarded"
    entrance = pool_entrance(port, pool, place, place.endpoints)
    if masquerades(route.from_outside):
        entrance = marked(ruleset, port.owner, entrance)
    return passed(ruleset, port.owner, entrance)


def for_strangers(route: Route) -> Route:
    """Return the route without those who pass by: nobody else is left to be told apart."""
    if not isinstance(route.from_node, Pass):
        return route
    return structs.replace(route, from_pod=route.from_outside, from_node=route.from_outside)


def entrance_for(ruleset: Ruleset, port: PortPlan, route: Route, place: Place) -> Entrance:
    """Return the chain for a frontend that concerns everybody.

    The masquerading of cluster IPs is a rule of the fixed part: it depends on the origin alone.
    """
    pool, outside = pool_of(route.from_node), pool_of(route.from_outside)
    assert pool is not None, "what the node cannot reach, nobody can"
    whole = pool_entrance(port, pool, place, place.endpoints)
    if route.kind == "ClusterIP":
        return whole
    if outside == pool and masquerades(route.from_pod):
        return marked(ruleset, port.owner, whole)
    container = place.endpoints if outside == pool else place.local_endpoints
    local = pool_entrance(port, outside, place, container) if outside else None
    if local is not None and masquerades(route.from_outside):
        local = marked(ruleset, port.owner, local)
    return local_only(ruleset, port.owner, whole, local, place)


def masquerades(action: Action) -> bool:
    return isinstance(action, Forward) and action.masquerade


def pool_entrance(port: PortPlan, pool: Pool, place: Place, container: str) -> Entrance:
    if pool.affinity_seconds is not None:
        return affine(port.owner, pool, pool.affinity_seconds, pool_word(port, pool))
    return shared_pick(place, container, pool.scheduler, turn_length(pool))


@lru_cache(maxsize=4096)
def shared_pick(place: Place, container: str, scheduler: Scheduler | None, count: int) -> Entrance:
    """Return the chain that picks one of ``count`` numbered endpoints."""
    word, kind = PICKS[scheduler]
    local = "-local" if container == place.local_endpoints else ""
    name = f"{place.prefix}pick{local}{word}-{count}"
    rule = Rule(name, (DnatPick(place.fields, Pick(kind, count), container),))
    return Entrance(name, ((CHAIN, name, (rule,)),))


def marked(ruleset: Ruleset, owner: ServicePortName, pick: Entrance) -> Entrance:
    """Return the chain that has connections masqueraded before they are given a backend."""
    name = own_name("external", pick, owner) if is_own(pick) else f"{pick.chain}-masq"
    rules = (
        Rule(name, (SetMark(ruleset.mark),)),
        Rule(name, (Verdict("goto", pick.chain),)),
    )
    return Entrance(name, (*pick.needs, (CHAIN, name, rules)))


def passed(ruleset: Ruleset, owner: ServicePortName, entrance: Entrance) -> Entrance:
    """Return the chain that lets this node's pods and processes pass by."""
    name = f"passed-{identity(owner)}" if is_own(entrance) else f"{entrance.chain}-passed"
    rules = (
        *insiders_return(ruleset, name),
        Rule(name, (Verdict("goto", entrance.chain),)),
    )
    return Entrance(name, (*entrance.needs, (CHAIN, name, rules)))


def insiders_return(ruleset: Ruleset, chain: str) -> tuple[Rule, ...]:
    """Return the rules that end a chain for what this node's pods and processes send."""
    from_pods = pod_match(ruleset)
    leave = Verdict("return")
    here = Rule(chain, (MatchLocal("saddr"), leave))
    return (here,) if from_pods is None else (Rule(chain, (from_pods, leave)), here)


def local_only(
    ruleset: Ruleset,
    owner: ServicePortName,
    whole: Entrance,
    local: Entrance | None,
    place: Place,
) -> Entrance:
    """Return the chain of external policy Local.

    This node's pods and its processes reach all endpoints, the latter masqueraded; others those
    of this node, and without any, nothing.
    """
    if is_own(whole):
        name = own_name("apart", whole, owner)
    else:
        here = local.chain.removeprefix(place.prefix) if local else "nothing"
        name = f"{place.prefix}local-{whole.chain.removeprefix(place.prefix)}-{here}"
    goto_whole = Verdict("goto", whole.chain)
    from_pods = pod_match(ruleset)
    rules = [
        *([Rule(name, (from_pods, goto_whole))] if from_pods is not None else []),
        Rule(name, (MatchLocal("saddr"), SetMark(ruleset.mark), goto_whole)),
        Rule(name, (Verdict("goto", local.chain) if local else DROP_SILENTLY,)),
    ]
    needs = (*whole.needs, *(local.needs if local else ()))
    return Entrance(name, (*needs, (CHAIN, name, tuple(rules))))


def pod_match(ruleset: Ruleset, *, inside: bool = True) -> Statement | None:
    if ruleset.pods is None:
        return None
    if isinstance(ruleset.pods, str):
        return MatchInput(ruleset.pods, same=inside)
    return MatchNetwork("saddr", ruleset.pods, inside=inside)


def pool_word(port: PortPlan, pool: Pool) -> str:
    """Tell the two pools of an owner apart: where they differ, one is that of a policy Local.

    That policy may be the internal one: then it is the cluster IP that has the local pool.
    """
    external = [route for route in port.routes if route.kind != "ClusterIP"]
    actions = [action for route in external for action in (route.from_node, route.from_outside)]
    pools = [found for action in actions if (found := pool_of(action)) is not None]
    whole = max(pools, key=lambda found: len(found.backends), default=pool)
    return "service" if pool == whole else "local"


def own_name(prefix: str, entrance: Entrance, owner: ServicePortName) -> str:
    """Return the name of an owner's chain that leads to another of its chains."""
    word, _, _ = entrance.chain.partition("-")
    local = "" if word == "service" else "local-"
    return f"{prefix}-{local}{identity(owner)}"


def is_own(entrance: Entrance) -> bool:
    """Say whether a chain is its owner's alone."""
    return "/" in entrance.chain
