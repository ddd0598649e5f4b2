"""Writes the items of mode iptables: chains by ``iptables-restore``, members of sets by netlink.

It knows the rules of each chain of ours in the kernel and sends the chains that differ, all in
one go. A rule that is refused is left out, with whatever leads to it, and the rest is sent again.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from pyproxy.counters import NOTHING, Entry
from pyproxy.delta import Delta
from pyproxy.model import Family
from pyproxy.proxier._ipmembers import MemberSets, destroy_sets, held_members
from pyproxy.proxier._ipset import packed_member
from pyproxy.proxier._iptables import Iptables, IptablesError
from pyproxy.reconcile import ApplyError, Difference
from pyproxy.report import RestoreReport
from pyproxy.rules.iptables import MEMBER, SETS, Content, Item, Ruleset
from pyproxy.rules.iptables_base import Place, jumps
from pyproxy.rules.iptables_counts import entries
from pyproxy.rules.iptables_layout import Layout, chains_of, read
from pyproxy.rules.iptables_text import Line, Rules, cleared, counted, founded, parsed, rewritten

ATTEMPTS = 16  # for one change, each without something that was refused
RANKS = {"SEP": 0, "SVC": 1, "SVL": 1, "EXT": 2, "FW-": 3}  # of chains: later ones lead to earlier


class IpTarget:
    """Tables filter and nat of one family, and the sets that their rules look into."""

    def __init__(
        self,
        tables: Iptables,
        ruleset: Callable[[], Ruleset],
        on_drift: Callable[[int], None] = lambda count: None,
        on_restore: Callable[[RestoreReport], None] = lambda report: None,
    ) -> None:
        """``ruleset`` returns what the fixed part shall be at that moment.

        ``on_drift`` hears how many chains and members of sets somebody else has changed, when that
        is found out;
        ``on_restore`` of every sync, whether it wrote anything or not.
        """
        self._tables = tables
        self._ruleset = ruleset
        self._on_drift = on_drift
        self._on_restore = on_restore
        self._family: Family = ruleset().family
        self._layout = Layout(ruleset())
        self._held: dict[Place, tuple[str, ...]] = {}
        self._rewritten: set[Place] = set()  # since counters were read: they count anew
        self._members = MemberSets(self._family)
        self._missing: list[str] = []  # lines that add what every sync relies on
        self._due: dict[Place, tuple[str, ...] | None] = {}  # chains that may have to be sent
        self._sure = False  # that ``_held`` is what we left
        self._full = False  # the next ``apply`` follows a look at everything
        self._owned: Counter[str] = Counter()  # rules of ``_held``, by table
        self._written: Counter[str] = Counter()  # in this sync
        self._failed = False
        self.established = asyncio.Event()  # the rules are there
        self.ruleset: Ruleset | None = None  # what the fixed part was last made from

    async def adopt(self) -> Mapping[Item, Content]:
        """Read the tables and sets. What the fixed part lacks is added by ``apply``."""
        before, was_sure = self._held, self._sure
        members_before = self._members.held()
        self._sure = False
        try:
            there = parsed(await self._tables.save())
            members = await self._members.read()
        except (IptablesError, OSError) as error:
            raise ApplyError(str(error)) from error
        ruleset = self.ruleset = self._ruleset()
        self._layout = Layout(ruleset, there)
        items, self._held = read(there, self._layout.fixed)
        self._owned = Counter({place[0]: 0 for place in self._layout.fixed})
        for (table, _chain), rules in self._held.items():
            self._owned[table] += len(rules)
        self._full = True
        for item, content in items.items():
            self._layout.put(item, content)
        self._due = {}
        self._missing = founded(there, self._layout.fixed, jumps(ruleset))
        drift = differences(before, self._held) + len(members_before ^ self._members.held())
        if was_sure and drift:
            self._on_drift(drift)
        return items | members

    def rehearse(self, state: Mapping[Item, Content]) -> None:
        """Lay out these items by themselves, and pack the members among them, to no end."""
        rewritten(chains_of(self.ruleset or self._ruleset(), dict(state)))
        for item in state:
            if item.table == SETS:
                packed_member(item.match, self._family)

    async def apply(self, delta: Delta[Item, Content]) -> Mapping[Item, str]:
        """Carry out the change; return the items that were refused, and why."""
        self._sure = self._failed = False
        self._written.clear()
        for item in delta.removed:
            self._remove(item)
        for item, content in delta.added.items():
            self._put(item, content)
        for item, (_before, content) in delta.changed.items():
            self._put(item, content)
        try:
            await self._members.add_wanted()
            asked = {i for i in (*delta.added, *delta.changed) if i.table != SETS}
            refused = await self._write(asked)
            await self._members.remove_unwanted()
        except (IptablesError, OSError) as error:
            raise ApplyError(str(error)) from error
        finally:
            self._tell()
        self._sure = True
        self.established.set()
        return refused

    async def compare(self, wanted: Mapping[Item, Content]) -> tuple[Difference, ...]:
        """List the tables and sets anew. Raises ``ApplyError``."""
        try:
            there = parsed(await self._tables.save())
            members = await asyncio.to_thread(held_members, self._family)
        except (IptablesError, OSError) as error:
            raise ApplyError(str(error)) from error
        held = read(there, self._layout.fixed).items | members
        return tuple(differing(wanted, held))

    async def counters(self, *, by_endpoint: bool) -> list[Entry[Item]]:
        """List the tables, with what rules have counted since they were written.

        A chain that is written anew counts from zero: what nobody had read is lost. Raises
        ``ApplyError``.
        """
        try:
            text = await self._tables.save(with_counters=True)
        except IptablesError as error:
            raise ApplyError(str(error)) from error
        found = await asyncio.to_thread(lambda: list(entries(counted(text))))
        anew, self._rewritten = self._rewritten, set()
        ended = [
            Entry(entry.key, entry.endpoint, NOTHING, ended=True)
            for entry in found
            if (entry.key.table, entry.key.chain) in anew
        ]
        return ended + [entry for entry in found if by_endpoint or entry.endpoint is None]

    async def clear(self) -> None:
        """Remove every rule and set of ours. Raises ``ApplyError``."""
        self._held = {}
        self._members.forget()
        self._sure = False
        self.established.clear()
        try:
            await remove([self._tables], self._family)
        except (IptablesError, OSError) as error:
            raise ApplyError(str(error)) from error

    async def aclose(self) -> None:
        """Leave the rules as they are: they carry the traffic."""
        await self._tables.aclose()
        await self._members.aclose()

    def _tell(self) -> None:
        full, self._full = self._full, False
        owned = {table: count for table, count in self._owned.items() if table != "mangle"}
        written = dict(self._written)
        self._on_restore(RestoreReport(self._family, full, self._failed, owned, written))

    # --- items --------------------------------------------------------------------------------

    def _put(self, item: Item, content: Content) -> None:
        if item.table == SETS:
            self._members.put(item)
        else:
            self._layout.put(item, content)

    def _remove(self, item: Item) -> None:
        if item.table == SETS:
            self._members.drop(item)
        else:
            self._layout.drop(item)

    # --- chains -------------------------------------------------------------------------------

    async def _write(self, suspects: AbstractSet[Item]) -> dict[Item, str]:
        """Send the chains that differ; return what was left out. Raises ``IptablesError``."""
        if self._missing:
            self._failed = True  # unless it returns
            await self._tables.arrange(self._missing)
            self._missing, self._failed = [], False
        self._due |= self._layout.take()
        refused: dict[Item, str] = {}
        for _attempt in range(ATTEMPTS):
            failure = await self._send()
            if failure is None:
                return refused
            error, lines = failure
            item = self._culprit(error, lines) or await self._isolated(suspects - refused.keys())
            if item is None:
                raise error
            bad = self._layout.pointing_at([item])
            refused |= {lost: f"{lost.chain} {lost.match}: {error}" for lost in bad}
            for lost in bad:
                self._layout.drop(lost)
            self._due |= self._layout.take()
        raise error

    async def _send(self) -> tuple[IptablesError, Sequence[Line]] | None:
        """Send the chains that are due; return why it failed, and what was sent."""
        due, held = self._due, self._held
        lines = rewritten({place: due[place] for place in due if held.get(place) != due[place]})
        try:
            if lines:
                await self._tables.restore([line.text for line in lines])
        except IptablesError as error:
            self._failed = True
            return error, lines
        self._rewritten.update(line.place for line in lines if line.place)
        self._written.update(line.place[0] for line in lines if line.place and line.rule)
        for place, rules in due.items():
            self._owned[place[0]] += len(rules or ()) - len(held.get(place, ()))
            if rules is None:
                held.pop(place, None)
            else:
                held[place] = rules
        self._due = {}
        return None

    def _culprit(self, error: IptablesError, lines: Sequence[Line]) -> Item | None:
        """Return the item whose line the error names."""
        if error.line is None or error.line >= len(lines):
            return None
        line = lines[error.line]
        return self._layout.item_at(line.place, line.rule) if line.place else None

    async def _isolated(self, suspects: AbstractSet[Item]) -> Item | None:
        """Find an item that makes the whole fail; None if it fails without any of them.

        The kernel, unlike the program, does not say which line it refuses. What leads somewhere
        comes after that, so that each part of the order stands for itself; a chain that is not
        in it yet is empty.
        """
        order = sorted(suspects, key=lambda item: (bool(item.match), RANKS.get(item.chain[5:8], 0)))
        contents = {item: self._layout.content(item) for item in order}
        for item in order:
            self._withhold(item)
        if await self._retry() is not None:
            return None
        good, bad = 0, len(order)
        while bad - good > 1:
            middle = (good + bad) // 2
            for item in order[good:middle]:
                self._layout.put(item, contents[item])
            if await self._retry() is None:
                good = middle
            else:
                bad = middle
                for item in order[good:middle]:
                    self._withhold(item)
        for item in order[good:]:
            self._layout.put(item, contents[item])
        return order[good] if order else None

    def _withhold(self, item: Item) -> None:
        if item.match:
            self._layout.drop(item)
        else:
            self._layout.put(item, ())

    async def _retry(self) -> tuple[IptablesError, Sequence[Line]] | None:
        self._due |= self._layout.take()
        return await self._send()


def differing(wanted: Mapping[Item, Content], held: Mapping[Item, Content]) -> Iterator[Difference]:
    for item, content in wanted.items():
        there = held.get(item._replace(owner=None))
        if there != content:
            entry = f"{item.table} {item.chain} {item.match}".rstrip()
            yield Difference(entry, worded(content), worded(there) if there is not None else None)


def worded(content: Content) -> str:
    if content == MEMBER:
        return "a member"
    return content if isinstance(content, str) else "; ".join(content)


async def remove(tables: Sequence[Iptables], family: Family) -> None:
    """Remove our chains, kube-proxy's and our sets, whoever left them.

    Raises ``IptablesError``, and ``OSError`` for a set.
    """
    for each in tables:
        await remove_chains(each)
    await asyncio.to_thread(destroy_sets, family)


async def remove_chains(tables: Iptables) -> None:
    """Remove our chains. Nothing holds on to a set afterwards: with nf_tables, the end of the
    program waits until the kernel has let go of what its rules matched.
    """
    lines = cleared(parsed(await tables.save()))
    try:
        if lines:
            await tables.arrange(lines)
    finally:
        await tables.aclose()


def differences(one: Rules, other: Rules) -> int:
    """Return how many chains are missing, new, or of another length.

    Their texts say less: other versions of iptables may print a rule otherwise than it was given.
    """
    lengths = {place: len(rules) for place, rules in one.items()}
    others = {place: len(rules) for place, rules in other.items()}
    return len({place for place, _length in lengths.items() ^ others.items()})
