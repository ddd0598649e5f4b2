"""Proxy mode ``ipvs``: the kernel's virtual servers carry the traffic, over netlink.

Table ``pyproxy-ipvs`` of nf_tables does what they cannot: see ``rules/ipvs.py``.
"""

import asyncio
from collections.abc import Mapping
from functools import partial
from ipaddress import ip_address

from msgspec.structs import replace

from pyproxy.config import Config, masquerade_all, networks_of, node_port_cidrs
from pyproxy.host import Snapshot
from pyproxy.model import Family, PortPlan
from pyproxy.proxier import Env
from pyproxy.proxier._around import pods_of
from pyproxy.proxier._ipvsaudit import audit
from pyproxy.proxier._ipvslocal import Leads
from pyproxy.proxier._ipvsnl import Ipvs
from pyproxy.proxier._ipvssched import Scheduled, Schedulers, missing_among
from pyproxy.proxier._ipvstarget import IpvsTarget, Settings, delete_all
from pyproxy.proxier._kubeipvs import (
    DEVICE,
    Shown,
    make_device,
    remove_device,
    remove_leftovers,
)
from pyproxy.proxier._nfaudit import Audit, why_no_tables
from pyproxy.proxier._nfcount import COUNTED_BESIDE
from pyproxy.proxier._nfnetlink import NfError
from pyproxy.proxier._nftarget import NfTarget, delete_tables
from pyproxy.proxier._sysctls import apply, set_limits
from pyproxy.proxier._tracked import Tracked
from pyproxy.proxier._vips import RTPROT_IPVS, Vips
from pyproxy.reconcile import Proxier, Reconciler
from pyproxy.rules import ipvs_base
from pyproxy.rules import nftables as table_rules
from pyproxy.rules.entries import Entry, fixed_of_table
from pyproxy.rules.ipvs import (
    FALLBACK,
    Content,
    Items,
    Key,
    Ruleset,
    compile_owner,
    wanted_schedulers,
)

SYSCTLS = {
    "net/ipv4/vs/conntrack": 1,  # else nothing is masqueraded
    "net/ipv4/vs/expire_nodest_conn": 1,
    "net/ipv4/vs/expire_quiescent_template": 1,  # clients leave a backend of weight 0
    "net/ipv4/ip_forward": 1,
}
STRICT_ARP = {"net/ipv4/conf/all/arp_ignore": 1, "net/ipv4/conf/all/arp_announce": 2}
NO_SOURCE = ("127.", "fe80:")


def unsupported() -> str | None:
    try:
        Ipvs(4).close()
    except OSError as error:
        return f"the kernel has no ip_vs ({error.strerror})"
    return why_no_tables()


def settled(config: Config) -> Config:
    return config


def prepare(config: Config) -> tuple[str, ...]:
    unset = set_limits(config.conntrack)
    sysctls = SYSCTLS | (STRICT_ARP if config.ipvs.strict_arp else {})
    seconds = (
        config.ipvs.tcp_timeout_seconds,
        config.ipvs.tcp_fin_timeout_seconds,
        config.ipvs.udp_timeout_seconds,
    )
    try:
        ipvs = Ipvs(4)  # the sysctls are there only from then on
        try:
            if any(seconds):
                ipvs.set_timeouts(*map(int, seconds))
            scheduler = config.ipvs.scheduler or FALLBACK
            if missing_among({scheduler}, ipvs):
                unset += (no_default(scheduler),)
        finally:
            ipvs.close()
    except OSError as error:
        unset += (f"cannot set the timeouts of ip_vs: {error.strerror}",)
    unset += tuple(str(problem) for problem in apply(sysctls))
    problem = make_device() if config.ipvs.bind_addresses else remove_device()
    return (*unset, problem) if problem else unset


def no_default(scheduler: str) -> str:
    return f"ipvs.scheduler: the kernel has no scheduler {scheduler}, and {FALLBACK} is used"


def build(env: Env) -> Proxier:
    rulesets = Rulesets(env)
    changes = Audit(env, rulesets.current, ipvs_base.TABLE_NAME)
    counts = env.config.service_metrics != "off"
    table = NfTarget(
        lambda: rulesets.current().table,
        changes.found,
        ipvs_base,
        counted=COUNTED_BESIDE if counts else (),
    )
    settings = Settings(
        drain_seconds=env.config.ipvs.drain_timeout_seconds,
        excluded=networks_of(env.config.ipvs.exclude_cidrs, env.family),
        counts_refusals=counts,
    )
    target = IpvsTarget(env.family, table, env.clock, partial(connect, env), settings)
    env.host.on_change(changes.look_around)
    env.tasks.create_task(target.drain(), name=f"drain IPv{env.family}")
    env.tasks.create_task(changes.run(table), name=f"audit table IPv{env.family}")
    env.tasks.create_task(audit(env, target), name=f"audit servers IPv{env.family}")
    inner = Reconciler("ipvs", env.family, rulesets.compiled, target, env.clock)
    return Scheduled(Tracked(inner, env), rulesets.schedulers, rulesets.wanted_schedulers)


