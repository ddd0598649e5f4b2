"""Finds out which schedulers the kernel has, before a virtual server is to have one.

The kernel loads a scheduler's module when somebody asks for it, and the only way to ask is to make
a virtual server. A Service whose scheduler is missing is served with another, and named.
"""

import asyncio
import errno
import logging
from collections.abc import Callable, Iterable

from pyproxy.cache import Owners
from pyproxy.model import Frontend, PortPlan
from pyproxy.plan import Plan
from pyproxy.proxier import _ipvsnl as nl
from pyproxy.proxier._ipvsnl import Ipvs
from pyproxy.reconcile import Outer, Proxier
from pyproxy.report import SyncReport
from pyproxy.rules.ipvs import FALLBACK, Server

NAMED = 5  # Services, in one line of the log
PROBE = Frontend("198.51.100.0", 20000, "TCP")  # RFC 5737: nobody's address

log = logging.getLogger(__name__)


def missing_among(names: Iterable[str], ipvs: Ipvs) -> frozenset[str]:
    """Return the schedulers that the kernel has not, and cannot load."""
    return frozenset(name for name in sorted(names) if not has(name, ipvs))


def has(name: str, ipvs: Ipvs) -> bool:
    """Say whether the kernel has a scheduler; if it cannot be told, it may have."""
    failed = ipvs.carry_out([nl.new_server(PROBE, Server(name))])
    if not failed:
        ipvs.carry_out([nl.delete_server(PROBE)])
    return not any(code == errno.ENOENT for _request, code in failed)


class Schedulers:
    """The schedulers that the kernel was asked for."""

    def __init__(self, connect: Callable[[], Ipvs]) -> None:
        self._connect = connect
        self._asked: set[str] = set()
        self.missing: frozenset[str] = frozenset()

    async def ask(self, names: Iterable[str]) -> None:
        """Ask for those that were not asked for yet."""
        new = (set(names) | self.missing) - self._asked
        if not new:
            return
        try:
            missing = await asyncio.to_thread(self._missing_among, new)
        except OSError:
            return  # the sync will say why there is no ip_vs
        self.missing = self.missing - new | missing
        self._asked |= new

    def forget(self) -> None:
        """Let those that are missing be asked for again: a module may have been installed."""
        self._asked -= self.missing

    def _missing_among(self, names: set[str]) -> frozenset[str]:
        ipvs = self._connect()
        try:
            return missing_among(names, ipvs)
        finally:
            ipvs.close()


class Scheduled(Outer):
    """A proxier of mode ipvs that asks for the schedulers of Services before they are written."""

    def __init__(
        self, inner: Proxier, schedulers: Schedulers, wanted: Callable[[PortPlan], frozenset[str]]
    ) -> None:
        super().__init__(inner)
        self._schedulers = schedulers
        self._wanted = wanted
        self._told: set[tuple[str, str]] = set()

    async def sync(self, plan: Plan, changed: Owners) -> SyncReport:
        ports = (port for owner in changed if (port := plan.ports.get(owner)) is not None)
        wanted = {str(port.owner): self._wanted_by(port) for port in ports}
        await self._schedulers.ask(frozenset().union(*wanted.values()))
        missing = self._schedulers.missing
        lacking = {(name, owner) for owner, names in wanted.items() for name in names & missing}
        tell(lacking - self._told)
        self._told = {told for told in self._told if told[1] not in wanted} | lacking
        return await self._inner.sync(plan, changed)

    def distrust(self) -> None:
        self._schedulers.forget()
        super().distrust()

    def _wanted_by(self, port: PortPlan) -> frozenset[str]:
        try:
            return self._wanted(port)
        except Exception:  # a mistake of ours, which compiling it makes too, and tells
            return frozenset()


def tell(lacking: set[tuple[str, str]]) -> None:
    """Log each scheduler, with the Services that should have had it."""
    for scheduler in sorted({name for name, _owner in lacking}):
        owners = sorted(owner for name, owner in lacking if name == scheduler)
        more = [f"and {len(owners) - NAMED} more"] if len(owners) > NAMED else []
        services = ", ".join([*owners[:NAMED], *more])
        fields = {"scheduler": scheduler, "instead": FALLBACK, "services": services}
        log.warning("the kernel has no such scheduler", extra=fields)
