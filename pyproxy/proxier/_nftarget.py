"""Writes the items of mode nftables into table ``pyproxy``, one transaction at a time.

It knows what the kernel holds, by container and key, and sends what differs. Items that several
owners may want (a shared chain, a cluster IP, a hairpin) are there while anybody wants them.
A little long: what it holds, and how that is compared, are apart already (``_nfheld``).
"""

import asyncio
import errno
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field

from msgspec.structs import replace

from pyproxy.counters import Entry
from pyproxy.delta import Delta
from pyproxy.model import ServicePortName
from pyproxy.proxier import _nfcount
from pyproxy.proxier import _nfpack as pack
from pyproxy.proxier._nfcompare import compared, plain
from pyproxy.proxier._nfheld import Held, differences
from pyproxy.proxier._nfnetlink import NfError, NfTables
from pyproxy.proxier._nfpack import RuleForm, rule_form, set_form
from pyproxy.proxier._nfread import OWN_RUN
from pyproxy.proxier._nfwhole import Whole
from pyproxy.reconcile import ApplyError, Difference
from pyproxy.rules import nft_base
from pyproxy.rules.nft import Chain, Element, Rule, Set, Table, packed_ip
from pyproxy.rules.nft_affinity import AFFINITY_SET, CHAIN, Content
from pyproxy.rules.nft_file import Base
from pyproxy.rules.nftables import Item, Ruleset

IN_A_THREAD = 2000  # items: fewer are written before a thread would have started
NODE_PORT_IPS = "node-port-ips"
MOST_ENDED = 10_000  # counts that are kept for the next who reads counters


@dataclass(slots=True)
class Messages:
    """One transaction, in the order in which names come into being and go."""

    declare: list[bytes] = field(default_factory=list)
    rules: list[bytes] = field(default_factory=list)
    remove: dict[str, list[Element]] = field(default_factory=dict)
    insert: dict[str, list[Element]] = field(default_factory=dict)

    def packed(self, table: Table) -> list[bytes]:
        packed = self.declare + self.rules
        for name, elements in self.remove.items():
            packed += pack.delete_elements(table, name, elements)
        for name, elements in self.insert.items():
            packed += pack.new_elements(table, name, elements)
        return packed


