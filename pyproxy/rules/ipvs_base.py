"""The fixed part of table ``pyproxy-ipvs``: that of table ``pyproxy``, but for two things.

Virtual servers take packets after the filters of the input hook, where the node's own sockets
would: a port of a cluster IP that nobody serves must be refused there. And connection tracking
does not call what they do a DNAT.
"""

from pyproxy.model import Family
from pyproxy.rules import nft_base
from pyproxy.rules.ipvs import SERVED
from pyproxy.rules.nft import (
    Chain,
    Masquerade,
    MatchDnat,
    MatchLocal,
    MatchNetwork,
    MatchSet,
    Reject,
    Rule,
    Set,
    Table,
    Types,
    Verdict,
)
from pyproxy.rules.nftables import SERVICE, Ruleset

TABLE_NAME = "pyproxy-ipvs"
CHECK = "undefined-ports-check"
CHAINS = (*nft_base.CHAINS, Chain(CHECK))


def table(family: Family) -> Table:
    return Table(family, TABLE_NAME)


def sets(family: Family) -> tuple[Set, ...]:
    front: Types = ("ipv4_addr" if family == 4 else "ipv6_addr", "inet_proto", "inet_service")
    return (*nft_base.sets(family), Set(SERVED, front))


def rules(ruleset: Ruleset) -> tuple[Rule, ...]:
    """Return the rules of the fixed chains."""
    shared = (r for r in nft_base.rules(ruleset) if MatchDnat() not in r.statements)
    return (
        *shared,
        # What the node sends to itself is no hairpin; through a Service it has the mark.
        Rule("nat-postrouting", (MatchLocal("saddr"), Verdict("return"))),
        Rule("nat-postrouting", (MatchSet(nft_base.HAIRPIN, "hairpin"), Masquerade())),
        Rule("filter-input", (nft_base.NEW, Verdict("jump", CHECK))),
        Rule(CHECK, (MatchSet(SERVICE.fields, SERVED), Verdict("return"))),
        Rule(
            CHECK,
            (MatchSet(("daddr",), "cluster-ips"), Reject()),
            comment="no such port of the Service",
        ),
        # A deleted Service's address, while its last connections keep it local.
        *(
            Rule(CHECK, (MatchNetwork("daddr", cidr), Verdict("drop")))
            for cidr in ruleset.service_cidrs
        ),
    )
