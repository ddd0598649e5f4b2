"""Table ``pyproxy`` in the kernel: made, changed, found again, mended, removed."""

import re
import subprocess
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import ip_network
from itertools import permutations

import pytest

from pyproxy.cache import Cache
from pyproxy.model import (
    Address,
    Endpoint,
    EndpointSlice,
    ObjectName,
    PortKey,
    Remove,
    Service,
    SpecPort,
    Upsert,
)
from pyproxy.plan import Planner, Site
from pyproxy.process import SystemClock
from pyproxy.proxier._nfcount import COUNTED
from pyproxy.proxier._nfnetlink import NfTables
from pyproxy.proxier._nftarget import NfTarget
from pyproxy.reconcile import Reconciler, Verified
from pyproxy.rules.nftables import Ruleset, compile_owner
from tests.builders import HERE, owner
from tests.manifest_builders import rules_text
from tests.scenarios import scenario

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])
both = pytest.mark.parametrize("family", [4, 6])
WORD = {4: "ip", 6: "ip6"}
VIP = {4: "10.96.0.{}", 6: "fd00:10:96::{}"}
POD = {4: "10.244.1.{}", 6: "fd00:10:244::{}"}
PODS = {4: "10.244.0.0/16", 6: "fd00:10:244::/48"}
NODE_IP = {4: "192.0.2.11", 6: "fd00:c0de::11"}
STRANGER = {4: "198.51.100.50", 6: "fd00:5e::50"}


def nft(*arguments, stdin=""):
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        ["nft", *arguments], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )
    output, _ = child.communicate(stdin, timeout=60)
    assert child.returncode == 0, output
    return output


def generation():
    tables = NfTables()
    try:
        return tables.generation().id
    finally:
        tables.close()


@pytest.fixture(autouse=True)
def no_rules():
    nft("flush", "ruleset")
    yield
    nft("flush", "ruleset")


class Node:
    """The rules of one family, and what tests say of them in few words."""

    def __init__(self, family, counts="off"):
        self.family = family
        self.drifts = []
        self.cache, self.planner = Cache(family), Planner()
        ruleset = Ruleset(
            family,
            pods=ip_network(PODS[family]),
            node_port_ips=(NODE_IP[family],),
            service_cidrs=(ip_network(VIP[family].format(0) + "/112" * (family == 6)),),
            service_metrics=counts,
        )
        self.target = NfTarget(lambda: ruleset, self.drifts.append, counted=COUNTED[counts])
        self.reconciler = Reconciler(
            "nftables", family, partial(compile_owner, ruleset), self.target, SystemClock()
        )

    async def change(self, *changes):
        pending = set()
        for change in changes:
            pending |= self.cache.apply(change)
        changed = self.planner.update(pending, self.cache, Site(HERE, NODE_IP[self.family]))
        report = await self.reconciler.sync(self.planner.plan, changed)
        assert report.error is None
        return report

    async def audit(self):
        self.reconciler.distrust()
        return await self.change()

    def service(self, name, number, **fields):
        ip = {f"cluster_ip{self.family}": VIP[self.family].format(number)}
        ports = (SpecPort("", "TCP", 80, fields.pop("node_port", 0)),)
        return Upsert("Service", Service(ObjectName("default", name), ports=ports, **ip, **fields))

    def endpoints(self, name, *numbers):
        found = tuple(
            Endpoint(Address(POD[self.family].format(n), 8080), node="here") for n in numbers
        )
        same = ObjectName("default", name)
        return Upsert(
            "EndpointSlice", EndpointSlice(same, same, self.family, {PortKey("", "TCP"): found})
        )

    def shop(self):
        """Services of all kinds."""
        return [
            self.service("web", 1, node_port=30080, load_balancer_ips=("203.0.113.9",)),
            self.endpoints("web", 1, 2, 3),
            self.service("login", 2, affinity_seconds=600, type="NodePort", node_port=30081),
            self.endpoints("login", 4, 5),
            self.service(
                "api", 3, type="LoadBalancer", load_balancer_ips=(VIP[self.family].format(103),),
                external_local=True, source_ranges=(ip_network(PODS[self.family]),),
            ),
            self.endpoints("api", 6),
            self.service("idle", 4, node_port=30082),
        ]  # fmt: skip

    def listing(self, table="pyproxy"):
        return nft("list", "table", WORD[self.family], table)

    def elements(self, name):
        """What nft lists of a set, between the braces."""
        listed = nft("list", "set" if "affinity" in name else "map", WORD[self.family],
                     "pyproxy", name)  # fmt: skip
        found = re.search(r"elements = \{(.*?)\}", listed, re.DOTALL)
        return sorted(" ".join(e.split()) for e in found[1].split(",")) if found else []

    def by_hand(self, command, *rest):
        """Do with nft what somebody else might do."""
        verb, kind = command.split()
        nft(verb, kind, WORD[self.family], "pyproxy", *rest)

    def clients(self, number):
        """The name of the set of clients of an endpoint."""
        ip = POD[self.family].format(number).replace(":", ".")
        return next(
            name for name in re.findall(r"set (affinity-\S+)", self.listing()) if f"__{ip}/" in name
        )