class NfTarget:
    """A table of one family; ``base`` is its fixed part."""

    def __init__(
        self,
        ruleset: Callable[[], Ruleset],
        on_drift: Callable[[int], None] = lambda count: None,
        base: Base = nft_base,
        counted: Collection[str] = (),
    ) -> None:
        """``ruleset`` returns what the fixed part shall be at that moment.

        ``on_drift`` hears how many things somebody else has changed, when that is found out.
        Elements of the sets ``counted`` count the packets that find them.
        """
        self._ruleset = ruleset
        self._base = base
        self._on_drift = on_drift
        self._counted = frozenset(counted)
        self._ended: deque[Entry[Item]] = deque(maxlen=MOST_ENDED)  # until somebody reads them
        self._table = self._base.table(ruleset().family)
        self._nf: NfTables | None = None
        self._held = Held()
        self._users: dict[tuple[str, bytes | str], set[ServicePortName | None]] = {}
        self._fixed: list[bytes] = []  # messages that mend the fixed part
        self._leftovers: set[str] = set()  # chains and sets that nobody uses
        self._sure = False  # that ``_held`` is what we left
        self._sweep_all = False
        self._read_at: int | None = None  # the generation that was read
        self.settled = asyncio.Event()  # when it was written for the first time
        self.read_seconds = 0.0  # how long the table took to read

    @property
    def generation(self) -> int | None:
        """The newest generation of the rule set that nobody else can have changed the table in.

        None if it was never read, and while we write: whose the number is, is not known then.
        """
        if self._read_at is None or OWN_RUN.lock.locked():
            return None
        return OWN_RUN.since(self._read_at)

    async def adopt(self) -> Mapping[Item, Content]:
        """Read the table. What is not as it should be in its fixed part is mended by ``apply``."""
        before, was_sure = self._held, self._sure
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            items = await asyncio.to_thread(self._read)
            self.read_seconds = clock() - started
        except (NfError, OSError) as error:
            raise ApplyError(str(error)) from error
        if was_sure and (drift := differences(before, self._held) + len(self._fixed)):
            self._on_drift(drift)
        return items

    def rehearse(self, state: Mapping[Item, Content]) -> None:
        """Pack these items, to no end."""
        empty = copy(self)
        empty._held, empty._users, empty._leftovers = Held(), {}, set()
        empty._messages(Delta(dict(state), {}, {})).packed(self._table)

    async def apply(self, delta: Delta[Item, Content]) -> Mapping[Item, str]:
        """Carry out the change. Nothing is refused by itself: the kernel takes all or nothing."""
        self._sure = False
        messages = self._messages(delta)
        packed = [*self._fixed, *messages.packed(self._table)]
        try:
            if len(delta.added) + len(delta.removed) > IN_A_THREAD:
                await asyncio.to_thread(self._carry_out, packed, messages)
            else:
                self._carry_out(packed, messages)
        except (NfError, OSError) as error:
            raise ApplyError(str(error)) from error
        self._fixed = []
        self._sweep()
        self._sure = True
        self.settled.set()
        return {}

    async def compare(self, wanted: Mapping[Item, Content]) -> tuple[Difference, ...]:
        """Read the table anew, over a socket of its own. Raises ``ApplyError``."""
        try:
            return await asyncio.to_thread(compared, self._table, self._base, wanted)
        except (NfError, OSError) as error:
            raise ApplyError(str(error)) from error

    async def counters(self, *, by_endpoint: bool) -> list[Entry[Item]]:
        """Return what the elements have counted, those first that are no more.

        Raises ``ApplyError``, also where nothing is counted.
        """
        if not self._counted:
            raise ApplyError("mode nftables counts only with --service-metrics")
        try:
            found = await asyncio.to_thread(_nfcount.read, self._table, self._counted)
        except (NfError, OSError) as error:
            raise ApplyError(str(error)) from error
        if by_endpoint:
            found = [*self._ended, *found]
            self._ended.clear()
            return found
        found = [e for e in (*self._ended, *found) if e.endpoint is None]
        self._ended = deque((e for e in self._ended if e.endpoint is not None), MOST_ENDED)
        return found

    async def clear(self) -> None:
        """Delete the table, whoever made it. Raises ``ApplyError``."""
        self._held, self._users, self._fixed = Held(), {}, []
        try:
            delete_tables([self._table])
        except (NfError, OSError) as error:
            raise ApplyError(str(error)) from error

    async def aclose(self) -> None:
        """Leave the table as it is: it carries the traffic."""
        if self._nf is not None:
            self._nf.close()
            self._nf = None

    # --- reading ------------------------------------------------------------------------------

    def _read(self) -> Mapping[Item, Content]:
        nf = self._socket()
        table, ruleset = self._table, self._ruleset()
        self._held, self._users, self._leftovers = Held(), {}, set()
        self._sweep_all = True
        self._read_at = nf.generation().id
        chains = {chain.name: chain for chain in nf.chains(table)}
        sets = nf.sets(table)
        sound = all(chains.get(c.name) == c for c in self._base.CHAINS) and all(
            sets.get(s.name) == set_form(table, s) for s in self._sets()
        )
        if not sound:
            self._fixed = self._from_nothing(ruleset)
            return {}
        forms: dict[str, list[RuleForm]] = {name: [] for name in chains}
        for rule in nf.rules(table):
            forms[rule.form.chain].append(rule.form)
        self._fixed = self._mended(ruleset, forms)
        fixed = {chain.name for chain in self._base.CHAINS}
        self._held.chains = {n: tuple(f) for n, f in forms.items() if n not in fixed}
        self._held.affinity_sets = {n: f for n, f in sets.items() if n.startswith("affinity-")}
        items: dict[Item, Content] = {}
        for a_set in self._sets():
            if a_set.name != NODE_PORT_IPS:
                items |= self._read_elements(nf, a_set.name)
        for name in self._held.chains:
            items[Item(CHAIN, name)] = ()
        for name in self._held.affinity_sets:
            items[Item(AFFINITY_SET, name)] = ()
        self._users = {(i.container, i.key): {None} for i in items if i.container in SHARED}
        self._fixed += self._node_port_ips(ruleset, nf.elements(table, NODE_PORT_IPS))
        return items

    def _sets(self) -> tuple[Set, ...]:
        return tuple(
            replace(a_set, counted=a_set.name in self._counted & _nfcount.WHOLLY)
            for a_set in self._base.sets(self._table.family)
        )

    def _read_elements(self, nf: NfTables, name: str) -> dict[Item, Content]:
        held: dict[bytes, Content] = {}
        for element in nf.elements(self._table, name):
            held[element.key + (element.key_end or b"")] = plain(element)
        self._held.elements[name] = held
        return {Item(name, key): content for key, content in held.items()}

    def _from_nothing(self, ruleset: Ruleset) -> list[bytes]:
        """Return the fixed part as messages; a table of this name goes in the same moment."""
        whole = Whole(self._table, self._base.CHAINS, self._base.rules(ruleset), self._sets())
        return whole.made() + self._node_port_ips(ruleset, [])

    def _mended(self, ruleset: Ruleset, forms: Mapping[str, list[RuleForm]]) -> list[bytes]:
        """Return messages for the fixed chains whose rules are not as they should be."""
        wanted: dict[str, list[Rule]] = {chain.name: [] for chain in self._base.CHAINS}
        for rule in self._base.rules(ruleset):
            wanted[rule.chain].append(rule)
        messages: list[bytes] = []
        for name, rules in wanted.items():
            if forms[name] != [rule_form(self._table, rule) for rule in rules]:
                messages.append(pack.flush_chain(self._table, name))
                messages += [pack.new_rule(self._table, rule) for rule in rules]
        return messages

    def _node_port_ips(self, ruleset: Ruleset, there: Iterable[Element]) -> list[bytes]:
        wanted = {packed_ip(ip) for ip in ruleset.node_port_ips or ()}
        known = {element.key for element in there}
        gone = [Element(key) for key in sorted(known - wanted)]
        new = [Element(key) for key in sorted(wanted - known)]
        return [
            *(pack.delete_elements(self._table, NODE_PORT_IPS, gone) if gone else ()),
            *(pack.new_elements(self._table, NODE_PORT_IPS, new) if new else ()),
        ]

    # --- writing ------------------------------------------------------------------------------

    def _messages(self, delta: Delta[Item, Content]) -> Messages:
        messages = Messages()
        wanted: dict[tuple[str, bytes | str], Content | None] = {}
        for item in delta.removed:
            self._release(item, wanted)
        for item, new in delta.added.items():
            self._want(item, new, wanted)
        for item, (_before, new) in delta.changed.items():
            self._want(item, new, wanted)
        for (container, key), content in wanted.items():
            if container == CHAIN:
                self._write_chain(str(key), content, messages)
            elif container == AFFINITY_SET:
                self._write_set(str(key), content, messages)
            elif isinstance(key, bytes):
                self._write_element(container, key, content, messages)
        return messages

    def _release(self, item: Item, wanted: dict[tuple[str, bytes | str], Content | None]) -> None:
        place = (item.container, item.key)
        users = self._users.get(place)
        if users is not None:
            users.discard(item.owner)
            if users:
                return
            del self._users[place]
        wanted[place] = None

    def _want(
        self, item: Item, content: Content, wanted: dict[tuple[str, bytes | str], Content | None]
    ) -> None:
        place = (item.container, item.key)
        if item.container in SHARED:
            self._users.setdefault(place, set()).add(item.owner)
        wanted[place] = content

    def _write_chain(self, name: str, content: Content | None, messages: Messages) -> None:
        """Make a chain so. One that nobody wants stays for now: see ``_sweep``."""
        if content is None:
            self._leftovers.add(name)
            return
        self._leftovers.discard(name)
        assert isinstance(content, tuple), "a chain is its rules"
        forms = tuple(rule_form(self._table, rule) for rule in content)
        before = self._held.chains.get(name)
        if before == forms:
            return
        if before is None:
            messages.declare.append(pack.new_chain(self._table, Chain(name)))
        elif before:
            messages.rules.append(pack.flush_chain(self._table, name))
        messages.rules += [pack.new_rule(self._table, rule) for rule in content]
        self._held.chains[name] = forms

    def _write_set(self, name: str, content: Content | None, messages: Messages) -> None:
        if content is None:
            self._leftovers.add(name)
            return
        self._leftovers.discard(name)
        assert isinstance(content, Set), "a set is its declaration"
        form = set_form(self._table, content)
        before = self._held.affinity_sets.get(name)
        if before is None:
            messages.declare.append(pack.new_set(self._table, content))
        self._held.affinity_sets[name] = form

    def _write_element(
        self, container: str, key: bytes, content: Content | None, messages: Messages
    ) -> None:
        held = self._held.elements.setdefault(container, {})
        before = held.get(key)
        if before == content:
            return
        if before is not None:
            messages.remove.setdefault(container, []).append(element_of(key, before))
        if content is None:
            del held[key]
        else:
            messages.insert.setdefault(container, []).append(element_of(key, content))
            held[key] = content

    def _carry_out(self, packed: list[bytes], messages: Messages) -> None:
        """Commit, and keep what elements have counted that are gone then."""
        ended: list[Entry[Item]] = []
        if self._counted and not self._fixed:  # else nothing counts, or all is made from nothing
            doomed = {n: found for n, found in messages.remove.items() if n in self._counted}
            ended = _nfcount.last(self._socket(), self._table, doomed)
        self._commit(packed)
        self._ended += ended

    def _commit(self, messages: list[bytes]) -> None:
        if not messages:
            return
        commit(self._socket(), messages)

    def _sweep(self) -> None:
        """Delete chains and sets that nobody uses, in transactions of their own.

        Chains that all Services of a size share are left for a full sync: they soon find use.
        Kernels before 6.2 notice late that nothing points at a chain any more, and refuse:
        whatever is refused stays until the next time.
        """
        own = [name for name in self._leftovers if self._sweep_all or "/" in name]
        self._sweep_all = False
        chains = [name for name in own if name in self._held.chains]
        sets = [name for name in own if name in self._held.affinity_sets]
        if not chains and not sets:
            return
        messages = [pack.flush_chain(self._table, n) for n in chains if self._held.chains[n]]
        messages += [pack.delete_chain(self._table, name) for name in chains]
        messages += [pack.delete_set(self._table, name) for name in sets]
        try:
            self._commit(messages)
        except NfError:
            return
        for name in own:
            self._held.chains.pop(name, None)
            self._held.affinity_sets.pop(name, None)
            self._leftovers.discard(name)

    def _socket(self) -> NfTables:
        if self._nf is None:
            self._nf = NfTables()
        return self._nf


SHARED = frozenset({CHAIN, AFFINITY_SET, "cluster-ips", "hairpin"})


def element_of(key: bytes, content: Content) -> Element:
    if isinstance(content, Element):
        return content
    assert isinstance(content, bytes), "rules are in chains"
    return Element(key, data=content or None)


def commit(nf: NfTables, messages: list[bytes]) -> None:
    """Carry out a transaction, and remember that the new generation is ours."""
    with OWN_RUN.lock:
        before = nf.generation().id
        nf.commit(messages)
        after = nf.generation().id
        if after == before + 1:  # else somebody else's came in between
            OWN_RUN.add(before, after)


def delete_tables(tables: Iterable[Table]) -> None:
    """Delete tables with all that is in them; it is no error if they are not there."""
    nf = NfTables()
    try:
        for table in tables:
            try:
                commit(nf, [pack.delete_table(table)])
            except NfError as error:
                if error.errno != errno.ENOENT:
                    raise
    finally:
        nf.close()