def fixed(env: Env) -> tuple[Entry, ...]:
    return fixed_of_table(ipvs_base, ruleset_for(env).table)


def connect(env: Env) -> tuple[Ipvs, Leads]:
    vips = Vips(env.family, source_of(env), mark=RTPROT_IPVS)
    if env.config.ipvs.bind_addresses:
        return Ipvs(env.family), Shown(vips, env.family, partial(own_ips, env))
    return Ipvs(env.family), vips


async def cleanup(family: Family, config: Config, *, ours: bool = True) -> str | None:
    """Delete what kube-proxy left, and our virtual servers, routes and table.

    Virtual servers of others in ``ipvs.excludeCIDRs`` stay, with their addresses.
    """
    spared = networks_of(config.ipvs.exclude_cidrs, family)
    try:
        await asyncio.to_thread(remove_leftovers, family, spared, ours=ours)
        if ours:
            await asyncio.to_thread(delete_tables, [ipvs_base.table(family)])
            await asyncio.to_thread(delete_all, family)
    except (NfError, OSError) as error:
        return str(error)
    return None


class Rulesets:
    """What the items depend on besides the plan: made again when the node's addresses change."""

    def __init__(self, env: Env) -> None:
        self._env = env
        self._snapshot: Snapshot | None = None
        self._cidrs: tuple[str, ...] = ()
        self._ruleset: Ruleset | None = None
        self.schedulers = Schedulers(lambda: Ipvs(env.family))

    def current(self) -> Ruleset:
        snapshot, cidrs = self._env.host.snapshot, self._env.service_cidrs()
        if self._ruleset is None or (snapshot, cidrs) != (self._snapshot, self._cidrs):
            self._snapshot, self._cidrs = snapshot, cidrs
            self._ruleset = ruleset_for(self._env)
        if self._ruleset.missing != self.schedulers.missing:
            self._ruleset = replace(self._ruleset, missing=self.schedulers.missing)
        return self._ruleset

    def compiled(self, port: PortPlan, before: Mapping[Key, Content]) -> Items:
        return compile_owner(self.current(), port, before)

    def wanted_schedulers(self, port: PortPlan) -> frozenset[str]:
        return wanted_schedulers(self.current(), port)


def ruleset_for(env: Env) -> Ruleset:
    config = env.config
    node_ips = serving_ips(env)
    table = table_rules.Ruleset(
        family=env.family,
        mark=1 << config.iptables.masquerade_bit,
        pods=pods_of(env, "*"),
        masquerade_all=masquerade_all(config, "ipvs"),
        node_port_ips=node_ips,
        service_cidrs=networks_of(sorted(env.service_cidrs()), env.family),
        service_metrics=config.service_metrics,
    )
    return Ruleset(table, node_ips, config.ipvs.scheduler or FALLBACK)


def serving_ips(env: Env) -> tuple[str, ...]:
    """Return the node's addresses that serve node ports: no loopback, nor of a link only."""
    snapshot = without_device(env)
    ranges = node_port_cidrs(env.config, env.family, env.node_ips)
    own = snapshot.ips(env.family) if ranges is None else snapshot.ips_in(env.family, ranges)
    addresses = (ip_address(ip) for ip in sorted(own))
    return tuple(str(ip) for ip in addresses if not ip.is_loopback and not ip.is_link_local)


def without_device(env: Env) -> Snapshot:
    """Return the node's addresses without those that are there to be seen only."""
    addresses = env.host.snapshot.addresses
    return Snapshot(frozenset((name, ip) for name, ip in addresses if name != DEVICE))


def own_ips(env: Env) -> frozenset[str]:
    return without_device(env).ips(env.family)


def source_of(env: Env) -> str | None:
    """Return the address that the node's own connections to Services come from."""
    own = {ip for ip in own_ips(env) if not ip.startswith(NO_SOURCE)}
    preferred = [ip for ip in env.node_ips if ip in own]
    return next(iter(preferred + sorted(own)), None)
