"""Puts the items of all owners into chains, and knows which chains a change touches."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pyproxy.rules.iptables import (
    SERVICES,
    SETS,
    Content,
    Item,
    Items,
    Ruleset,
)
from pyproxy.rules.iptables_base import Place, fixed_chains
from pyproxy.rules.iptables_text import Rules, is_of_owner, target_of
from pyproxy.rules.iptables_tree import CHAIN as TREE
from pyproxy.rules.iptables_tree import Leaf, digits_of, tree

DISPATCH: Place = ("nat", SERVICES)


class Layout:
    """The chains that items and the fixed part make together.

    ``there`` are the chains of before: a tree may have grown of other items, and none of them
    would name its branches when they are to go.
    """

    def __init__(self, ruleset: Ruleset, there: Iterable[Place] = ()) -> None:
        self.fixed = fixed_chains(ruleset)
        self._own: dict[Place, tuple[str, ...]] = {}
        self._rules: dict[Place, dict[str, str]] = {}  # by chain, then match: the target
        self._branches = {place for place in there if place[1].startswith(TREE)}
        self._touched: set[Place] = set(self.fixed)

    def put(self, item: Item, content: Content) -> None:
        place = (item.table, item.chain)
        if isinstance(content, tuple):
            self._own[place] = content
        else:
            self._rules.setdefault(place, {})[item.match] = content
        self._touched.add(place)

    def drop(self, item: Item) -> None:
        """Forget an item; it is no error if it is not there."""
        place = (item.table, item.chain)
        if item.match:
            self._rules.get(place, {}).pop(item.match, None)
        else:
            self._own.pop(place, None)
        self._touched.add(place)

    def content(self, item: Item) -> Content:
        """Return what an item was put with."""
        place = (item.table, item.chain)
        return self._rules[place][item.match] if item.match else self._own[place]

    def take(self) -> dict[Place, tuple[str, ...] | None]:
        """Return what the chains that were touched since shall be; None: they shall not be."""
        touched, self._touched = self._touched, set()
        chains: dict[Place, tuple[str, ...] | None] = {}
        for place in sorted(touched):
            if place == DISPATCH:
                chains |= self._dispatch()
            elif place in self.fixed:
                before, after = self.fixed[place]
                chains[place] = (*before, *self._shared(place), *after)
            else:
                chains[place] = self._own.get(place)
        return chains

    def pointing_at(self, items: Iterable[Item]) -> set[Item]:
        """Return these items and all that lead to them, directly or not."""
        found = set(items)
        chains = {item.chain for item in found if not item.match}
        while chains:
            new = {item for item in self._items() if self._leads(item) & chains} - found
            found |= new
            chains = {item.chain for item in new if not item.match}
        return found

    def item_at(self, place: Place, rule: str) -> Item | None:
        """Return the item that a rule of a chain comes from; None if nobody owns it."""
        if place in self._own:
            return Item(*place)
        where = DISPATCH if place in self._branches else place
        rules = self._rules.get(where, {})
        return next(
            (Item(*where, match) for match, to in rules.items() if line(match, to) == rule), None
        )

    def _items(self) -> Iterable[Item]:
        yield from (Item(*place) for place in self._own)
        for place, rules in self._rules.items():
            yield from (Item(*place, match) for match in rules)

    def _leads(self, item: Item) -> set[str]:
        place = (item.table, item.chain)
        if item.match:
            return {self._rules[place][item.match]}
        return {target_of(rule) for rule in self._own[place]}

    def _shared(self, place: Place) -> tuple[str, ...]:
        return tuple(line(*rule) for rule in sorted(self._rules.get(place, {}).items()))

    def _dispatch(self) -> dict[Place, tuple[str, ...] | None]:
        leaves = sorted(
            Leaf(digits_of(match[3 : match.index("/")]), line(match, to))  # after "-d "
            for match, to in self._rules.get(DISPATCH, {}).items()
        )
        grown = tree(leaves)
        before, after = self.fixed[DISPATCH]
        chains: dict[Place, tuple[str, ...] | None] = dict.fromkeys(self._branches)
        chains[DISPATCH] = (*before, *grown.pop(""), *after)
        self._branches = {("nat", name) for name in grown}
        chains.update({("nat", name): rules for name, rules in grown.items()})
        return chains


class Read(NamedTuple):
    """What was found in the kernel, in terms of items."""

    items: Items
    chains: dict[Place, tuple[str, ...]]


def read(there: Rules, fixed: Mapping[Place, object]) -> Read:
    """Return the items that chains of ours are made of. Foreign chains are left out.

    Rules of the fixed part, and those that nobody of us would write, are no items; their chains
    are compared as a whole.
    """
    items: Items = {}
    chains: dict[Place, tuple[str, ...]] = {}
    for place, rules in there.items():
        name = place[1]
        if place not in fixed and is_of_owner(name) is None:
            continue
        chains[place] = rules
        if name.startswith(TREE) or place == DISPATCH:
            items |= {
                Item(*DISPATCH, match): to
                for match, to in map(split, rules)
                if match.startswith("-d ") and is_of_owner(to) and not to.startswith(TREE)
            }
        elif place in fixed:
            items |= {Item(*place, match): to for match, to in map(split, rules) if match}
        else:
            items[Item(*place)] = rules
    return Read(items, chains)


def line(match: str, to: str) -> str:
    return f"{match} -j {to}"


def split(rule: str) -> tuple[str, str]:
    match, _, to = rule.rpartition(" -j ")
    return match, to


def chains_of(ruleset: Ruleset, items: Items) -> Mapping[Place, tuple[str, ...]]:
    """Return all chains that items make, the fixed ones included."""
    layout = Layout(ruleset)
    for item, content in items.items():
        if item.table != SETS:
            layout.put(item, content)
    return {place: rules for place, rules in layout.take().items() if rules is not None}
