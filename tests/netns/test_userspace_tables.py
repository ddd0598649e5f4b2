"""The tables, routes and routing rules of mode userspace: what others change is mended."""

import asyncio
from contextlib import asynccontextmanager, closing

import pytest

from pyproxy.config import Config, IPTables
from pyproxy.model import Frontend
from pyproxy.proxier._ipvslocal import LocalAddresses
from pyproxy.proxier._transparent import ROUTES
from pyproxy.proxier._vips import RTPROT_IPVS, Vips, one_port
from pyproxy.rules.ipvs import LocalAddress
from tests.builders import owner
from tests.netns import node as node_module
from tests.netns.machines import done
from tests.netns.node import proxied
from tests.netns.standin import printed

SOON = Config(iptables=IPTables(sync_period_seconds=0.3))
TABLES = {
    "answers": "ip pyproxy-userspace",
    "bridges": "bridge pyproxy-userspace-4",
    "refusals": "ip pyproxy-refusals",
    "capture": "ip pyproxy-capture",
}
WITH_CHAIN = {name: f"{table} prerouting" for name, table in TABLES.items()}


@asynccontextmanager
async def served(monkeypatch, config=None):
    """A node with all tables there are: one Service without endpoints has an address outside."""
    monkeypatch.setattr(node_module, "CAPTURE", "tproxy")
    async with proxied(4, config) as node:
        fields = {"type": "LoadBalancer", "load_balancer_ips": ("198.18.0.9",)}
        await node.service("web", 1, **fields)
        await node.endpoints("web")
        yield node


async def nft(*words):
    await asyncio.to_thread(done, "nft", *words)


async def differences(node):
    found = await node.carrier.verify(set(node.lane.plan.ports))
    return [(d.entry, d.held) for d in found.differences]


@pytest.mark.parametrize("table", TABLES)
async def test_a_table_that_somebody_deletes_is_told_and_made_again(table, monkeypatch):
    family, name = TABLES[table].split()
    async with served(monkeypatch) as node:
        assert await differences(node) == []
        await nft("delete", "table", family, name)
        assert await differences(node) == [(f"table {name}", None)]
        assert node.drifts == [], "to look changes nothing"
        node.lane.resync()
        await node.observer.next()
        assert await differences(node) == []
        assert node.drifts == [(name, 1, "somebody")]


@pytest.mark.parametrize("table", WITH_CHAIN)
async def test_rules_that_somebody_flushes_are_told_and_made_again(table, monkeypatch):
    family, name, chain = WITH_CHAIN[table].split()
    async with served(monkeypatch) as node:
        await nft("flush", "chain", family, name, chain)
        ((entry, held),) = await differences(node)
        assert entry == f"table {name}, chain {chain}"
        assert held == "0 rules, not these"
        node.lane.resync()
        await node.observer.next()
        assert await differences(node) == []


@pytest.mark.parametrize(
    ("table", "a_set"),
    [("refusals", "refused"), ("capture", "frontends")],
)
async def test_elements_that_somebody_flushes_are_told_and_made_again(table, a_set, monkeypatch):
    family, name = TABLES[table].split()
    async with served(monkeypatch) as node:
        await nft("flush", "set" if table == "refusals" else "map", family, name, a_set)
        found = await differences(node)
        assert {entry for entry, _held in found} == {f"table {name}, element of {a_set}"}
        node.lane.resync()
        await node.observer.next()
        assert await differences(node) == []


WEB = one_port(Frontend("", 80, "TCP"))


def ip_of(family):
    return {4: "198.18.0.9", 6: "2001:db8::9"}[family]


@asynccontextmanager
async def routed(family, config=None):
    """A node with all rules of policy routing, for a load balancer's address outside."""
    async with proxied(family, config) as node:
        balancer = {"load_balancer_ips": (ip_of(family),), "balancer_traffic": "pass-through"}
        await node.service("web", 1, type="LoadBalancer", **balancer)
        await node.endpoints("web")
        yield node


LOST = {
    "of the port": ("rule del priority 98", "local route {ip}"),
    "that leads past": ("rule del priority 97 iif lo", "rule past {frontend}"),
    "that is gone past to": ("rule del priority 99", "rule that is gone past to"),
    "of answers": ("rule del priority 97 fwmark 0x1000/0x1000", "routing rule for answers"),
    "route for answers": (f"route flush table {ROUTES}", "local route for answers"),
    "route of the port": (f"route flush table {WEB.table}", "local route {ip}"),
}


async def routing(family):
    """All rules, and the routes to local addresses, as ``ip`` prints them."""
    tables = ("rule", f"route show table {ROUTES}", f"route show table {WEB.table}")
    listings = [await asyncio.to_thread(printed, "ip", f"-{family}", *t.split()) for t in tables]
    return sorted(line for listing in listings for line in listing.splitlines())


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(("command", "entry"), LOST.values(), ids=LOST)
async def test_a_rule_or_route_that_somebody_deletes_is_told_and_made_again(family, command, entry):
    async with routed(family) as node:
        assert await differences(node) == []
        before = await routing(family)
        await asyncio.to_thread(done, "ip", f"-{family}", *command.split())
        names = {"ip": ip_of(family), "frontend": Frontend(ip_of(family), 80, "TCP")}
        assert await differences(node) == [(entry.format(**names), None)]
        assert node.drifts == [], "to look changes nothing"
        node.lane.resync()
        await node.observer.next()
        assert await differences(node) == []
        assert node.drifts == [("local", 1, "somebody")]
        assert await routing(family) == before


async def test_nobody_need_ask_for_it(monkeypatch):
    async with served(monkeypatch, SOON) as node:
        for table in TABLES.values():
            await nft("delete", "table", *table.split())
        async with asyncio.timeout(30):
            while len(node.drifts) < len(TABLES):
                await node.observer.next()
        assert await differences(node) == []
        assert {name for name, _count, _who in node.drifts} == {
            table.split()[1] for table in TABLES.values()
        }


async def test_nobody_need_ask_for_rules_of_routing():
    async with routed(4, SOON) as node:
        rule = LOST["of answers"][0]
        await asyncio.to_thread(done, "ip", *rule.split())
        async with asyncio.timeout(30):
            while not node.drifts:
                await node.observer.next()
        assert await differences(node) == []


async def test_what_is_no_concern_of_ours_changes_nothing(monkeypatch):
    async with served(monkeypatch, SOON) as node:
        await nft("add", "table", "ip", "others")
        before = len(node.observer.reports)
        await asyncio.sleep(1.0)
        assert len(node.observer.reports) == before
        await nft("delete", "table", "ip", "others")


def test_in_mode_ipvs_an_address_is_not_local_without_its_rule():
    front = Frontend(ip_of(4), 80, "TCP")
    key = LocalAddress(front.ip, front, owner("web"))
    with closing(Vips(4, None, mark=RTPROT_IPVS)) as vips:
        addresses = LocalAddresses()
        assert addresses.bind([key], vips) == {}
        assert addresses.missing(vips) == []
        done("ip", "rule", "del", "priority", "98")
        assert addresses.missing(vips) == [one_port(front, RTPROT_IPVS)]
        assert addresses.read(vips) == []
        assert addresses.bind([key], vips) == {}
        assert addresses.missing(vips) == []
        done("ip", "rule", "del", "priority", "98")
        assert vips.clear() == {}
        assert printed("ip", "route", "show", "proto", "99", "table", "all") == ""
