"""Ends flows that the kernel would go on sending where they should no longer go.

Rules are for the first packet of a connection: what is known to connection tracking never meets
them again. After each sync, the flows that its changes condemn are deleted.
"""

import asyncio
import logging

from pyproxy.cache import Owners
from pyproxy.plan import Plan
from pyproxy.proxier import Env
from pyproxy.proxier._around import surroundings
from pyproxy.proxier._conntrack import Conntrack, clean
from pyproxy.reconcile import Outer, Proxier
from pyproxy.report import SyncReport
from pyproxy.rules.flows import Pending, Review

log = logging.getLogger(__name__)


class Tracked(Outer):
    """A proxier of a kernel mode, and the flows that its syncs leave behind."""

    def __init__(self, inner: Proxier, env: Env) -> None:
        super().__init__(inner)
        self._env = env
        self._pending = Pending(ends_forbidden=env.config.conntrack.end_forbidden_flows)
        self._failing = False

    async def sync(self, plan: Plan, changed: Owners) -> SyncReport:
        self._pending.note(changed)
        report = await self._inner.sync(plan, changed)
        if report.error is None:
            review = self._pending.take(plan.ports, report.failed)
            if review:
                await self._clean(review)
        return report

    async def _clean(self, review: Review) -> None:
        """Delete what the review condemns. That it fails is told, and is no failed sync."""
        started = self._env.clock.monotonic()
        try:
            deleted = await asyncio.to_thread(
                clean, Conntrack(self._env.family), review, surroundings(self._env)
            )
        except OSError as error:
            if not self._failing:
                log.warning("cannot end old flows", extra={"error": error.strerror})
            self._failing = True
            return
        self._failing = False
        self._env.cleaned(self._env.clock.monotonic() - started, deleted)
