"""The fixed part of table ``pyproxy``: what is there without any Service.

kube-proxy's table has the same hooks in the same places. Packets of a known connection pass by:
NAT chains see a connection's first packet only, and the filter chains look for new ones first.
"""

from collections.abc import Mapping
from ipaddress import ip_network

from pyproxy.model import Family, Network
from pyproxy.rules.nft import (
    Chain,
    Field,
    Hook,
    Masquerade,
    MatchDnat,
    MatchLocal,
    MatchMark,
    MatchNetwork,
    MatchSet,
    MatchState,
    Reject,
    Rule,
    Set,
    SetMark,
    Statement,
    Table,
    ToggleMark,
    TypeName,
    Types,
    Verdict,
    VerdictMap,
)
from pyproxy.rules.nftables import (
    NODE_PORT,
    REFUSE,
    SERVICE,
    Ruleset,
    insiders_return,
    pod_match,
)

TABLE_NAME = "pyproxy"
LOOPBACK: Mapping[Family, Network] = {4: ip_network("127.0.0.0/8"), 6: ip_network("::1/128")}
FILTER, DSTNAT, SRCNAT = 0, -100, 100  # priorities
NEW = MatchState("new")
HAIRPIN: tuple[Field, ...] = ("saddr", "daddr", "l4proto", "dport")
GUARDED: tuple[Field, ...] = (*SERVICE.fields, "saddr")

HOOKS = (
    Chain("guard-prerouting", Hook("filter", "prerouting", DSTNAT - 10)),
    Chain("guard-output", Hook("filter", "output", DSTNAT - 10)),
    Chain("nat-prerouting", Hook("nat", "prerouting", DSTNAT)),
    Chain("nat-output", Hook("nat", "output", DSTNAT)),
    Chain("nat-postrouting", Hook("nat", "postrouting", SRCNAT)),
    Chain("filter-input", Hook("filter", "input", FILTER)),
    Chain("filter-forward", Hook("filter", "forward", FILTER)),
    Chain("filter-output", Hook("filter", "output", FILTER)),
)
CHAINS = (
    Chain("services"),
    Chain("guard"),
    Chain("guard-passed"),
    Chain("guard-strangers"),
    Chain("refuse"),
    Chain("refuse-strangers"),
    Chain("drop-strangers"),
    Chain("drop-by-policy"),
    Chain("cluster-ips-check"),
    Chain("masquerade-marked"),
    *HOOKS,
)


def table(family: Family) -> Table:
    return Table(family, TABLE_NAME)


def sets(family: Family) -> tuple[Set, ...]:
    """Return all sets and maps but those of session affinity."""
    ip: TypeName = "ipv4_addr" if family == 4 else "ipv6_addr"
    front: Types = (ip, "inet_proto", "inet_service")
    node_port: Types = ("inet_proto", "inet_service")
    endpoint: Types = (ip, "inet_service")
    return (
        Set(SERVICE.frontends, front, "verdict"),
        Set(SERVICE.endpoints, (*front, "slot"), endpoint),
        Set(SERVICE.local_endpoints, (*front, "slot"), endpoint),
        Set(SERVICE.refusals, front, "verdict"),
        Set(SERVICE.silent, front),
        Set(NODE_PORT.frontends, node_port, "verdict"),
        Set(NODE_PORT.endpoints, (*node_port, "slot"), endpoint),
        Set(NODE_PORT.local_endpoints, (*node_port, "slot"), endpoint),
        Set(NODE_PORT.refusals, node_port, "verdict"),
        Set(NODE_PORT.silent, node_port),
        Set("cluster-ips", (ip,)),
        Set("node-port-ips", (ip,)),
        Set("hairpin", (ip, ip, "inet_proto", "inet_service")),
        Set("guarded", front),
        Set("denied", front),
        Set("passed", front),
        Set("allowed", (*front, ip), flags=("interval",)),
    )


