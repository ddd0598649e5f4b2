"""A rule set that has every kind of object and statement, for either family."""

from ipaddress import ip_network
from typing import NamedTuple

from pyproxy.model import Address
from pyproxy.rules.nft import (
    Chain,
    Counter,
    Dnat,
    DnatPick,
    Element,
    Hook,
    Masquerade,
    MatchDnat,
    MatchInput,
    MatchLocal,
    MatchMark,
    MatchNetwork,
    MatchProto,
    MatchSet,
    MatchState,
    MatchSyn,
    MatchTransparent,
    Pick,
    PickVerdict,
    Reject,
    Rule,
    Set,
    SetMark,
    Table,
    ToggleMark,
    Tproxy,
    UpdateSet,
    Verdict,
    VerdictMap,
    packed_key,
)

FRONTEND = ("daddr", "l4proto", "dport")
NODE_PORT = ("l4proto", "dport")
HAIRPIN = ("saddr", "daddr", "l4proto", "dport")
ONE = "endpoint-2EIFRNLE-default/web/tcp/http__10.0.0.1/80"
TWO = "endpoint-5OJB2KTY-default/web/tcp/http__10.0.0.2/80"
OWNER = "service-ULMVA6XW-default/web/tcp/http"
LONG = "endpoint-ABCDEFGH-" + "n" * 200


def key_interval(types, values):
    """The first and the last key of those that the values span: one may be a network."""
    first = [v if isinstance(v, str | int) else str(v.network_address) for v in values]
    last = [v if isinstance(v, str | int) else str(v.broadcast_address) for v in values]
    return packed_key(types, first), packed_key(types, last)


class Ruleset(NamedTuple):
    table: Table
    chains: list
    sets: list
    rules: list
    elements: dict


ADDRESSES = {
    4: {
        "frontend": "10.96.0.1",
        "endpoints": ("10.0.0.1", "10.0.0.2"),
        "pods": ("10.244.0.0/16", "10.244.0.0/14", "10.0.0.7/32", "0.0.0.0/0"),
        "loopback": "127.0.0.0/8",
        "self": "127.0.0.1",
        "sources": ("192.0.2.0/24", "198.51.100.7/32", "203.0.113.128/25"),
        "anywhere": "0.0.0.0/0",
        "service_cidr": "10.96.0.0/13",
    },
    6: {
        "frontend": "fd00:96::1",
        "endpoints": ("fd00::1", "fd00::2"),
        "pods": ("fd00:244::/64", "fd00:244::/61", "fd00::7/128", "::/0"),
        "loopback": "::1/128",
        "self": "::1",
        "sources": ("2001:db8::/32", "2001:db9::7/128", "2001:db9:8000::/33"),
        "anywhere": "::/0",
        "service_cidr": "fd00:96::/112",
    },
}


def ruleset(family):
    table = Table(family, "pyproxy", "rules for Services, by pyproxy")
    return Ruleset(table, chains(), sets(family), rules(family), elements(family))


def sets(family):
    ip = "ipv4_addr" if family == 4 else "ipv6_addr"
    front = (ip, "inet_proto", "inet_service")
    node = ("inet_proto", "inet_service")
    affinity = {"flags": ("dynamic", "timeout"), "timeout_seconds": 10800}
    return [
        Set("service-ips", front, "verdict"),
        Set("endpoints", (*front, "slot"), (ip, "inet_service")),
        Set("local-endpoints", (*front, "slot"), (ip, "inet_service")),
        Set("node-ports", node, "verdict"),
        Set("node-port-endpoints", (*node, "slot"), (ip, "inet_service")),
        Set("no-endpoints", front, "verdict"),
        Set("no-endpoint-node-ports", node, "verdict"),
        Set("cluster-ips", (ip,)),
        Set("node-port-ips", (ip,)),
        Set("hairpin", (ip, *front)),
        Set("guarded", front, size=1000),
        Set("allowed", (*front, ip), flags=("interval",)),
        Set("affinity-1", (ip,), **affinity),
        Set("affinity-2", (ip,), flags=("dynamic", "timeout"), timeout_seconds=61, size=10),
        Set("ports", ("inet_service",)),
        Set("by-port", ("inet_service",), (ip,)),
    ]


