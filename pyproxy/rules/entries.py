"""What a mode has written, entry by entry and in words: so that two states can be compared.

Beside what Services have, there is a fixed part that depends on settings and on the node.

The number of an endpoint among the others of its frontend is left out: which it has depends on
all that went before, and means nothing. How many it has is its share.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from msgspec.structs import replace

from pyproxy.model import Family, Frontend
from pyproxy.rules import iptables, iptables_base, ipvs_base, nftables
from pyproxy.rules.ipvs import Content as IpvsContent
from pyproxy.rules.ipvs import Destination, LocalAddress, Server
from pyproxy.rules.listeners import Listener
from pyproxy.rules.listeners_text import treatments
from pyproxy.rules.nft import Chain, Element, Set, Table
from pyproxy.rules.nft_affinity import AFFINITY_SET, CHAIN
from pyproxy.rules.nft_file import Base
from pyproxy.rules.nft_text import element_text, rule_text

SLOT = "slot"
FIXED = "fixed chain"


class Entry(NamedTuple):
    """One thing that a mode writes. ``kind`` says where it is: a map, a chain, a kind of server."""

    kind: str
    name: str
    content: str = ""


def entries(family: Family, items: Mapping[Any, Any]) -> tuple[Entry, ...]:
    """Return the entries of a family's items, which may be of any mode, in order and each once.

    Owners share some; an endpoint that has several places has the number as its content.
    """
    places: Counter[Entry] = Counter()
    found: set[Entry] = set()
    for entry in each(family, items):
        if " -> " in entry.name and not entry.content:
            places[entry] += 1
        else:
            found.add(entry)
    found.update(e._replace(content=f"{n} places" if n > 1 else "") for e, n in places.items())
    return tuple(sorted(found))


def each(family: Family, items: Mapping[Any, Any]) -> Iterator[Entry]:
    sets = {a_set.name: a_set for a_set in ipvs_base.sets(family)}  # those of nftables, and more
    for key, content in items.items():
        match key:
            case nftables.Item():
                yield of_table(Table(family, ""), sets, key, content)
            case iptables.Item():
                yield of_iptables(key, content)
            case LocalAddress(ip=ip, only=only):
                yield Entry("local address", str(only or ip))
            case Destination(server=server, address=address):
                yield Entry("destination", f"{server} -> {address}", f"weight {content}")
            case Frontend():
                yield of_frontend(key, content)
            case _:
                raise AssertionError(f"no mode has items like {key}")


def fixed_of_table(base: Base, ruleset: nftables.Ruleset) -> tuple[Entry, ...]:
    """Return the fixed part of a table of nf_tables."""
    table = base.table(ruleset.family)
    rules: dict[str, list[str]] = {chain.name: [hook_text(chain)] for chain in base.CHAINS}
    for rule in base.rules(ruleset):
        rules[rule.chain].append(rule_text(table, rule))
    found = [Entry(FIXED, name, "; ".join(filter(None, texts))) for name, texts in rules.items()]
    found += [Entry("node-port-ips", ip) for ip in ruleset.node_port_ips or ()]
    return tuple(sorted(found))


def fixed_of_iptables(ruleset: iptables.Ruleset) -> tuple[Entry, ...]:
    """Return the fixed part of the tables, but for what the kernel or a program decides."""
    plain = replace(ruleset, drop_invalid=True, random_fully=True, counted=False)
    found = [
        Entry(FIXED, f"{table} {chain}", "; ".join((*before, *after)))
        for (table, chain), (before, after) in iptables_base.fixed_chains(plain).items()
    ]
    jumps: dict[str, list[str]] = {}
    for table, chain, rule in iptables_base.jumps(plain):
        jumps.setdefault(f"{table} {chain}", []).append(rule)
    found += [Entry("jumps", name, "; ".join(rules)) for name, rules in jumps.items()]
    return tuple(sorted(found))


def hook_text(chain: Chain) -> str:
    return " ".join(map(str, chain.hook)) if chain.hook is not None else ""


def of_table(
    table: Table, sets: Mapping[str, Set], item: nftables.Item, content: IpvsContent
) -> Entry:
    if item.container == CHAIN:
        assert isinstance(content, tuple), "a chain is its rules"
        return Entry(CHAIN, str(item.key), "; ".join(rule_text(table, rule) for rule in content))
    if item.container == AFFINITY_SET:
        return Entry("set of clients", str(item.key))
    a_set = sets[item.container]
    assert isinstance(item.key, bytes), "only chains and sets go by names"
    element = content if isinstance(content, Element) else Element(item.key, data=content or None)  # type: ignore[arg-type]  # no other content is left
    text = element_text(a_set, element)
    name, _, data = text.partition(" : ")
    if SLOT in a_set.key:
        return Entry(a_set.name, f"{name.rpartition(' . ')[0]} -> {data}")
    return Entry(a_set.name, name.partition(" comment ")[0].removesuffix(" counter"), data)


def of_iptables(item: iptables.Item, content: iptables.Content) -> Entry:
    if item.table == iptables.SETS:
        return Entry(f"ipset {item.chain}", item.match)
    if not item.match:
        return Entry(f"{item.table} chain", item.chain, "; ".join(content))
    return Entry(f"{item.table} {item.chain}", item.match, str(content))


def of_frontend(frontend: Frontend, content: Server | Listener) -> Entry:
    if isinstance(content, Server):
        return Entry("virtual server", str(frontend), server_text(content))
    return Entry("listener", str(frontend), "; ".join(map(str, treatments(content.route))))


def server_text(server: Server) -> str:
    seconds = server.affinity_seconds
    return f"scheduler {server.scheduler}" + (f", persistent {seconds} s" if seconds else "")
