"""Small tables of nf_tables: each is made whole in one transaction, and looked at as a whole."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import NamedTuple, Protocol

from msgspec.structs import replace

from pyproxy.proxier import _nfpack as pack
from pyproxy.proxier._nfcompare import differing_chains, differing_elements, plain
from pyproxy.proxier._nfnetlink import NfError, NfTables
from pyproxy.proxier._nfpack import set_form
from pyproxy.reconcile import ApplyError, Difference
from pyproxy.rules.nft import Chain, Element, Rule, Set, Table
from pyproxy.rules.nft_affinity import Content


class Whole(NamedTuple):
    """A table and all that shall be in it. Only sets that are named in ``elements`` are ours."""

    table: Table
    chains: Sequence[Chain]
    rules: Sequence[Rule]
    sets: Sequence[Set] = ()
    elements: Mapping[str, Sequence[Element]] = {}  # by the name of the set; else the kernel fills

    def made(self) -> list[bytes]:
        """Return the messages that make it, whether there is one of this name or not."""
        return [pack.new_table(self.table), pack.delete_table(self.table), *self.added()]

    def added(self) -> list[bytes]:
        """Return the messages that add everything to a table, be it there or not."""
        messages = [pack.new_table(self.table)]
        messages += [pack.new_chain(self.table, chain) for chain in self.chains]
        messages += [pack.new_set(self.table, a_set) for a_set in self.sets]
        messages += [pack.new_rule(self.table, rule) for rule in self.rules]
        for name, elements in self.elements.items():
            messages += pack.new_elements(self.table, name, elements)
        return messages


class Tabled(Protocol):
    """Who has tables besides its main business."""

    def tables(self) -> Sequence[Whole]:
        """Return the tables that are there, unless others have changed them."""
        ...

    def renew(self) -> None:
        """Take note that they have: at the latest the end of the sync makes them anew."""
        ...


async def changed_tables(parts: Iterable[Tabled]) -> Mapping[str, tuple[Difference, ...]]:
    """Return how tables are not as they should be, by their names. Raises ``ApplyError``."""
    tables = [whole for part in parts for whole in part.tables()]
    try:
        return await asyncio.to_thread(differing, tables) if tables else {}
    except (NfError, OSError) as error:
        raise ApplyError(f"cannot list tables: {error}") from error


async def renewed(parts: Sequence[Tabled]) -> Mapping[str, int]:
    """Have tables that others changed made anew; return how much it was, by their names.

    Raises ``ApplyError``.
    """
    found = await changed_tables(parts)
    for part in parts:
        if any(whole.table.name in found for whole in part.tables()):
            part.renew()
    return {name: len(differences) for name, differences in found.items()}


def differing(wholes: Iterable[Whole]) -> dict[str, tuple[Difference, ...]]:
    """Return, by the name of each table that others have changed, what is not as it should be.

    Raises ``NfError`` and ``OSError``.
    """
    found = {}
    for whole in wholes:
        with closing(NfTables()) as nf:
            if differences := tuple(differences_of(nf, whole)):
                found[whole.table.name] = differences
    return found


def differences_of(nf: NfTables, whole: Whole) -> Iterator[Difference]:
    table = whole.table
    there = {chain.name: chain for chain in nf.chains(table)}
    if not there:
        yield Difference(f"table {table.name}", f"{len(whole.rules)} rules", None)
        return
    for difference in parts_differing(nf, whole, there):
        yield replace(difference, entry=f"table {table.name}, {difference.entry}")


def parts_differing(nf: NfTables, whole: Whole, there: Mapping[str, Chain]) -> Iterator[Difference]:
    rules: dict[bytes | str, tuple[Rule, ...]] = {
        chain.name: tuple(rule for rule in whole.rules if rule.chain == chain.name)
        for chain in whole.chains
    }
    for chain in whole.chains:
        if there.get(chain.name, chain) != chain:
            yield Difference(f"hook of chain {chain.name}", "as it was made", "another")
    yield from differing_chains(nf, whole.table, rules)
    forms = nf.sets(whole.table)
    for a_set in whole.sets:
        if forms.get(a_set.name) != set_form(whole.table, a_set):
            held = "another declaration" if a_set.name in forms else None
            yield Difference(f"set {a_set.name}", "as it was made", held)
        elif elements := whole.elements.get(a_set.name):
            contents: dict[bytes | str, Content] = {
                element.key + (element.key_end or b""): plain(element) for element in elements
            }
            yield from differing_elements(nf, whole.table, a_set, contents)
