"""All that mode iptables has for a plan, as a file: for people to read, not for packets."""

from collections.abc import Mapping

from pyproxy.rules.iptables import CLUSTER_IPS, HAIRPIN, SETS, Content, Item, Ruleset, set_name
from pyproxy.rules.iptables_base import fixed_chains, jumps
from pyproxy.rules.iptables_layout import chains_of
from pyproxy.rules.iptables_text import founded, rewritten

TYPES: Mapping[str, str] = {CLUSTER_IPS: "hash:ip,port", HAIRPIN: "hash:ip,port,ip"}


def files(ruleset: Ruleset, items: Mapping[Item, Content]) -> str:
    """Return the input of ``iptables-restore --noflush``; the sets for ``ipset`` are comments."""
    family = "inet" if ruleset.family == 4 else "inet6"
    lines = [f"# for {'iptables' if ruleset.family == 4 else 'ip6tables'}-restore --noflush"]
    for name, kind in TYPES.items():
        own = set_name(name, ruleset.family)
        lines.append(f"# ipset create {own} {kind} family {family}")
        members = sorted(i.match for i in items if i.table == SETS and i.chain == name)
        lines += [f"# ipset add {own} {member}" for member in dict.fromkeys(members)]
    lines += founded({}, fixed_chains(ruleset), jumps(ruleset))
    lines += [line.text for line in rewritten(chains_of(ruleset, dict(items)))]
    return "\n".join([*lines, ""])
