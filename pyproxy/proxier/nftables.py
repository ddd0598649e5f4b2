"""Proxy mode ``nftables``: table ``pyproxy`` of nf_tables carries the traffic, over netlink."""

import asyncio
import logging
import os
from functools import partial

from pyproxy.config import Config, local_cidr, masquerade_all, networks_of, node_port_cidrs
from pyproxy.model import Family, Network
from pyproxy.proxier import Env
from pyproxy.proxier._nfnetlink import Generations, NfError, NfTables
from pyproxy.proxier._nfpack import delete_table, new_chain, new_rule, new_table
from pyproxy.proxier._nftarget import NfTarget, delete_tables
from pyproxy.proxier._tracked import Tracked, set_limits
from pyproxy.reconcile import Proxier, Reconciler
from pyproxy.rules import nft_base
from pyproxy.rules.nft import Chain, Hook, Masquerade, MatchState, Rule, Table
from pyproxy.rules.nftables import Ruleset, compile_owner

AUDIT_SECONDS = 0.5
AUDIT_SHARE = 20  # an audit that took a second is followed by a pause of so many

LISTEN_AFTER_SECONDS = 10.0  # no family is loading its table any more

log = logging.getLogger(__name__)


def unsupported() -> str | None:
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


def prepare(config: Config) -> tuple[str, ...]:
    return set_limits(config)


def build(env: Env) -> Proxier:
    audit = Audit(env)
    target = NfTarget(partial(ruleset_for, env), audit.found)
    env.host.on_change(audit.look_around)
    env.tasks.create_task(audit.run(target), name=f"audit IPv{env.family}")
    compiled = partial(compile_owner, ruleset_for(env))  # owners look at its lasting part only
    return Tracked(Reconciler("nftables", env.family, compiled, target, env.clock), env)


async def cleanup(family: Family, *, ours: bool = True) -> str | None:
    """Delete kube-proxy's table, and ours, whichever process left them."""
    names = ["kube-proxy", *([nft_base.TABLE_NAME] if ours else [])]
    try:
        await asyncio.to_thread(delete_tables, [Table(family, name) for name in names])
    except (NfError, OSError) as error:
        return str(error)
    return None


def ruleset_for(env: Env) -> Ruleset:
    """Return what the rules depend on besides the plan, as of now."""
    config = env.config
    ranges = node_port_cidrs(config, env.family, env.node_ips)
    return Ruleset(
        family=env.family,
        mark=1 << config.nftables.masquerade_bit,
        pods=pods_of(env),
        masquerade_all=masquerade_all(config, "nftables"),
        node_port_ips=None if ranges is None else node_port_ips(env, ranges),
        service_cidrs=networks_of(sorted(env.service_cidrs()), env.family),
    )


def pods_of(env: Env) -> Network | str | None:
    match env.config.detect_local_mode:
        case "BridgeInterface":
            return env.config.detect_local.bridge_interface
        case "InterfaceNamePrefix":
            return f"{env.config.detect_local.interface_name_prefix}*"
        case _:
            return local_cidr(env.config, env.family, env.node)


def node_port_ips(env: Env, ranges: tuple[Network, ...]) -> tuple[str, ...]:
    """Return the node's addresses that serve node ports: never one of loopback."""
    found = env.host.snapshot.ips_in(env.family, ranges)
    return tuple(ip for ip in found if not ip.startswith("127.") and ip != "::1")


class Audit:
    """Has the table compared with what it should be, whenever somebody else changed any rules.

    The kernel numbers the states of all rules together: a number that is not the one we left may
    mean a change of other tables, or of ours.
    """

    def __init__(self, env: Env) -> None:
        self._env = env
        self._ruleset = ruleset_for(env)
        self._suspects: list[str] = []  # who changed any rules before the audit under way

    def found(self, count: int) -> None:
        """Tell that so much of the table was changed, and who may have done it."""
        self._env.drifted(nft_base.TABLE_NAME, count, ", ".join(self._suspects) or "somebody")

    def look_around(self) -> None:
        """Have the rules compared if they should be others now: most interfaces are no matter."""
        before, self._ruleset = self._ruleset, ruleset_for(self._env)
        if self._ruleset != before:
            self._env.resync()

    async def run(self, target: NfTarget) -> None:
        """Poll the generation for ever; listen for who makes new ones while nothing is loaded.

        While anybody listens, the kernel takes ten times as long to load elements, ours and those
        of the other family.
        """
        await target.settled.wait()
        clock = asyncio.get_running_loop().time
        listen_at = clock() + LISTEN_AFTER_SECONDS
        nf = NfTables()
        changes: Generations | None = None
        try:
            while True:
                await asyncio.sleep(AUDIT_SECONDS)
                if changes is None and clock() >= listen_at:
                    changes = Generations()
                heard = changes.receive() if changes is not None else []
                others = [g for g in heard if g.pid != os.getpid()]
                known = target.generation
                if known is None or nf.generation().id == known:
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
