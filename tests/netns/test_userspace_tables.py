"""The tables that mode userspace has: what others change in them is found and mended."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from pyproxy.config import Config, IPTables
from tests.netns import node as node_module
from tests.netns.machines import done
from tests.netns.node import proxied

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


async def test_what_is_no_concern_of_ours_changes_nothing(monkeypatch):
    async with served(monkeypatch, SOON) as node:
        await nft("add", "table", "ip", "others")
        before = len(node.observer.reports)
        await asyncio.sleep(1.0)
        assert len(node.observer.reports) == before
        await nft("delete", "table", "ip", "others")