def chains():
    regular = (
        "services, pick-1, pick-10, pick-10-masq, pick-rr-10, pick-sh-10, pick-sh-1, pick-local-10,"
        "node-pick-10, node-pick-sh-10, local-6-3, local-6-0, refuse, cluster-ips-check, guard,"
        "masquerade-marked, every-verdict, take"
    )
    hooks = {
        "filter-input": Hook("filter", "input", 0),
        "filter-forward": Hook("filter", "forward", 0),
        "filter-output": Hook("filter", "output", 0),
        "guard-prerouting": Hook("filter", "prerouting", -110),
        "guard-output": Hook("filter", "output", -110),
        "nat-prerouting": Hook("nat", "prerouting", -100),
        "nat-output": Hook("nat", "output", -100),
        "nat-postrouting": Hook("nat", "postrouting", 100),
    }
    names = [*(name.strip() for name in regular.split(",")), OWNER, ONE, TWO, LONG]
    return [Chain(name) for name in names] + [Chain(n, hook) for n, hook in hooks.items()]


def rules(family):
    return [
        Rule(chain, tuple(statements), comment)
        for chain, *statements, comment in [
            *service_rules(ADDRESSES[family]),
            *pick_rules(),
            *affinity_rules(ADDRESSES[family]),
            *filter_rules(ADDRESSES[family]),
            *hook_rules(),
        ]
    ]


def service_rules(addresses):
    cluster_ip = MatchSet(("daddr",), "cluster-ips")
    masquerade = SetMark(0x4000)
    for pods in addresses["pods"]:
        outside = MatchNetwork("saddr", ip_network(pods), inside=False)
        yield "services", cluster_ip, outside, masquerade, f"from outside {pods}"
    yield "services", cluster_ip, masquerade, ""
    yield "services", cluster_ip, MatchInput("cni0", same=False), masquerade, ""
    yield "services", cluster_ip, MatchInput("cali*", same=False), masquerade, ""
    yield "services", MatchInput("eth0"), MatchInput("eth*"), Counter(), ""
    yield "services", VerdictMap(FRONTEND, "service-ips"), ""
    not_loopback = MatchNetwork("daddr", ip_network(addresses["loopback"]), inside=False)
    node_ports = VerdictMap(NODE_PORT, "node-ports")
    yield "services", MatchLocal("daddr"), not_loopback, node_ports, ""
    yield "services", MatchSet(("daddr",), "node-port-ips"), node_ports, ""


def pick_rules():
    random, turn = Pick("random", 10), Pick("turn", 10)
    source = Pick("source", 10, seed=0x5A17)
    yield "pick-1", DnatPick(FRONTEND, Pick("random", 1), "endpoints"), ""
    yield "pick-10", DnatPick(FRONTEND, random, "endpoints"), ""
    yield "pick-10-masq", SetMark(0x4000), ""
    yield "pick-10-masq", Verdict("goto", "pick-10"), ""
    yield "pick-rr-10", DnatPick(FRONTEND, turn, "endpoints"), ""
    yield "pick-sh-10", DnatPick(FRONTEND, source, "endpoints"), ""
    yield "pick-sh-1", DnatPick(FRONTEND, Pick("source", 1, seed=1), "endpoints"), ""
    yield "pick-local-10", DnatPick(FRONTEND, random, "local-endpoints"), ""
    yield "node-pick-10", DnatPick(NODE_PORT, random, "node-port-endpoints"), ""
    yield "node-pick-sh-10", DnatPick(NODE_PORT, source, "node-port-endpoints"), ""


def affinity_rules(addresses):
    for number, chain in ((1, ONE), (2, TWO)):
        address = Address(addresses["endpoints"][number - 1], 80)
        name = f"affinity-{number}"
        yield OWNER, MatchSet(("saddr",), name), Verdict("goto", chain), ""
        yield chain, UpdateSet(name, "saddr"), ""
        yield chain, MatchProto("TCP"), Dnat(address), ""
    choices = (Verdict("goto", ONE), Verdict("goto", TWO))
    yield OWNER, PickVerdict(Pick("random", 2), choices), "default/web:http"
    yield OWNER, PickVerdict(Pick("turn", 3), (*choices, Verdict("drop"))), ""
    yield OWNER, PickVerdict(Pick("source", 2, seed=7), choices), ""
    yield LONG, MatchProto("SCTP"), Verdict("return"), ""


