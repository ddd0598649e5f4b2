"""All that a mode has in its table, as a file: for people to read, and for ``nft -f``."""

from collections.abc import Mapping
from typing import Protocol

from pyproxy.model import Family
from pyproxy.rules import nft_text
from pyproxy.rules.nft import Chain, Element, Rule, Set, Table, packed_ip
from pyproxy.rules.nft_affinity import Content
from pyproxy.rules.nftables import Item, Ruleset


class Base(Protocol):
    """The fixed part of a table: a module."""

    @property
    def CHAINS(self) -> tuple[Chain, ...]: ...
    def table(self, family: Family) -> Table: ...
    def sets(self, family: Family) -> tuple[Set, ...]: ...
    def rules(self, ruleset: Ruleset) -> tuple[Rule, ...]: ...


def file(base: Base, ruleset: Ruleset, items: Mapping[Item, Content]) -> str:
    """Return a file that replaces the table of one family."""
    chains: dict[str, tuple[Rule, ...]] = {}
    affinity_sets: dict[str, Set] = {}
    elements: dict[str, dict[bytes, Element]] = {
        "node-port-ips": {
            (key := packed_ip(ip)): Element(key) for ip in ruleset.node_port_ips or ()
        }
    }
    for item, content in items.items():
        if isinstance(content, tuple):
            chains[str(item.key)] = content
        elif isinstance(content, Set):
            affinity_sets[content.name] = content
        else:
            element = element_of(item, content)
            key = element.key + (element.key_end or b"")
            elements.setdefault(item.container, {})[key] = element
    names = sorted(chains)
    return nft_text.text(
        base.table(ruleset.family),
        [*base.CHAINS, *map(Chain, names)],
        [*base.sets(ruleset.family), *(affinity_sets[name] for name in sorted(affinity_sets))],
        [*base.rules(ruleset), *(rule for name in names for rule in chains[name])],
        {name: tuple(found.values()) for name, found in elements.items()},
    )


def element_of(item: Item, content: bytes | Element) -> Element:
    if isinstance(content, Element):
        return content
    assert isinstance(item.key, bytes), "only chains and sets go by names"
    return Element(item.key, data=content or None)
