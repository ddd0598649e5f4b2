"""What iptables and its sets contain for a plan: the items of each owner.

Chains have kube-proxy's names where they mean the same, so that each program can remove what the
other left. Endpoints are DNAT rules right in the chain of their pool; only session affinity
needs a chain for each. A rule is written as ``iptables-save`` prints it, so that two rules are
the same exactly if their texts are.
"""

from base64 import b32encode
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

from msgspec import Struct

from pyproxy.balancer import BY_CLIENT, proportions, turn_of
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
    Reject,
    Route,
    ServicePortName,
    family_of,
)
from pyproxy.rules.iptables_source import SPAN, source_below

SERVICES = "KUBE-SERVICES"
EXTERNAL = "KUBE-EXTERNAL-SERVICES"
NODE_PORTS = "KUBE-NODEPORTS"
FIREWALL = "KUBE-PROXY-FIREWALL"
POSTROUTING = "KUBE-POSTROUTING"
MARK_MASQ = "KUBE-MARK-MASQ"
SETS = "ipset"  # stands where a table does, for members of sets
CLUSTER_IPS = "PYPROXY-CLUSTER-IPS"
HAIRPIN = "PYPROXY-HAIRPIN"
LONGEST_TURN = 256  # rules of a pool in weighted round robin; longer ones go by chance
ONE = 1 << 31  # the kernel's probability of 1
REJECT_WITH: Mapping[Family, str] = {4: "icmp-port-unreachable", 6: "icmp6-port-unreachable"}


class Item(NamedTuple):
    """A chain, a rule of a chain that owners share, or a member of a set.

    ``match`` is empty for a whole chain. ``owner`` is set only where others may want the same.
    """

    table: str
    chain: str
    match: str = ""
    owner: ServicePortName | None = None


Content = str | tuple[str, ...]  # a rule's target; a chain's rules
Items = dict[Item, Content]
MEMBER = ""  # the content of a member of a set


class Ruleset(Struct, frozen=True):
    """What the rules of one family depend on besides the plan.

    ``pods`` recognises connections of this node's pods: a network of theirs, or an interface's
    name, with a plus sign at the end for a prefix; None if nothing does.
    """

    family: Family
    mark: int = 0x4000
    pods: Network | str | None = None
    masquerade_all: bool = False
    node_port_ips: tuple[str, ...] | None = None  # None: every address of the node
    localhost_node_ports: bool = False
    drop_invalid: bool = True
    random_fully: bool = True
    counted: bool = False  # by objects of nfacct, which have to be there
    commented: bool = True  # each Service's chain says whose it is


class Pools(NamedTuple):
    """The pools of an owner: at most two differ, which kube-proxy calls SVC and SVL."""

    suffix: str  # of the owner's chains
    cluster: Pool | None
    local: Pool | None

    def chain(self, pool: Pool) -> str:
        return f"KUBE-SVC-{self.suffix}" if pool == self.cluster else f"KUBE-SVL-{self.suffix}"


def compile_owner(ruleset: Ruleset, port: PortPlan, before: Mapping[Item, Content]) -> Items:
    """Return the items of one owner."""
    pools = pools_of(port)
    items: Items = {}
    for pool in dict.fromkeys((pools.cluster, pools.local)):
        if pool is not None:
            items |= pool_chains(ruleset, port.owner, pool, pools.chain(pool))
            items |= hairpins(port.owner, pool)
    chains = external_chains(port)
    for route in port.routes:
        external = chains.get(route.frontend)
        if external is not None:
            items[Item("nat", external)] = external_rules(ruleset, route, pools)
        items |= entrance(ruleset, route, pools, external)
        items |= refusal(ruleset, port.owner, route)
    if port.health is not None:
        match = f"-p tcp -m tcp --dport {port.health.port}"
        items[Item("filter", NODE_PORTS, match)] = "ACCEPT"
    return items


# --- names ----------------------------------------------------------------------------------------


def suffix_of(owner: ServicePortName) -> str:
    return hashed(f"{owner}{owner.proto.lower()}")


@lru_cache(maxsize=8192)
def hashed(text: str) -> str:
    return b32encode(sha256(text.encode()).digest()[:10]).decode()  # 16 characters


def external_chains(port: PortPlan) -> dict[Frontend, str]:
    """Return the chain of each external frontend that forwards.

    They share one, but for load balancer IPs that treat pods and the node in a way of their own.
    """
    found = [r for r in port.routes if r.kind != "ClusterIP" and forwards(r)]
    if not found:
        return {}
    usual = next((insider_actions(r) for r in found if r.kind != "LoadBalancer"), None)
    shared = f"KUBE-EXT-{suffix_of(port.owner)}"
    apart = f"KUBE-EXT-{hashed(f'{port.owner}{port.owner.proto.lower()} balanced')}"
    return {
        route.frontend: shared if usual in (None, insider_actions(route)) else apart
        for route in found
    }


def insider_actions(route: Route) -> tuple[Action, Action]:
    return route.from_pod, route.from_node


