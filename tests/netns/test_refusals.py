"""External addresses of Services without endpoints: who asks there is refused."""

import asyncio
from contextlib import ExitStack, asynccontextmanager

import pytest

from pyproxy.model import Address
from pyproxy.proxier._nfnetlink import NfTables
from pyproxy.rules.refusals import TABLE
from tests.netns.machines import Machine, done, forwards
from tests.netns.node import LOOPBACK, NODE_IP, proxied

OUTSIDE = {4: "203.0.113.60", 6: "fd00:6e::60"}
POD = {4: "10.244.1.30", 6: "fd00:10:244::30"}
VIP = {4: "198.18.0.9", 6: "fd00:198:18::9"}
PORT = 8080
REFUSED = "[Errno 111] Connection refused"
both = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture(scope="module")
def outside(namespace):
    """Somebody outside; there is a pod besides."""
    with ExitStack() as stack:
        forwards()
        outside = Machine(stack, "v-out", OUTSIDE)
        pod = Machine(stack, "v-pod", POD)
        for ip in POD.values():
            stack.enter_context(pod.answers(ip, PORT))
        yield outside


@asynccontextmanager
async def served(family, *backends, proto="TCP", keep=False, vip=None):
    async with proxied(family, keep=keep) as node:
        fields = {"type": "LoadBalancer", "load_balancer_ips": (vip or VIP[family],)}
        await node.service("web", 1, proto=proto, **fields)
        await node.endpoints("web", *backends, proto=proto)
        yield node


def backend(family):
    return Address(POD[family], PORT)


@both
@pytest.mark.parametrize("proto", ["TCP", "UDP"])
async def test_who_asks_from_outside_is_refused(family, proto, outside):
    async with served(family, proto=proto):
        assert await outside.asks(VIP[family], kind=proto, count=3) == {REFUSED: 3}


@both
async def test_so_is_the_node_itself(family):
    async with served(family) as node:
        with pytest.raises(ConnectionRefusedError):
            await node.connect(VIP[family])


async def test_everybody_is_served_as_soon_as_there_is_an_endpoint(outside):
    async with served(4) as node:
        assert REFUSED in await outside.asks(VIP[4])
        await node.endpoints("web", backend(4))
        assert REFUSED not in await outside.asks(VIP[4], count=3)


async def test_an_open_connection_goes_on_when_there_is_none_any_more():
    server = await asyncio.start_server(echo, LOOPBACK[4], 0)
    own = Address(*server.sockets[0].getsockname())
    async with server, served(4, own) as node:
        reader, writer = await node.connect(VIP[4])
        await node.endpoints("web")
        with pytest.raises(ConnectionRefusedError):
            await node.connect(VIP[4])
        writer.write(b"still there")
        assert await reader.readexactly(11) == b"still there"
        writer.close()


async def test_a_table_that_somebody_removed_is_made_anew(outside):
    async with served(4) as node:
        await asyncio.to_thread(done, "nft", "delete", "table", "ip", TABLE.name)
        await node.service("other", 2, load_balancer_ips=(VIP[4],), port=81, type="LoadBalancer")
        assert await outside.asks(VIP[4]) == {REFUSED: 1}
        assert await outside.asks(VIP[4], 81) == {REFUSED: 1}


async def test_an_address_of_the_node_is_left_to_its_programs():
    async with served(4, vip=NODE_IP[4]):
        assert not is_there()


async def test_the_table_is_there_while_it_is_needed():
    async with served(4) as node:
        assert is_there()
        await node.endpoints("web", backend(4))
        assert not is_there()


async def test_a_start_removes_what_nobody_needs_any_more():
    async with served(4, keep=True):
        assert is_there()
    async with proxied(4):
        assert not is_there()


async def test_nothing_is_left_when_the_mode_is_cleared():
    async with served(4):
        assert is_there()
    assert not is_there()


async def echo(reader, writer):
    while data := await reader.read(100):
        writer.write(data)
    writer.close()


def is_there():
    nf_tables = NfTables()
    try:
        return bool(nf_tables.chains(TABLE))
    finally:
        nf_tables.close()