def rules(ruleset: Ruleset) -> tuple[Rule, ...]:
    """Return the rules of the fixed chains."""
    refusals = (NEW, VerdictMap(SERVICE.fields, SERVICE.refusals))
    at_node = node_port_match(ruleset)
    goto_marked = (MatchMark(ruleset.mark), Verdict("goto", "masquerade-marked"))
    check = (NEW, Verdict("jump", "cluster-ips-check"))
    return (
        *(Rule("services", statements) for statements in off_cluster(ruleset)),
        Rule("services", (VerdictMap(SERVICE.fields, SERVICE.frontends),)),
        Rule("services", (*at_node, VerdictMap(NODE_PORT.fields, NODE_PORT.frontends))),
        Rule(
            "guard",
            (
                MatchSet(SERVICE.fields, "guarded"),
                MatchSet(GUARDED, "allowed", inside=False),
                Verdict("goto", "guard-passed"),
            ),
        ),
        Rule(
            "guard-passed",
            (MatchSet(SERVICE.fields, "passed"), Verdict("goto", "guard-strangers")),
        ),
        *counted_drop("guard-passed", SERVICE.fields, "denied"),
        *insiders_return(ruleset, "guard-strangers"),
        *counted_drop("guard-strangers", SERVICE.fields, "denied"),
        Rule("refuse", (Reject(),)),
        *insiders_return(ruleset, "refuse-strangers"),
        Rule("refuse-strangers", (REFUSE,)),
        *insiders_return(ruleset, "drop-strangers"),
        Rule("drop-strangers", (Verdict("drop"),)),
        Rule("drop-by-policy", (MatchSet(SERVICE.fields, SERVICE.silent), Verdict("drop"))),
        *counted_drop("drop-by-policy", NODE_PORT.fields, NODE_PORT.silent),
        Rule(
            "cluster-ips-check",
            (MatchSet(("daddr",), "cluster-ips"), Reject()),
            comment="no such port of the Service",
        ),
        *(
            Rule("cluster-ips-check", (MatchNetwork("daddr", cidr), Verdict("drop")))
            for cidr in ruleset.service_cidrs
        ),
        Rule("masquerade-marked", (ToggleMark(ruleset.mark),)),
        Rule("masquerade-marked", (Masquerade(),)),
        Rule("guard-prerouting", (NEW, Verdict("jump", "guard"))),
        Rule("guard-output", (NEW, Verdict("jump", "guard"))),
        Rule("nat-prerouting", (Verdict("jump", "services"),)),
        Rule("nat-output", (Verdict("jump", "services"),)),
        Rule("nat-postrouting", goto_marked),
        Rule("nat-postrouting", (MatchDnat(), MatchSet(HAIRPIN, "hairpin"), Masquerade())),
        Rule("filter-input", (NEW, *at_node, VerdictMap(NODE_PORT.fields, NODE_PORT.refusals))),
        Rule("filter-input", refusals),
        # A segment outside the window would reach the client as it is, not from the Service's
        # address, and be answered by a reset.
        Rule("filter-forward", (MatchState("invalid"), Verdict("drop"))),
        Rule("filter-forward", refusals),
        Rule("filter-forward", check),
        Rule("filter-output", refusals),
        Rule("filter-output", check),
    )


def counted_drop(chain: str, fields: tuple[Field, ...], counted: str) -> tuple[Rule, ...]:
    """Return rules that drop everything, and of it count what has an element in the set."""
    drop = Verdict("drop")
    return (Rule(chain, (MatchSet(fields, counted), drop)), Rule(chain, (drop,)))


def off_cluster(ruleset: Ruleset) -> list[tuple[Statement, ...]]:
    """Return the rule that masquerades what comes to cluster IPs from beyond the cluster."""
    to_cluster_ip = MatchSet(("daddr",), "cluster-ips")
    mark = SetMark(ruleset.mark)
    if ruleset.masquerade_all:
        return [(to_cluster_ip, mark)]
    from_others = pod_match(ruleset, inside=False)
    return [] if from_others is None else [(to_cluster_ip, from_others, mark)]


def node_port_match(ruleset: Ruleset) -> tuple[Statement, ...]:
    """Return what a packet to a node port must match: an address of the node that serves them."""
    if ruleset.node_port_ips is not None:
        return (MatchSet(("daddr",), "node-port-ips"),)
    not_loopback = MatchNetwork("daddr", LOOPBACK[ruleset.family], inside=False)
    return (MatchLocal("daddr"), not_loopback)