def endpoint_chain(owner: ServicePortName, address: Address) -> str:
    return f"KUBE-SEP-{hashed(f'{owner}{owner.proto.lower()}{address}')}"


def set_name(name: str, family: Family) -> str:
    return name if family == 4 else f"{name}-6"


# --- pools ----------------------------------------------------------------------------------------


def pools_of(port: PortPlan) -> Pools:
    """Tell an owner's pools apart: that of the cluster is what an external policy does not cut."""
    external = [route for route in port.routes if route.kind != "ClusterIP"]
    external.sort(key=lambda route: route.kind == "LoadBalancer")  # whose insiders may go apart
    whole = [r.from_outside if masquerades(r.from_outside) else r.from_node for r in external]
    every = [a for r in port.routes for a in (r.from_node, r.from_outside)]
    found = [pool for a in (*whole, *every) if (pool := pool_of(a)) is not None]
    cluster = next(iter(found), None)
    return Pools(
        suffix_of(port.owner), cluster, next((pool for pool in found if pool != cluster), None)
    )


def masquerades(action: Action) -> bool:
    return isinstance(action, Forward) and action.masquerade


def pool_of(action: Action) -> Pool | None:
    return action.pool if isinstance(action, Forward) else None


def forwards(route: Route) -> bool:
    return isinstance(route.from_node, Forward) or isinstance(route.from_outside, Forward)


def pool_chains(ruleset: Ruleset, owner: ServicePortName, pool: Pool, chain: str) -> Items:
    """Return the chain that gives a connection a backend, and those of the backends it has."""
    proto = owner.proto.lower()
    items: Items = {}
    lines: list[str] = []
    targets: dict[Address, str] = {}
    for address in (b.address for b in pool.backends):
        if pool.affinity_seconds is None:
            targets[address] = f"-j DNAT --to-destination {address}"
            continue
        name = endpoint_chain(owner, address)
        targets[address] = f"-j {name}"
        recent = f"--name {name} --mask {mask_of(address.ip)} --rsource"
        seconds = f"--seconds {pool.affinity_seconds} --reap"
        lines.append(f"-m recent --rcheck {seconds} {recent} -j {name}")
        dnat = f"-p {proto} -m recent --set {recent} -j DNAT --to-destination {address}"
        items[Item("nat", name)] = (dnat,)
    prefix = f"-p {proto} " if pool.affinity_seconds is None else ""
    for match, address in picks(pool, owner, comment(str(owner)) if ruleset.commented else ""):
        lines.append(f"{prefix}{match}{targets[address]}")
    items[Item("nat", chain)] = tuple(lines)
    return items


def mask_of(ip: str) -> str:
    return "255.255.255.255" if ":" not in ip else "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"


def picks(pool: Pool, owner: ServicePortName, note: str = "") -> Iterator[tuple[str, Address]]:
    """Yield, for each rule in order, what makes it match its share, and its backend.

    Each rule sees only the connections that those before it left. The last one takes all, and
    has the note: whose chain this is, said where fewest connections pay for it.
    """
    if pool.scheduler in BY_CLIENT:
        *matches, last = by_source(pool, owner)
    elif pool.scheduler in ("rr", "wrr") and has_short_turn(pool):
        *matches, last = in_turn(pool)
    else:
        *matches, last = at_random(pool)
    yield from matches
    yield note, last[1]


def has_short_turn(pool: Pool) -> bool:
    """Say whether a turn with exact shares takes few rules: by chance each backend has one."""
    return sum(proportions(pool)) <= max(LONGEST_TURN, len(pool.backends))


def in_turn(pool: Pool) -> Iterator[tuple[str, Address]]:
    turn = turn_of(pool, longest=LONGEST_TURN)
    for index, address in enumerate(turn):
        yield f"-m statistic --mode nth --every {len(turn) - index} --packet 0 ", address


