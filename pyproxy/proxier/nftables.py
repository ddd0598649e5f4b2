"""Proxy mode ``nftables``: table ``pyproxy`` of nf_tables carries the traffic, over netlink."""

import asyncio
from functools import partial

from pyproxy.config import Config, is_beside, masquerade_all, networks_of
from pyproxy.model import Family
from pyproxy.proxier import Env
from pyproxy.proxier._around import node_port_ips, pods_of
from pyproxy.proxier._nfaudit import Audit, why_no_tables
from pyproxy.proxier._nfcount import COUNTED
from pyproxy.proxier._nfnetlink import NfError
from pyproxy.proxier._nftarget import NfTarget, delete_tables
from pyproxy.proxier._sysctls import set_limits
from pyproxy.proxier._tracked import Tracked
from pyproxy.reconcile import Proxier, Reconciler
from pyproxy.rules import nft_base, nft_beside
from pyproxy.rules.entries import Entry, fixed_of_table
from pyproxy.rules.nft import Table
from pyproxy.rules.nft_file import Base
from pyproxy.rules.nftables import Ruleset, compile_owner


def unsupported() -> str | None:
    return why_no_tables()


def settled(config: Config) -> Config:
    return config


def prepare(config: Config) -> tuple[str, ...]:
    return () if is_beside(config) else set_limits(config.conntrack)


def build(env: Env) -> Proxier:
    audit = Audit(env, partial(ruleset_for, env), nft_base.TABLE_NAME)
    counted = COUNTED[env.config.service_metrics]
    target = NfTarget(partial(ruleset_for, env), audit.found, base_of(env.config), counted)
    env.host.on_change(audit.look_around)
    env.tasks.create_task(audit.run(target), name=f"audit IPv{env.family}")
    compiled = partial(compile_owner, ruleset_for(env))  # owners look at its lasting part only
    return Tracked(Reconciler("nftables", env.family, compiled, target, env.clock), env)


def base_of(config: Config) -> Base:
    return nft_beside if is_beside(config) else nft_base


def fixed(env: Env) -> tuple[Entry, ...]:
    return fixed_of_table(base_of(env.config), ruleset_for(env))


async def cleanup(family: Family, config: Config, *, ours: bool = True) -> str | None:
    """Delete kube-proxy's table, and ours, whichever process left them."""
    names = [nft_base.TABLE_NAME] if ours else []
    if not is_beside(config):
        names.append("kube-proxy")
    try:
        await asyncio.to_thread(delete_tables, [Table(family, name) for name in names])
    except (NfError, OSError) as error:
        return str(error)
    return None


def ruleset_for(env: Env) -> Ruleset:
    """Return what the rules depend on besides the plan, as of now."""
    config = env.config
    return Ruleset(
        family=env.family,
        mark=1 << config.nftables.masquerade_bit,
        pods=pods_of(env, "*"),
        masquerade_all=masquerade_all(config, "nftables"),
        node_port_ips=node_port_ips(env),
        # Beside another proxy, who knows which of their addresses a Service has.
        service_cidrs=(
            () if is_beside(config) else networks_of(sorted(env.service_cidrs()), env.family)
        ),
        service_metrics=config.service_metrics,
    )
