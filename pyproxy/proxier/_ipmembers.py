"""Members of the sets that rules of iptables look into, and who wants each.

Changes go through one socket that stays: to close a socket of netfilter waits until the kernel
has freed what the last commit to nf_tables replaced, which takes as long as the commit did
(``nft_rcv_nl_event`` in net/netfilter/nf_tables_api.c).
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field

from pyproxy.model import Family, ServicePortName
from pyproxy.proxier._ipset import IP_PORT, IP_PORT_IP, IpSets
from pyproxy.rules.iptables import CLUSTER_IPS, HAIRPIN, MEMBER, SETS, Content, Item, set_name

KINDS = {CLUSTER_IPS: IP_PORT, HAIRPIN: IP_PORT_IP}


@dataclass(slots=True)
class Members:
    """Of one set: who wants each member; those the kernel has; those that may have to change."""

    users: dict[str, set[ServicePortName | None]] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    touched: set[str] = field(default_factory=set)


class MemberSets:
    """All sets of one family. ``put`` and ``drop`` say what shall be; the rest makes it so."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._members: dict[str, Members] = {}
        self._sets: IpSets | None = None  # until the first change

    async def read(self) -> dict[Item, Content]:
        """Return the members there are; create the sets that are missing. Raises ``OSError``."""
        return await asyncio.to_thread(self._read)

    def held(self) -> set[tuple[str, str]]:
        """Return each member that the kernel has, as far as we know, with its set."""
        return {(name, m) for name, members in self._members.items() for m in members.held}

    def put(self, item: Item) -> None:
        members = self._members[item.chain]
        members.users.setdefault(item.match, set()).add(item.owner)
        members.touched.add(item.match)

    def drop(self, item: Item) -> None:
        """Forget that an owner wants a member; it is no error if it did not."""
        members = self._members[item.chain]
        if users := members.users.get(item.match):
            users.discard(item.owner)
            if not users:
                del members.users[item.match]
                members.touched.add(item.match)

    async def add_wanted(self) -> None:
        """Add what the kernel lacks. Raises ``OSError``."""
        for name, members in self._members.items():
            if new := (members.touched & members.users.keys()) - members.held:
                await self._change(IpSets.add, name, new)
                members.held |= new

    async def remove_unwanted(self) -> None:
        """Remove what nobody wants any more, after ``add_wanted``. Raises ``OSError``."""
        for name, members in self._members.items():
            if gone := (members.touched & members.held) - members.users.keys():
                await self._change(IpSets.remove, name, gone)
                members.held -= gone
            members.touched.clear()

    def forget(self) -> None:
        """Know nothing of the sets until they are read again."""
        self._members = {}

    async def aclose(self) -> None:
        """Let go of the socket. The sets stay."""
        sets, self._sets = self._sets, None
        if sets is not None:
            await asyncio.to_thread(sets.close)

    def _read(self) -> dict[Item, Content]:
        self._members = {}
        with closing(IpSets(self._family)) as sets:
            for name, kind in KINDS.items():
                held = sets.members(set_name(name, self._family))
                if held is None:
                    sets.create(set_name(name, self._family), kind)
                users: dict[str, set[ServicePortName | None]] = {m: {None} for m in held or ()}
                self._members[name] = Members(users, held or set())
        return {
            Item(SETS, name, member): MEMBER
            for name, members in self._members.items()
            for member in members.held
        }

    async def _change(
        self, act: Callable[[IpSets, str, Iterable[str]], None], name: str, members: set[str]
    ) -> None:
        if self._sets is None:
            self._sets = IpSets(self._family)
        await asyncio.to_thread(act, self._sets, set_name(name, self._family), members)


def held_members(family: Family) -> dict[Item, Content]:
    """Return the members of our sets. Raises ``OSError``."""
    with closing(IpSets(family)) as sets:
        return {
            Item(SETS, name, member): MEMBER
            for name in KINDS
            for member in sets.members(set_name(name, family)) or ()
        }


def destroy_sets(family: Family) -> None:
    """Delete our sets, whoever left them. Raises ``OSError``: rules may still hold on to one."""
    with closing(IpSets(family)) as sets:
        for name in KINDS:
            sets.destroy(set_name(name, family))
