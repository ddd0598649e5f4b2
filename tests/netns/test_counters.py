"""Counters of Services and endpoints on the real kernel, with real connections."""

import asyncio
import os
import subprocess
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_network

import pytest
from msgspec import structs

from pyproxy import proxier
from pyproxy.config import Config
from pyproxy.counters import Tally, Where
from pyproxy.counting import settled
from pyproxy.model import Address
from pyproxy.reconcile import ApplyError
from tests.builders import owner
from tests.netns import node as node_module
from tests.netns.node import NODE_IP, STRANGER, VIP, proxied

MODES = ("nftables", "iptables", "userspace")
both = pytest.mark.parametrize("family", [4, 6])
RANGE = {4: "10.96.0.0/24", 6: "fd00:10:96::/112"}
COUNTED = Config(service_metrics="endpoint")
WEB = owner("web")


@pytest.fixture(params=MODES)
def mode(request):
    reason = proxier.load(request.param).unsupported()
    if reason is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return request.param


@pytest.fixture(autouse=True)
def _leads_somewhere(family):
    """Give Service addresses a route, as a default route would be."""
    words = ["ip", f"-{family}", "route", "replace", RANGE[family], "dev", "lo"]
    with subprocess.Popen(words) as process:
        assert process.wait() == 0
    yield
    words[3] = "del"
    with subprocess.Popen(words) as process:
        process.wait()


@asynccontextmanager
async def backend(family):
    async def serve(reader, writer):
        writer.write(b"heard " + await reader.read())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, NODE_IP[family], 0)
    try:
        yield Address(NODE_IP[family], server.sockets[0].getsockname()[1])
    finally:
        server.close()


class Reader:
    """Reads again and again, as scrapes do."""

    def __init__(self, node):
        self._node = node
        self._tally = Tally()

    async def read(self, *, by_endpoint=True):
        reading = await settled(self._node.carrier, by_endpoint=by_endpoint)
        return self._tally.take(reading, by_endpoint=by_endpoint)


async def ask(node, count):
    source = NODE_IP[node.family]
    for _ in range(count):
        assert await node.ask(VIP[node.family].format(1), source=source) == b"heard ?"


@both
async def test_new_connections_are_counted_for_the_service_and_its_endpoint(family, mode):
    async with backend(family) as address, proxied(family, COUNTED, mode=mode) as node:
        await node.service("web", 1)
        await node.endpoints("web", address)
        reader = Reader(node)
        assert (await reader.read())[Where(WEB)].connections == 0
        await ask(node, 7)
        found = await reader.read()
        assert found[Where(WEB)].connections == 7
        assert found[Where(WEB, address)].connections == 7
        assert set(await reader.read(by_endpoint=False)) == {Where(WEB)}


@both
async def test_the_sum_of_two_endpoints_is_that_of_the_service(family, mode):
    async with (
        backend(family) as a,
        backend(family) as b,
        proxied(family, COUNTED, mode=mode) as node,
    ):
        await node.service("web", 1)
        await node.endpoints("web", a, b)
        await ask(node, 20)
        found = await Reader(node).read()
        each = [found[Where(WEB, address)].connections for address in (a, b)]
        assert sum(each) == found[Where(WEB)].connections == 20


@both
@pytest.mark.parametrize("setting", ["service", "endpoint"])
async def test_connections_of_session_affinity_are_counted_for_the_service(family, setting):
    config = Config(service_metrics=setting)
    async with backend(family) as address, proxied(family, config, mode="nftables") as node:
        await node.service("web", 1, affinity_seconds=600)
        await node.endpoints("web", address)
        await ask(node, 3)
        found = await Reader(node).read()
        assert found[Where(WEB)].connections == 3
        assert Where(WEB, address) not in found


@both
async def test_counts_outlive_a_change_of_endpoints(family, mode):
    async with (
        backend(family) as a,
        backend(family) as b,
        proxied(family, COUNTED, mode=mode) as node,
    ):
        await node.service("web", 1)
        await node.endpoints("web", a)
        reader = Reader(node)
        await reader.read()
        await ask(node, 5)
        if mode == "iptables":  # what was not read is lost when a chain is written anew
            await reader.read()
        await node.endpoints("web", a, b)
        await ask(node, 5)
        assert (await reader.read())[Where(WEB)].connections == 10


@both
async def test_refused_packets_are_counted(family, mode):
    async with proxied(family, COUNTED, mode=mode) as node:
        await node.service("web", 1)
        for _ in range(3):
            with suppress(OSError):
                await node.ask(VIP[family].format(1), source=NODE_IP[family])
        found = (await Reader(node).read())[Where(WEB)]
        assert found.rejected >= 3
        assert not found.connections


