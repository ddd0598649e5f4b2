"""Proxy mode ``userspace``: sockets of this process carry the traffic.

It needs no packet filter and no NAT: Service addresses are made local to the node by routes, and
each frontend is a listening socket. The kernel keeps silent for it, by socket filters.
"""

import asyncio
import logging
import os

from pyproxy.config import Config, is_beside, sync_periods, with_setting
from pyproxy.model import Family
from pyproxy.proxier import Env
from pyproxy.proxier._capture import best, risk, why_not
from pyproxy.proxier._socketlb import Balanced
from pyproxy.proxier._sysctls import is_tracking, set_limits
from pyproxy.proxier._usertarget import Frontends, removed
from pyproxy.reconcile import Proxier, Reconciler
from pyproxy.rules.listeners import compile_owner

WORKERS_AT_MOST = 4  # for each family, unless told so: each takes some memory, used or not

log = logging.getLogger(__name__)


def unsupported() -> str | None:
    return None


def settled(config: Config) -> Config:
    """Choose how many serve, and how to capture.

    Raises ``LookupError`` when it is set to what cannot be here.
    """
    if not config.userspace.workers:
        cores = len(os.sched_getaffinity(0))
        config = with_setting(config, "userspace.workers", min(cores, WORKERS_AT_MOST))
    name = config.userspace.capture
    if name == "auto":
        return with_setting(config, "userspace.capture", best())
    reason = why_not(name)
    if reason is not None:
        raise LookupError(f"userspace.capture: {name} cannot work on this node: {reason}")
    if danger := risk(name):
        log.warning("userspace.capture", extra={"capture": name, "problem": danger})
    return config


def prepare(config: Config) -> tuple[str, ...]:
    """Set the limits of connection tracking where others need it: this mode does not."""
    if is_beside(config):
        return ()
    if not is_tracking():
        log.debug("connections are not tracked: no limits to set")
        return ()
    return set_limits(config.conntrack)


def build(env: Env) -> Proxier:
    frontends = Frontends(env)
    target = Balanced(env, frontends, lambda: frontends.is_over)
    env.tasks.create_task(watch(frontends, env), name=f"watch routes IPv{env.family}")
    return Reconciler("userspace", env.family, compile_owner, target, env.clock)


def fixed(_env: Env) -> tuple[()]:
    return ()  # all that there is is for Services


async def cleanup(family: Family, _config: Config, *, ours: bool = True) -> str | None:
    """Remove what outlives the process. kube-proxy has none of it."""
    return removed(family) if ours else None


async def watch(frontends: Frontends, env: Env) -> None:
    """Have routes, routing rules and tables made again that others removed, for ever."""
    period, _ = sync_periods(env.config, "userspace")
    while True:
        await asyncio.sleep(period)
        if await frontends.has_lost():
            env.resync()
