"""Proxy mode ``iptables``: rules in tables filter and nat carry the traffic."""

import asyncio
import logging
from functools import partial
from pathlib import Path

from pyproxy.config import PRIMARY, Config, masquerade_all, node_port_cidrs
from pyproxy.metrics import INVALID, LOCALHOST
from pyproxy.model import Family, Network
from pyproxy.proxier import Env, _iptc, _nfacct
from pyproxy.proxier._around import node_port_ips, pods_of
from pyproxy.proxier._flavour import answer_of, chosen_flavour, programs_of, tables_with
from pyproxy.proxier._ipset import IpSets
from pyproxy.proxier._iptables import Iptables, IptablesError
from pyproxy.proxier._iptarget import IpTarget, remove, remove_chains
from pyproxy.proxier._sysctls import apply, set_limits
from pyproxy.proxier._tracked import Tracked
from pyproxy.reconcile import Proxier, Reconciler
from pyproxy.rules.entries import Entry, fixed_of_iptables
from pyproxy.rules.iptables import Ruleset, compile_owner
from pyproxy.rules.iptables_base import INVALID_DROPPED, LOCALHOST_ACCEPTED, TABLES, has_localhost
from pyproxy.rules.iptables_text import is_ours

ROUTE_LOCALNET = "net/ipv4/conf/all/route_localnet"
BE_LIBERAL = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal")

log = logging.getLogger(__name__)


def unsupported() -> str | None:
    flavour = chosen_flavour()
    if flavour is None:
        return "iptables, iptables-save and iptables-restore are not all in PATH"
    for found in (programs_of(family).get(flavour) for family in (4, 6)):
        # IPv6 may be missing: what matters then is that nobody asks for it.
        if found is not None:
            code, text = answer_of(found.plain, "-w", "5", "-t", "nat", "-S", "POSTROUTING")
            if code:
                reason = text.strip().splitlines()[0] if text.strip() else f"exit code {code}"
                return f"{found.plain}: {reason}: it needs root or CAP_NET_ADMIN"
    try:
        IpSets(4).close()
    except OSError as error:
        return f"the kernel has no ip_set ({error.strerror})"
    return None


def settled(config: Config) -> Config:
    return config


def prepare(config: Config) -> tuple[str, ...]:
    unset = set_limits(config.conntrack)
    primary_only = config.node_port_addresses == (PRIMARY,)
    if not primary_only and serves_localhost(config, node_port_cidrs(config, 4, ())):
        unset += tuple(str(problem) for problem in apply({ROUTE_LOCALNET: 1}))
    return unset


def build(env: Env) -> Proxier:
    tables = tables_of(env.family)
    if tables.programs.flavour == "legacy":
        _iptc.load()
    target = IpTarget(tables, partial(ruleset_for, env), partial(tell_drift, env), env.restored)
    env.counted(INVALID, partial(_nfacct.packets, INVALID_DROPPED))
    env.counted(LOCALHOST, partial(_nfacct.packets, LOCALHOST_ACCEPTED))
    env.host.on_change(partial(compare, target, env))
    env.tasks.create_task(watch(tables, target, env), name=f"watch IPv{env.family}")
    compiled = partial(compile_owner, ruleset_for(env))  # owners look at its lasting part only
    return Tracked(Reconciler("iptables", env.family, compiled, target, env.clock), env)


def fixed(env: Env) -> tuple[Entry, ...]:
    return fixed_of_iptables(ruleset_for(env))


def compare(target: IpTarget, env: Env) -> None:
    """Have the rules looked at again if other addresses serve node ports now.

    Interfaces come and go with every pod, and to read all rules takes long.
    """
    if target.ruleset is not None and target.ruleset != ruleset_for(env):
        env.resync()


def tell_drift(env: Env, count: int) -> None:
    env.drifted("nat", count, "somebody")  # iptables does not tell who


async def cleanup(family: Family, _config: Config, *, ours: bool = True) -> str | None:
    """Remove our rules and kube-proxy's, of whichever flavour they are.

    Both use the same chains, so that what kube-proxy left is gone with our first sync.
    """
    if not ours:
        return None
    tables = [tables_with(programs) for programs in programs_of(family).values()]
    try:
        await remove(tables, family)
        _nfacct.remove()
    except (IptablesError, OSError) as error:
        return str(error)
    return None


def tables_of(family: Family) -> Iptables:
    flavour = chosen_flavour()
    assert flavour is not None, "unsupported() has said so"
    return tables_with(programs_of(family)[flavour])


def ruleset_for(env: Env) -> Ruleset:
    """Return what the rules depend on besides the plan, as of now."""
    config, family = env.config, env.family
    ranges = node_port_cidrs(config, family, env.node_ips)
    localhost = family == 4 and serves_localhost(config, ranges)
    flavour = chosen_flavour()
    programs = programs_of(family).get(flavour) if flavour else None
    return Ruleset(
        family=family,
        mark=1 << config.iptables.masquerade_bit,
        pods=pods_of(env, "+"),
        masquerade_all=masquerade_all(config, "iptables"),
        node_port_ips=node_port_ips(env, loopback=localhost),
        localhost_node_ports=localhost,
        drop_invalid=not is_liberal(),
        random_fully=programs is None or programs.random_fully,
        counted=_nfacct.ensured(),
        commented=flavour != "legacy",  # it copies all rules at each change: a ninth are comments
    )


def serves_localhost(config: Config, ranges: tuple[Network, ...] | None) -> bool:
    """Say whether node ports answer on loopback addresses of IPv4."""
    return config.iptables.localhost_node_ports and has_localhost(ranges)


def is_liberal() -> bool:
    """Say whether connection tracking lets segments outside the window through, by choice."""
    try:
        return BE_LIBERAL.read_text().strip() != "0"
    except OSError:
        return False


async def watch(tables: Iptables, target: IpTarget, env: Env) -> None:
    """Once our rules are there, keep them the only ones, and there.

    A chain that only a flush of all rules removes tells of one.
    """
    await target.established.wait()
    for flavour, programs in programs_of(env.family).items():
        if flavour != tables.programs.flavour:
            await remove_leftovers(tables_with(programs))
    while True:
        await asyncio.sleep(env.config.iptables.sync_period_seconds)
        if not await tables.has_canary():
            env.resync()
        await tell_packets(tables, env)


async def tell_packets(tables: Iptables, env: Env) -> None:
    """Tell how many packets have come to our chains, for the metrics.

    Table nat may be large, and flavour legacy reads the whole of a table for a part of it.
    """
    try:
        found = await tables.packets("filter")
    except IptablesError as error:
        log.debug("packets cannot be counted", extra={"error": str(error)})
        return
    env.passed("filter", {chain: count for chain, count in found.items() if is_ours(chain)})


async def remove_leftovers(tables: Iptables) -> None:
    """Remove what an earlier process left in the other flavour, where packets would meet it."""
    try:
        found = [chain for table in TABLES for chain in await tables.chains(table)]
        if ours := [chain for chain in found if is_ours(chain)]:
            await remove_chains(tables)
            fields = {"flavour": tables.programs.flavour, "chains": len(ours)}
            log.warning("rules of the other flavour were removed", extra=fields)
    except IptablesError as error:
        log.warning("rules of the other flavour stay", extra={"error": str(error)})