@both
async def test_packets_from_outside_the_source_ranges_are_counted(family, mode):
    lb = VIP[family].format(7)
    ranges = (ip_network(NODE_IP[family]),)
    async with backend(family) as address, proxied(family, COUNTED, mode=mode) as node:
        await node.service("web", 1, load_balancer_ips=(lb,), source_ranges=ranges)
        await node.endpoints("web", address)
        assert await node.ask(lb, source=NODE_IP[family]) == b"heard ?"
        with suppress(OSError):
            await node.ask(lb, source=STRANGER[family])
        found = (await Reader(node).read())[Where(WEB)]
        assert found.denied >= 1
        assert (found.rejected or 0, found.dropped or 0, found.connections) == (0, 0, 1)


@pytest.fixture(params=["sk_lookup", "tproxy", "listeners"])
def capture(request, monkeypatch):
    monkeypatch.setattr(node_module, "CAPTURE", request.param)


KEPT_OUT = {
    "source ranges": ({"source_ranges": True}, "denied"),
    "policy": ({"external_local": True, "type": "LoadBalancer"}, "dropped"),
}


@both
@pytest.mark.parametrize("reason", KEPT_OUT)
@pytest.mark.parametrize("proto", ["TCP", "UDP"])
@pytest.mark.usefixtures("capture")
async def test_in_mode_userspace_they_are_counted_however_packets_are_captured(
    family, reason, proto
):
    lb = VIP[family].format(7)
    fields, counted = KEPT_OUT[reason]
    if "source_ranges" in fields:
        fields = {"source_ranges": (ip_network(NODE_IP[family]),)}
    elsewhere = Address(NODE_IP[family], 9)
    async with proxied(family) as node:
        await node.service("web", 1, proto=proto, load_balancer_ips=(lb,), **fields)
        await node.endpoints("web", elsewhere, proto=proto, node="elsewhere")
        reader = Reader(node)
        await reader.read()
        for _ in range(2):
            await in_vain(node, lb, proto)
        key = Where(owner("web", proto=proto))
        first = getattr((await reader.read())[key], counted)
        assert first >= 2
        changed = Address(NODE_IP[family], 10)
        await node.endpoints("web", elsewhere, changed, proto=proto, node="elsewhere")
        await in_vain(node, lb, proto)
        found = (await reader.read())[key]
        assert getattr(found, counted) > first, "a change of endpoints begins nothing anew"
        others = {"rejected", "dropped", "denied"} - {counted}
        assert {name: getattr(found, name) or 0 for name in others} == dict.fromkeys(others, 0)


async def in_vain(node, ip, proto):
    ask = node.ask if proto == "TCP" else node.ask_udp
    with pytest.raises(TimeoutError):
        await ask(ip, 80, source=STRANGER[node.family])


@pytest.mark.usefixtures("capture")
@pytest.mark.parametrize("family", [4])
async def test_in_mode_userspace_refusals_at_addresses_of_others_are_counted(family):
    lb = "198.18.0.7"
    async with proxied(family) as node:
        await node.service("web", 1, load_balancer_ips=(lb,), type="LoadBalancer")
        reader = Reader(node)
        await reader.read()
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                await node.ask(lb, source=STRANGER[family])
        assert (await reader.read())[Where(WEB)].rejected >= 3


@both
async def test_the_relay_counts_bytes_each_way_also_of_open_connections(family):
    off = structs.replace(Config(), userspace=structs.replace(Config().userspace, socket_lb="off"))
    async with backend(family) as address, proxied(family, off) as node:
        await node.service("web", 1)
        await node.endpoints("web", address)
        stream, writer = await node.connect(node.vip(1), source=NODE_IP[family])
        writer.write(b"x" * 100_000)
        await writer.drain()
        reader = Reader(node)
        async with asyncio.timeout(5):
            while (await reader.read())[Where(WEB)].bytes_in < 100_000:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        writer.write_eof()
        assert len(await stream.read()) == 100_006
        writer.close()
        found = (await reader.read())[Where(WEB, address)]
        assert (found.connections, found.bytes_in, found.bytes_out) == (1, 100_000, 100_006)


@both
async def test_mode_nftables_counts_only_when_told_to(family):
    async with proxied(family, mode="nftables") as node:
        await node.service("web", 1)
        with pytest.raises(ApplyError, match="--service-metrics"):
            await node.carrier.counters(by_endpoint=False)
