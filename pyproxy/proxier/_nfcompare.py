"""Looks whether a table of nf_tables holds certain items, and tells how what it holds differs."""

from collections.abc import Iterator, Mapping
from contextlib import closing

from pyproxy.proxier._nfnetlink import NfTables
from pyproxy.proxier._nfpack import RuleForm, rule_form, set_form
from pyproxy.reconcile import Difference
from pyproxy.rules.nft import Element, Set, Table
from pyproxy.rules.nft_affinity import AFFINITY_SET, CHAIN, Content
from pyproxy.rules.nft_file import Base
from pyproxy.rules.nft_text import element_text, rule_text
from pyproxy.rules.nftables import PRESENT, Item


def compared(table: Table, base: Base, wanted: Mapping[Item, Content]) -> tuple[Difference, ...]:
    """Return the items that the kernel does not hold so. Raises ``NfError`` and ``OSError``."""
    by_container: dict[str, dict[bytes | str, Content]] = {}
    for item, content in wanted.items():
        by_container.setdefault(item.container, {})[item.key] = content
    with closing(NfTables()) as nf:
        return tuple(differing(nf, table, base, by_container))


def differing(
    nf: NfTables,
    table: Table,
    base: Base,
    wanted: Mapping[str, Mapping[bytes | str, Content]],
) -> Iterator[Difference]:
    there = nf.sets(table)
    known = {a_set.name: a_set for a_set in base.sets(table.family)}
    for container, contents in wanted.items():
        if container == CHAIN:
            yield from differing_chains(nf, table, contents)
        elif container == AFFINITY_SET:
            for key, content in contents.items():
                name = str(key)
                assert isinstance(content, Set), "a set is its declaration"
                if there.get(name) != set_form(table, content):
                    held = "another declaration" if name in there else None
                    yield Difference(f"set {name}", "a set of clients", held)
        elif container not in there:
            yield Difference(f"set {container}", f"{len(contents)} elements", None)
        else:
            yield from differing_elements(nf, table, known[container], contents)


def differing_elements(
    nf: NfTables, table: Table, a_set: Set, contents: Mapping[bytes | str, Content]
) -> Iterator[Difference]:
    held = {
        element.key + (element.key_end or b""): element
        for element in nf.elements(table, a_set.name)
    }
    for key, content in contents.items():
        assert isinstance(key, bytes), "only chains and sets go by names"
        element = held.get(key)
        if element is None or plain(element) != content:
            yield Difference(
                f"element of {a_set.name}",
                element_text(a_set, whole(key, content)),
                element_text(a_set, element) if element is not None else None,
            )


def differing_chains(
    nf: NfTables, table: Table, contents: Mapping[bytes | str, Content]
) -> Iterator[Difference]:
    held: dict[str, list[RuleForm]] = {chain.name: [] for chain in nf.chains(table)}
    for rule in nf.rules(table):
        held[rule.form.chain].append(rule.form)
    for key, content in contents.items():
        name = str(key)
        assert isinstance(content, tuple), "a chain is its rules"
        forms = held.get(name)
        if forms != [rule_form(table, rule) for rule in content]:
            text = "; ".join(rule_text(table, rule) for rule in content)
            there = f"{len(forms)} rules, not these" if forms is not None else None
            yield Difference(f"chain {name}", text, there)


def whole(key: bytes, content: Content) -> Element:
    if isinstance(content, Element):
        return content
    assert isinstance(content, bytes), "rules are in chains"
    return Element(key, data=content or None)


def plain(element: Element) -> Content:
    """Return an element as an item's content: just its data, where it is nothing else."""
    if isinstance(element.data, bytes) and not element.comment:
        return element.data
    if element.data is None and element.key_end is None and not element.comment:
        return PRESENT
    return element