@asynccontextmanager
async def started(family, counts="off"):
    """A process: what it leaves in the kernel stays."""
    node = Node(family, counts)
    try:
        yield node
    finally:
        await node.reconciler.aclose()


@both
async def test_a_first_sync_makes_the_table(family):
    async with started(family) as node:
        report = await node.change(*node.shop())
        assert report.full
        assert node.elements("endpoints")[:3] == [
            f"{VIP[family].format(1)} . tcp . 80 . {n} : {POD[family].format(n + 1)} . 8080"
            for n in range(3)
        ]
        assert node.elements("no-endpoints") == [
            f'{VIP[family].format(4)} . tcp . 80 comment "default/idle" : goto refuse'
        ]
        assert node.drifts == []


@pytest.mark.parametrize("path", scenario.FILES, ids=lambda path: path.stem)
async def test_what_is_rendered_for_a_scenario_can_be_loaded(path):
    told = scenario.read(path)
    text = rules_text("nftables", told.objects, told.settings)
    nft("-f", "-", stdin=text)
    once = nft("list", "ruleset")
    nft("-f", "-", stdin=text)
    assert nft("list", "ruleset") == once
    assert once.count("table ") == 2


@both
async def test_increments_leave_what_one_fresh_write_leaves(family):
    async with started(family) as node:
        await node.change(*node.shop())
        await node.change(node.endpoints("web", 1, 2, 3, 4), node.endpoints("api"))
        await node.change(node.endpoints("login", 5), Remove("Service", ObjectName("default", "x")))
        await node.change(Remove("Service", ObjectName("default", "idle")))
        await node.audit()  # shared chains that nobody uses any more go now
        grown = node.listing()
        assert node.drifts == []
    nft("flush", "ruleset")
    async with started(family) as fresh:
        changes = [change for change in fresh.shop() if "idle" not in str(change.obj.name)]
        changes += [fresh.endpoints("web", 1, 2, 3, 4), fresh.endpoints("login", 5)]
        await fresh.change(*changes, fresh.endpoints("api"))
        assert sorted(fresh.listing().splitlines()) == sorted(grown.splitlines())


@both
async def test_one_endpoint_more_is_one_transaction_of_its_elements(family):
    async with started(family) as node:
        await node.change(*node.shop())
        before = generation()
        report = await node.change(node.endpoints("web", 1, 2, 3, 7))
        assert generation() == before + 1
        assert not report.full
        assert node.elements("endpoints")[3:4] == [
            f"{VIP[family].format(1)} . tcp . 80 . 3 : {POD[family].format(7)} . 8080"
        ]


@both
@pytest.mark.parametrize("counts", COUNTED)
async def test_a_restart_finds_everything_and_writes_nothing(family, counts):
    async with started(family, counts) as node:
        await node.change(*node.shop())
        assert await node.target.compare(node.reconciler.written()) == ()
    before, listing = generation(), node.listing()
    async with started(family, counts) as again:
        report = await again.change(*again.shop())
        assert (report.full, report.error) == (True, None)
        assert generation() == before, "the kernel has seen no transaction"
        assert again.listing() == listing
        assert again.drifts == [], "what happened while nobody looked is nobody's drift"


@both
async def test_a_restart_that_counts_elsewhere_writes_what_one_from_nothing_would(family):
    for before, after in permutations(COUNTED, 2):
        async with started(family, after) as node:
            await node.change(*node.shop())
            expected = node.listing()
        nft("flush", "ruleset")
        async with started(family, before) as node:
            await node.change(*node.shop())
        async with started(family, after) as again:
            await again.change(*again.shop())
            assert again.listing() == expected, (before, after)


@both
async def test_a_restart_takes_in_what_has_changed_meanwhile(family):
    async with started(family) as node:
        await node.change(*node.shop())
    async with started(family) as again:
        await again.change(*again.shop(), again.endpoints("web", 2, 3))
        assert again.elements("endpoints")[:2] == [
            f"{VIP[family].format(1)} . tcp . 80 . {slot} : {POD[family].format(number)} . 8080"
            for slot, number in enumerate((3, 2))
        ], "the second stays in its slot"


@both
async def test_what_others_change_is_mended_and_counted(family):
    async with started(family) as node:
        await node.change(*node.shop())
        listing = node.listing()
        front = f"{VIP[family].format(1)} . tcp . 80"
        node.by_hand("delete element", "endpoints", f"{{ {front} . 1 }}")
        node.by_hand("flush chain", "pick-3")
        await node.audit()
        assert sorted(node.listing().splitlines()) == sorted(listing.splitlines())
        assert node.drifts == [2]
        await node.audit()
        assert node.drifts == [2], "nothing more"


