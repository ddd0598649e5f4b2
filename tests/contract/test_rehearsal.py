"""What no mode can pack is found out by the owner whose it is, and without the kernel."""

import asyncio
import struct
from functools import partial

import pytest
from msgspec.structs import replace

from pyproxy import proxier
from pyproxy.config import Config
from pyproxy.host import Host
from pyproxy.plan import plan_port
from pyproxy.process import SystemClock
from pyproxy.proxier._iptarget import IpTarget
from pyproxy.proxier._ipvstarget import IpvsTarget
from pyproxy.proxier._nftarget import NfTarget
from pyproxy.proxier._socketlb import Balanced
from pyproxy.proxier._usertarget import Frontends
from pyproxy.rules import iptables, ipvs, ipvs_base, listeners, nftables
from tests.builders import SITE, endpoint, service_port

NFT, IPT = nftables.Ruleset(4), iptables.Ruleset(4)
IPVS = ipvs.Ruleset(NFT, ("192.0.2.11",))
COMPILERS = {
    "userspace": listeners.compile_owner,
    "iptables": partial(iptables.compile_owner, IPT),
    "nftables": partial(nftables.compile_owner, NFT),
    "ipvs": partial(ipvs.compile_owner, IPVS),
}
FOR_EVER = 1 << 70  # seconds
BAD = {
    "userspace": {"affinity_seconds": FOR_EVER},
    "nftables": {"affinity_seconds": FOR_EVER},
    "ipvs": {"affinity_seconds": FOR_EVER},
    "iptables": {"port": 70_000},
}


def target_of(mode, tasks):
    if mode == "nftables":
        return NfTarget(lambda: NFT)
    if mode == "iptables":
        return IpTarget(None, lambda: IPT)
    if mode == "ipvs":
        table = NfTarget(lambda: NFT, base=ipvs_base)
        return IpvsTarget(4, table, SystemClock(), lambda: None)
    nobody = lambda proto, result: None  # noqa: E731
    env = proxier.Env(4, Config(mode=mode), SystemClock(), tasks, Host(), None, (), nobody)
    return Balanced(env, Frontends(env))


def entries_of(mode, **fields):
    port = replace(service_port(affinity_seconds=60), **fields)
    return COMPILERS[mode](plan_port(port, [endpoint(1)], SITE), {})


@pytest.mark.parametrize("mode", proxier.modes())
async def test_entries_that_cannot_be_packed_are_told_from_those_that_can(mode):
    good, bad = entries_of(mode), entries_of(mode, **BAD[mode])
    async with asyncio.TaskGroup() as tasks:
        target = target_of(mode, tasks)
        for _twice in range(2):
            target.rehearse(good)
            with pytest.raises((struct.error, OverflowError)):
                target.rehearse(bad)
