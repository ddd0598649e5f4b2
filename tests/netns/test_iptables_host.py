"""Mode iptables among rules of others: they stay as they are, from the start to the cleanup."""

import asyncio
import subprocess
from contextlib import asynccontextmanager

import pytest
from msgspec import structs

from pyproxy import proxier
from pyproxy.config import Config
from pyproxy.host import Host
from pyproxy.process import SystemClock
from pyproxy.proxier._flavour import FLAVOURS, chosen_flavour, programs_of
from pyproxy.rules.iptables_text import from_bytes, is_ours, parsed
from tests.iptables_cluster import NODE_IP, cluster
from tests.netns.test_iptables import FOREIGN, flush, output_of, without_counters

OTHER = {"nft": "legacy", "legacy": "nft"}
MORE = """*raw
-A PREROUTING -m comment --comment "not of Kubernetes" -j ACCEPT
COMMIT
*filter
:FORWARD DROP [0:0]
:KUBE-KUBELET-OTHER - [0:0]
-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
-A POSTROUTING -p udp -m comment --comment "caf\udce9" -j ACCEPT
COMMIT
"""
FEW = "*filter\n-A OUTPUT -p tcp -m tcp --dport 9999 -j DROP\nCOMMIT\n"
MODE = proxier.load("iptables")


@pytest.fixture(params=FLAVOURS)
def flavour(request):
    """The flavour that this host uses, by the rules that others have in it."""
    emptied()
    for family in (4, 6):
        output_of(programs_of(family)[request.param].restore, "--noflush", text=FOREIGN + MORE)
    yield request.param
    emptied()
    output_of("ipset", "destroy")


def emptied():
    chosen_flavour.cache_clear()
    for family in (4, 6):
        for programs in programs_of(family).values():
            flush(programs)
            output_of(programs.plain, "-w", "-t", "raw", "-F")
            output_of(programs.plain, "-w", "-P", "FORWARD", "ACCEPT")


def everything():
    """What iptables-save prints, by family and flavour."""
    return {
        (family, flavour): without_counters(from_bytes(subprocess.check_output([programs.save])))
        for family in (4, 6)
        for flavour, programs in programs_of(family).items()
    }


def of_others(found):
    """The same without our chains and the jumps to them."""
    kept = {}
    for key, lines in found.items():
        ours = {chain for _table, chain in parsed("\n".join(lines)) if is_ours(chain)}
        kept[key] = [
            line
            for line in lines
            if line.removeprefix(":").split(" ")[0] not in ours
            and not (line.startswith("-A") and ({line.split(" ")[1], line.split(" ")[-1]} & ours))
        ]
    return kept


@asynccontextmanager
async def process(family, **changes):
    """The mode of one family, synced, as in a process of its own."""
    settings = structs.replace(Config().iptables, localhost_node_ports=False)
    config = structs.replace(Config(mode="iptables"), iptables=settings)
    chosen_flavour.cache_clear()
    async with asyncio.TaskGroup() as tasks:
        host = Host()
        await host.read()
        env = proxier.Env(
            family=family,
            config=config,
            clock=SystemClock(),
            tasks=ChildrenOf(tasks),
            host=host,
            node=None,
            node_ips=(NODE_IP[family],),
            observe=lambda proto, result: None,
        )
        carrier = MODE.build(env)
        plan = cluster(family, **changes)
        report = await carrier.sync(plan, set(plan.ports))
        assert report.error is None
        assert report.unserved == ()
        yield carrier
        await carrier.aclose()
        env.tasks.cancel()


class ChildrenOf:
    """A task group whose tasks can be ended."""

    def __init__(self, group):
        self._group = group
        self._tasks = []

    def create_task(self, job, *, name):
        task = self._group.create_task(job, name=name)
        self._tasks.append(task)
        return task

    def cancel(self):
        for task in self._tasks:
            task.cancel()


async def test_rules_of_others_outlive_us_unchanged(flavour):
    before = everything()
    assert MODE.unsupported() is None
    for family in (4, 6):
        async with process(family):
            assert of_others(everything()) == before
        async with process(family, endpoints=5):  # a restart, after something has changed
            assert of_others(everything()) == before
        assert any("KUBE-SVC-" in line for line in everything()[family, flavour])
        assert everything()[family, OTHER[flavour]] == before[family, OTHER[flavour]]
    for family in (4, 6):
        assert await MODE.cleanup(family, Config()) is None
    assert everything() == before
    assert output_of("ipset", "list", "-n") == ""


async def test_a_mixed_host_is_warned_of_and_keeps_both(flavour, caplog):
    other = programs_of(4)[OTHER[flavour]]
    output_of(other.restore, "--noflush", text=FEW)
    before = everything()
    async with process(4):
        assert "both flavours" in caplog.text
        assert of_others(everything()) == before
    assert await MODE.cleanup(4, Config()) is None
    assert everything() == before


async def test_what_we_left_in_the_other_flavour_is_removed_and_nothing_else(flavour, caplog):
    other = programs_of(4)[OTHER[flavour]]
    left = "*nat\n:KUBE-SERVICES - [0:0]\n-A OUTPUT -j KUBE-SERVICES\nCOMMIT\n"
    output_of(other.restore, "--noflush", text=FEW)
    before = everything()
    output_of(other.restore, "--noflush", text=left)
    async with process(4):
        for _ in range(1000):
            if "of the other flavour were removed" in caplog.text:
                break
            await asyncio.sleep(0.01)
    assert everything()[4, OTHER[flavour]] == before[4, OTHER[flavour]]
    assert "of the other flavour were removed" in caplog.text