@both
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(("flush chain", "nat-prerouting"), id="a chain of the fixed part is empty"),
        pytest.param(("add rule", "services", "accept"), id="a rule more in the fixed part"),
        pytest.param(("flush set", "cluster-ips"), id="a set is empty"),
        pytest.param(("flush map", "service-ips"), id="a map is empty"),
        pytest.param(("add element", "node-port-ips", "{{ {} }}"), id="another node port address"),
        pytest.param(("add chain", "service-XX/mine"), id="a chain more, named like ours"),
        pytest.param(("delete table",), id="the table is gone"),
    ],
)
async def test_any_damage_is_mended(family, damage):
    async with started(family) as node:
        await node.change(*node.shop())
        listing = node.listing()
        command, *rest = damage
        node.by_hand(command, *(word.format(STRANGER[family]) for word in rest))
        await node.audit()
        assert sorted(node.listing().splitlines()) == sorted(listing.splitlines())
        assert len(node.drifts) == 1
        assert node.drifts[0] > 0


@both
async def test_clients_that_are_remembered_outlive_changes_and_a_restart(family):
    async with started(family) as node:
        await node.change(*node.shop())
        node.by_hand("add element", node.clients(4), f"{{ {STRANGER[family]} }}")
        await node.change(node.endpoints("login", 4, 5, 6))
        await node.audit()
        assert len(node.elements(node.clients(4))) == 1
        assert node.drifts == [], "packets fill the set, too"
    async with started(family) as again:
        await again.change(*again.shop(), again.endpoints("login", 4, 5, 6))
        assert len(again.elements(again.clients(4))) == 1
        await again.change(again.endpoints("login", 5, 6))
        assert POD[family].format(4).replace(":", ".") not in again.listing()


@both
async def test_clear_removes_the_table_and_no_other(family):
    nft("add", "table", WORD[family], "other")
    nft("add", "chain", WORD[family], "other", "pick-1")
    async with started(family) as node:
        await node.change(*node.shop())
        other = node.listing("other")
        await node.reconciler.clear()
        assert nft("list", "tables") == f"table {WORD[family]} other\n"
        assert node.listing("other") == other
        await node.reconciler.clear()
        await node.change()
        assert node.elements("endpoints"), "it may be made again"


@both
@pytest.mark.parametrize(
    "stranger",
    [
        pytest.param("set cluster-ips {{ type inet_service; }}", id="a set of another type"),
        pytest.param("map endpoints {{ type {ip} : verdict; }}", id="a map of another type"),
        pytest.param("chain services {{ type filter hook input priority 0; }}", id="a hook"),
        pytest.param("chain refuse {{ counter; }}", id="nothing but another rule"),
    ],
)
async def test_a_table_of_this_name_that_is_another_is_replaced(family, stranger):
    key = "ipv4_addr" if family == 4 else "ipv6_addr"
    nft("-f", "-", stdin=f"table {WORD[family]} pyproxy {{\n{stranger.format(ip=key)}\n}}\n")
    async with started(family) as node:
        await node.change(*node.shop())
        listing = node.listing()
        nft("flush", "ruleset")
    async with started(family) as fresh:
        await fresh.change(*fresh.shop())
        assert fresh.listing() == listing


@both
async def test_a_write_that_the_kernel_refuses_is_an_error_and_then_repaired(family):
    async with started(family) as node:
        await node.change(*node.shop())
        node.by_hand("delete table")
        pending = node.cache.apply(node.endpoints("web", 1, 2))
        changed = node.planner.update(pending, node.cache, Site(HERE, NODE_IP[family]))
        report = await node.reconciler.sync(node.planner.plan, changed)
        assert report.error is not None
        assert "No such file or directory" in report.error
        report = await node.change()
        assert (report.full, report.error) == (True, None)
        assert len([e for e in node.elements("endpoints") if f"{VIP[family].format(1)} " in e]) == 2


@both
async def test_it_verifies_owners_against_the_kernel_and_mends_nothing(family):
    async with started(family) as node:
        await node.change(*node.shop())
        owners = set(node.planner.plan.ports)
        found = await node.reconciler.verify(owners)
        assert (found.entries > 30, found.differences) == (True, ())
        ip = VIP[family].format(1)
        node.by_hand("delete element", "service-ips", f"{{ {ip} . tcp . 80 }}")
        node.by_hand("flush chain", "pick-3")
        node.by_hand("delete element", "endpoints", f"{{ {ip} . tcp . 80 . 2 }}")
        found = await node.reconciler.verify(owners)
        pod = POD[family].format(3)
        assert sorted((d.entry, d.held) for d in found.differences) == [
            ("chain pick-3", "0 rules, not these"),
            ("element of endpoints", None),
            ("element of service-ips", None),
        ]
        assert f"{ip} . tcp . 80 . 2 : {pod} . 8080" in [d.wanted for d in found.differences]
        assert await node.reconciler.verify(owners) == found
        assert await node.reconciler.verify({owner("idle")}) == Verified(3)
        await node.audit()
        assert (await node.reconciler.verify(owners)).differences == ()


async def test_a_table_that_is_gone_is_a_difference_and_no_error():
    async with started(4) as node:
        await node.change(*node.shop())
        node.by_hand("delete table")
        found = await node.reconciler.verify(set(node.planner.plan.ports))
        assert ("set service-ips", None) in [(d.entry, d.held) for d in found.differences]