def filter_rules(addresses):
    pods = MatchNetwork("saddr", ip_network(addresses["pods"][0]))
    yield "local-6-3", pods, Verdict("goto", "pick-10"), ""
    yield "local-6-3", MatchLocal("saddr"), Verdict("goto", "pick-10-masq"), ""
    yield "local-6-3", Verdict("goto", "pick-local-10"), ""
    yield "local-6-0", Verdict("drop"), ""
    yield "refuse", MatchProto("TCP"), MatchSyn(), Reject(reset=True), ""
    yield "refuse", Reject(), ""
    cluster_ip = MatchSet(("daddr",), "cluster-ips")
    yield "cluster-ips-check", cluster_ip, Reject(), "port not of the Service"
    of_services = MatchNetwork("daddr", ip_network(addresses["service_cidr"]))
    yield "cluster-ips-check", of_services, Verdict("drop"), ""
    allowed = MatchSet((*FRONTEND, "saddr"), "allowed", inside=False)
    yield "guard", MatchSet(FRONTEND, "guarded"), allowed, Verdict("drop"), ""
    yield "masquerade-marked", ToggleMark(0x4000), ""
    yield "masquerade-marked", Counter(), Masquerade(), ""
    yield "take", MatchProto("TCP"), Tproxy(Address(addresses["self"], 40000)), ""
    yield "every-verdict", MatchProto("UDP"), Verdict("accept"), "é" * 63
    yield "every-verdict", MatchMark(0x8000), Verdict("jump", "refuse"), ""
    yield "every-verdict", MatchTransparent(), SetMark(0x2000), ""
    yield "every-verdict", Verdict("return"), ""


def hook_rules():
    new = MatchState("new")
    no_endpoints = VerdictMap(FRONTEND, "no-endpoints")
    yield "filter-input", new, VerdictMap(NODE_PORT, "no-endpoint-node-ports"), ""
    yield "filter-input", new, no_endpoints, ""
    yield "filter-forward", MatchState("invalid"), Verdict("drop"), ""
    for chain in ("filter-forward", "filter-output"):
        yield chain, new, no_endpoints, ""
        yield chain, new, Verdict("jump", "cluster-ips-check"), ""
    for chain in ("guard-prerouting", "guard-output"):
        yield chain, new, Verdict("jump", "guard"), ""
    for chain in ("nat-prerouting", "nat-output"):
        yield chain, Verdict("jump", "services"), ""
    yield "nat-postrouting", MatchMark(0x4000), Verdict("goto", "masquerade-marked"), ""
    yield "nat-postrouting", MatchDnat(), MatchSet(HAIRPIN, "hairpin"), Masquerade(), ""


def elements(family):
    addresses = ADDRESSES[family]
    types = {a_set.name: a_set.key for a_set in sets(family)}
    data = ("ipv4_addr" if family == 4 else "ipv6_addr", "inet_service")
    front = (addresses["frontend"], "TCP", 80)
    one, two = addresses["endpoints"]

    def key(name, *values):
        return packed_key(types[name], values)

    def slots(name, *start):
        targets = enumerate((one, two, one))
        return [
            Element(key(name, *start, 150 * slot), data=packed_key(data, (ip, 8000 + slot)))
            for slot, ip in targets
        ]

    goto = Verdict("goto", "pick-10")
    return {
        "service-ips": [
            Element(key("service-ips", *front), data=goto, comment="default/web:http"),
            Element(key("service-ips", one, "UDP", 53), data=Verdict("goto", OWNER)),
            Element(key("service-ips", one, "SCTP", 65535), data=goto),
        ],
        "endpoints": slots("endpoints", *front),
        "node-ports": [Element(key("node-ports", "UDP", 30053), data=Verdict("goto", "pick-10"))],
        "node-port-endpoints": slots("node-port-endpoints", "UDP", 30053),
        "no-endpoints": [
            Element(
                key("no-endpoints", *front), data=Verdict("goto", "refuse"), comment="default/gone"
            ),
            Element(key("no-endpoints", two, "TCP", 1), data=Verdict("drop")),
        ],
        "cluster-ips": [Element(key("cluster-ips", ip)) for ip in (addresses["frontend"], one)],
        "hairpin": [Element(key("hairpin", one, one, "TCP", 8080), comment="default/web")],
        "guarded": [Element(key("guarded", *front))],
        "allowed": [
            *(
                Element(*key_interval(types["allowed"], (*front, ip_network(source))))
                for source in addresses["sources"]
            ),
            Element(
                *key_interval(
                    types["allowed"], (one, "UDP", 53, ip_network(addresses["anywhere"]))
                ),
                comment="default/dns",
            ),
        ],
        "ports": [Element(key("ports", port)) for port in (80, 443)],
        "by-port": [Element(key("by-port", 80), data=packed_key(data[:1], (one,)))],
    }
