"""What carries Service traffic on this node already, and how to silence it for a while.

It is found by what is in the kernel, whoever wrote it. Nothing comes into being by looking.
"""

import asyncio
from collections.abc import Sequence
from contextlib import closing
from typing import Protocol

from pyproxy.model import Family
from pyproxy.proxier import _iptc
from pyproxy.proxier import _nfpack as pack
from pyproxy.proxier._flavour import programs_of, tables_with
from pyproxy.proxier._iptables import Iptables, IptablesError
from pyproxy.proxier._ipvsnl import Ipvs
from pyproxy.proxier._nfnetlink import NfError, NfTables
from pyproxy.proxier._nftarget import commit
from pyproxy.proxier._transparent import forget
from pyproxy.proxier._vips import Vips
from pyproxy.rules.iptables import SERVICES
from pyproxy.rules.iptables_text import Rules, parsed, silenced, woken
from pyproxy.rules.nft import Table
from pyproxy.rules.nft_base import TABLE_NAME

KUBE_PROXY = "kube-proxy"  # its table's name


class OthersError(Exception):
    """What is in the kernel cannot be looked at or changed."""


class Other(Protocol):
    """One part of the kernel that carries Service traffic, of one family."""

    @property
    def mode(self) -> str: ...

    def continues_as(self, mode: str) -> bool:
        """Say whether our mode of this name takes it over, and writes to the same place."""
        ...

    async def silence(self) -> bool:
        """Have new connections pass it by; established ones stay. False: it cannot be.

        Raises ``OthersError``.
        """
        ...

    async def wake(self) -> None:
        """Undo ``silence``. Raises ``OthersError``."""
        ...


class NftTable:
    """A table of nf_tables: while it is dormant, its chains are not in the packets' way."""

    mode = "nftables"

    def __init__(self, table: Table) -> None:
        self._table = table

    def __str__(self) -> str:
        return f"nftables (table {self._table.name}, IPv{self._table.family})"

    def continues_as(self, mode: str) -> bool:
        return mode == self.mode and self._table.name == TABLE_NAME

    async def silence(self) -> bool:
        self._set(dormant=True)
        return True

    async def wake(self) -> None:
        self._set(dormant=False)

    def _set(self, *, dormant: bool) -> None:
        try:
            with closing(NfTables()) as nf:
                commit(nf, [pack.set_dormant(self._table, dormant=dormant)])
        except (NfError, OSError) as error:
            raise OthersError(f"{self}: {error}") from error


class Chains:
    """The chains of mode iptables, kube-proxy's or ours: without jumps nobody comes to them."""

    mode = "iptables"

    def __init__(self, tables: Iptables, there: Rules) -> None:
        self._tables = tables
        self._there = there

    def __str__(self) -> str:
        programs = self._tables.programs
        return f"iptables (flavour {programs.flavour}, IPv{programs.family})"

    def continues_as(self, mode: str) -> bool:
        return mode == self.mode

    async def silence(self) -> bool:
        await self._carry_out(silenced(self._there))
        return True

    async def wake(self) -> None:
        await self._carry_out(woken(self._there))

    async def _carry_out(self, lines: Sequence[str]) -> None:
        try:
            await self._tables.restore(lines)
        except (IptablesError, OSError) as error:
            raise OthersError(f"{self}: {error}") from error
        finally:
            await self._tables.aclose()


class Local:
    """What packets meet only after NAT has left them alone: rules of another mode come first."""

    def __init__(self, mode: str, family: Family) -> None:
        self.mode = mode
        self._family = family

    def __str__(self) -> str:
        return f"{self.mode} (IPv{self._family})"

    def continues_as(self, mode: str) -> bool:
        return mode == self.mode

    async def silence(self) -> bool:
        if self.mode == "userspace":
            await asyncio.to_thread(forget, self._family)
        return False

    async def wake(self) -> None:
        pass


async def found(family: Family) -> list[Other]:
    """Return what there is of a family. Raises ``OthersError``."""
    others: list[Other] = []
    try:
        others += tables(family)
        for programs in programs_of(family).values():
            if programs.flavour == "legacy" and not _iptc.existing(family):
                continue
            there = parsed(await tables_with(programs).save())
            if ("nat", SERVICES) in there:
                others.append(Chains(tables_with(programs), there))
        if has_servers(family):
            others.append(Local("ipvs", family))
        with closing(Vips(family, None)) as vips:
            if vips.listed():
                others.append(Local("userspace", family))
    except (NfError, IptablesError, OSError) as error:
        raise OthersError(str(error)) from error
    return others


def tables(family: Family) -> list[NftTable]:
    """Return the tables of mode nftables; none where the kernel has no nf_tables."""
    names = [Table(family, name) for name in (KUBE_PROXY, TABLE_NAME)]
    try:
        nf = NfTables()
    except OSError:
        return []
    with closing(nf):
        return [NftTable(table) for table in names if nf.chains(table)]


def has_servers(family: Family) -> bool:
    try:
        ipvs = Ipvs(family)
    except OSError:  # the kernel has no ip_vs
        return False
    with closing(ipvs):
        return bool(ipvs.servers() or ipvs.servers(ours=False))
