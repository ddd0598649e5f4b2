"""Whether this node has nf_tables, and who changed the tables that are ours."""

import asyncio
import logging
import os
from collections.abc import Callable

from msgspec import Struct

from pyproxy.proxier import Env
from pyproxy.proxier._nfnetlink import Generations, NfError, NfTables
from pyproxy.proxier._nfpack import delete_table, new_chain, new_rule, new_table
from pyproxy.proxier._nftarget import NfTarget
from pyproxy.rules.nft import Chain, Hook, Masquerade, MatchState, Rule, Table

AUDIT_SECONDS = 0.5
AUDIT_SHARE = 20  # an audit that took a second is followed by a pause of so many
LISTEN_AFTER_SECONDS = 10.0  # no family is loading its table any more
RETRY_SECONDS = 5.0

log = logging.getLogger(__name__)


def why_no_tables() -> str | None:
    """Say why nf_tables cannot be used; None if it can. Nothing is changed."""
    probe = Table(4, "pyproxy-probe")
    try:
        nf = NfTables()
    except OSError as error:
        return f"the kernel has no nf_tables ({error.strerror})"
    try:
        # Loads what the kernel has as modules: NAT, connection tracking with its sysctls.
        chain = Chain("probe", Hook("nat", "postrouting", 100))
        rule = Rule(chain.name, (MatchState("new"), Masquerade()))
        nf.commit([
            new_table(probe), new_chain(probe, chain), new_rule(probe, rule), delete_table(probe),
            delete_table(probe),
        ])  # fmt: skip
    except NfError as error:
        if error.index == 4:  # the last, which nothing can do: all others were right, and undone
            return None
        return f"{error}: it needs nf_tables in the kernel, and root or CAP_NET_ADMIN"
    finally:
        nf.close()
    return None


class Audit:
    """Has the table compared with what it should be, whenever somebody else changed any rules.

    The kernel numbers the states of all rules together: a number that is not the one we left may
    mean a change of other tables, or of ours. ``current`` returns what the rules depend on.
    """

    def __init__(self, env: Env, current: Callable[[], Struct], table: str) -> None:
        self._env = env
        self._current = current
        self._ruleset = current()
        self._table = table
        self._is_blind = False  # and it is told
        self._suspects: list[str] = []  # who changed any rules before the audit under way

    def found(self, count: int) -> None:
        """Tell that so much of the table was changed, and who may have done it."""
        self._env.drifted(self._table, count, ", ".join(self._suspects) or "somebody")

    def look_around(self) -> None:
        """Have the rules compared if they should be others now: most interfaces are no matter."""
        before, self._ruleset = self._ruleset, self._current()
        if self._ruleset != before:
            self._env.resync()

    async def run(self, target: NfTarget) -> None:
        """Poll the generation for ever; listen for who makes new ones while nothing is loaded.

        While anybody listens, the kernel takes ten times as long to load elements, ours and those
        of the other family. What goes wrong is logged, and tried again.
        """
        await target.settled.wait()
        while True:
            try:
                await self._poll(target)
            except (NfError, OSError) as error:
                if not self._is_blind:
                    log.warning("rules are not audited", extra={"error": str(error)})
                self._is_blind = True
            await asyncio.sleep(RETRY_SECONDS)

    async def _poll(self, target: NfTarget) -> None:
        clock = asyncio.get_running_loop().time
        listen_at = clock() + LISTEN_AFTER_SECONDS
        nf = NfTables()
        changes: Generations | None = None
        try:
            while True:
                await asyncio.sleep(AUDIT_SECONDS)
                if changes is None and clock() >= listen_at:
                    changes, listen_at = listener(), clock() + LISTEN_AFTER_SECONDS
                heard = changes.receive() if changes is not None else []
                others = [g for g in heard if g.pid != os.getpid()]
                known = target.generation
                if known is None or nf.generation().id == known:
                    self._tell_sight()
                    continue
                self._suspects = sorted({f"{g.process} ({g.pid})" for g in others})
                if changes is not None:
                    changes.close()
                    changes = None
                pause = AUDIT_SHARE * target.read_seconds
                listen_at = clock() + min(LISTEN_AFTER_SECONDS, pause)
                self._env.resync()
                await asyncio.sleep(pause)
        finally:
            nf.close()
            if changes is not None:
                changes.close()

    def _tell_sight(self) -> None:
        if self._is_blind:
            self._is_blind = False
            log.info("rules are audited again")


def listener() -> Generations | None:
    """Return what tells who changes rules; None if it cannot be had now."""
    try:
        return Generations()
    except OSError:
        return None