def by_source(pool: Pool, owner: ServicePortName) -> Iterator[tuple[str, Address]]:
    """Give each backend its share of all hashes; other owners spread the same clients otherwise."""
    seed = int.from_bytes(sha256(suffix_of(owner).encode()).digest()[:4], "big")
    total = sum(b.weight for b in pool.backends)
    end = 0
    for backend in pool.backends:
        end += backend.weight
        bound = min(end * SPAN // total, SPAN - 1)
        yield source_below(bound, seed, family_of(backend.address.ip)), backend.address


def at_random(pool: Pool) -> Iterator[tuple[str, Address]]:
    left = sum(b.weight for b in pool.backends)
    for backend in pool.backends:
        share = probability(backend.weight, left)
        left -= backend.weight
        yield f"-m statistic --mode random --probability {share} ", backend.address


@lru_cache(maxsize=4096)
def probability(part: int, whole: int) -> str:
    """Return the text of a probability, which the kernel knows in steps of 2**-31."""
    return f"{round(part / whole * ONE) / ONE:.11f}"


def hairpins(owner: ServicePortName, pool: Pool) -> Items:
    """Return the members by which an endpoint of this node is known that reaches itself."""
    proto = owner.proto.lower()
    return {
        Item(
            SETS, HAIRPIN, f"{b.address.ip},{proto}:{b.address.port},{b.address.ip}", owner
        ): MEMBER
        for b in pool.backends
        if b.is_local
    }


# --- frontends ------------------------------------------------------------------------------------


def entrance(ruleset: Ruleset, route: Route, pools: Pools, external: str | None) -> Items:
    """Return what leads connections to a frontend into the owner's chains."""
    match = frontend_match(route.frontend)
    if external is None:
        pool = pool_of(route.from_node)
        if pool is None:
            return {}
        ip, port, proto = route.frontend
        member = Item(SETS, CLUSTER_IPS, f"{ip},{proto.lower()}:{port}")
        return {Item("nat", SERVICES, match): pools.chain(pool), member: MEMBER}
    if route.kind == "NodePort":
        return {Item("nat", NODE_PORTS, match): external}
    if route.allowed_sources is None:
        return {Item("nat", SERVICES, match): external}
    passing = insiders(ruleset, "-j RETURN") if isinstance(route.from_node, Pass) else []
    allowed = [f"-s {n} -j {external}" for n in unique(route.allowed_sources)]
    return {
        Item("nat", SERVICES, match): f"KUBE-FW-{pools.suffix}",
        Item("nat", f"KUBE-FW-{pools.suffix}"): (*passing, *allowed),
        Item("filter", FIREWALL, concerned(ruleset, route)): "DROP",
    }


def unique(networks: Iterable[Network]) -> Iterable[Network]:
    return dict.fromkeys(networks)


def frontend_match(frontend: Frontend, note: str = "") -> str:
    proto = frontend.proto.lower()
    where = f"-d {frontend.ip}/{32 if ':' not in frontend.ip else 128} " if frontend.ip else ""
    return f"{where}-p {proto} {note}-m {proto} --dport {frontend.port}"


def concerned(ruleset: Ruleset, route: Route, note: str = "") -> str:
    """Return the match of a frontend for those who do not pass by it."""
    match = frontend_match(route.frontend, note)
    if not isinstance(route.from_node, Pass):
        return match
    strangers = " -m addrtype ! --src-type LOCAL"
    if ruleset.pods is None:
        return match + strangers
    if isinstance(ruleset.pods, str):
        where, _, rest = match.partition(" -p ")
        return f"{where} ! -i {ruleset.pods} -p {rest}{strangers}"
    return f"! -s {ruleset.pods} {match}{strangers}"


def external_rules(ruleset: Ruleset, route: Route, pools: Pools) -> tuple[str, ...]:
    """Return the rules for connections to external frontends, all kinds alike.

    With policy Local, this node's pods and its processes reach all endpoints, the latter
    masqueraded; others those of this node, and without any the filter table drops them.
    """
    inside, outside = pool_of(route.from_node), pool_of(route.from_outside)
    if inside is not None and inside == outside and masquerades(route.from_pod):
        return (f"-j {MARK_MASQ}", f"-j {pools.chain(inside)}")
    lines: list[str] = []
    if isinstance(route.from_node, Pass):
        lines += insiders(ruleset, "-j RETURN")
    elif inside is not None:
        lines += insiders(ruleset, f"-j {pools.chain(inside)}", f"-j {MARK_MASQ}")
    if masquerades(route.from_outside):
        lines.append(f"-j {MARK_MASQ}")
    if outside is not None:
        lines.append(f"-j {pools.chain(outside)}")
    return tuple(lines)


def insiders(ruleset: Ruleset, target: str, *first_of_node: str) -> list[str]:
    """Return rules for what this node's pods and, after others, its processes send."""
    lines = [f"{from_pods(ruleset)} {target}"] if ruleset.pods is not None else []
    return lines + [f"-m addrtype --src-type LOCAL {to}" for to in (*first_of_node, target)]


def from_pods(ruleset: Ruleset) -> str:
    return f"-i {ruleset.pods}" if isinstance(ruleset.pods, str) else f"-s {ruleset.pods}"


def refusal(ruleset: Ruleset, owner: ServicePortName, route: Route) -> Items:
    """Return the rule of table filter for what a frontend does not forward.

    Connections that were given a backend do not match it: their destination is another by then.
    """
    if isinstance(route.from_outside, Reject):
        why, target = "has no endpoints", f"REJECT --reject-with {REJECT_WITH[ruleset.family]}"
    elif isinstance(route.from_outside, Drop):
        why, target = "has no local endpoints", "DROP"
    else:
        return {}
    match = concerned(ruleset, route, comment(f"{owner} {why}"))
    chain = SERVICES if route.kind == "ClusterIP" else EXTERNAL
    if route.kind == "NodePort":
        match += " -m addrtype --dst-type LOCAL"
    items: Items = {Item("filter", chain, match): target}
    if route.allowed_sources is not None and target == "DROP" and not forwards(route):
        items[Item("filter", FIREWALL, concerned(ruleset, route))] = "DROP"
    return items


def comment(text: str) -> str:
    """Return the match that says something to people. All our texts have a sign to be quoted."""
    return f'-m comment --comment "{text}" '
