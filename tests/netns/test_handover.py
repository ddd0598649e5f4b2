"""A successor takes over while connections are open and others come."""

import asyncio
import os
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from hashlib import sha256

import pytest

from pyproxy.config import Config, with_setting
from pyproxy.model import Address
from pyproxy.proxier import _handover
from pyproxy.proxier._capture import WAYS, why_not
from pyproxy.proxier._succession import is_abandoned, meeting_place
from tests.netns import node as node_module
from tests.netns.node import LOOPBACK, NODE_IP, Jobs, Node, udp_client
from tests.netns.test_userspace import Backend


@pytest.fixture(autouse=True, params=WAYS)
def _capture(request, monkeypatch):
    reason = why_not(request.param)
    if reason is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    monkeypatch.setattr(node_module, "CAPTURE", request.param)


@pytest.fixture
def config(tmp_path):
    return with_setting(Config(), "userspace.runtime_dir", str(tmp_path))


@asynccontextmanager
async def succession(family, config):
    """A node that serves, and a function that starts its successor and ends it."""
    async with asyncio.TaskGroup() as group:
        tasks = Jobs(group)
        first = Node(family, tasks, config)
        nodes = [first]
        await first.start()

        async def succeed(*changes):
            after = Node(family, tasks, config)
            report = await after.start(changes)
            assert report.error is None
            nodes.append(after)
            await nodes[-2].stop(keep=True)
            return after

        try:
            yield first, succeed
        finally:
            await tasks.end()
            await nodes[-1].stop()


def recorded(node):
    """Keep what a node is told, to tell it to its successor."""
    changes, change = [], node.change

    async def and_keep(one):
        changes.append(one)
        return await change(one)

    node.change = and_keep
    return changes


@pytest.mark.parametrize(("family", "workers", "count"), [(4, 1, 200), (6, 1, 200), (4, 2, 1000)])
async def test_no_connection_is_lost(family, workers, count, config, monkeypatch):
    monkeypatch.setattr(node_module, "WORKERS", workers)
    async with Backend(family, "a") as a, succession(family, config) as (node, succeed):
        changes = recorded(node)
        await node.service("web", 1)
        await node.endpoints("web", a.address)
        opened = [await asyncio.open_connection(node.vip(1), 80) for _ in range(count)]
        for number, (_reader, writer) in enumerate(opened):
            writer.write(b"%d " % number)
            if number % 2:
                writer.write_eof()
        enough = asyncio.Event()
        asked = node.tasks.create_task(keep_asking(node, enough))
        await asyncio.sleep(0.1)
        await succeed(*changes)
        await asyncio.sleep(0.1)
        for number, (reader, writer) in enumerate(opened):
            if not number % 2:
                writer.write(b"and more")
                writer.write_eof()
            async with asyncio.timeout(10):
                said = await reader.read()
            assert said == b"a %d %s" % (number, b"" if number % 2 else b"and more")
            writer.close()
        enough.set()
        assert await asked > 0


async def keep_asking(node, enough):
    """Ask by one new connection after the other; return how many there were."""
    count = 0
    while not enough.is_set():
        reader, writer = await asyncio.open_connection(node.vip(1), 80)
        writer.write(b"?")
        writer.write_eof()
        assert await reader.read() == b"a ?"
        writer.close()
        count += 1
    return count


async def test_what_is_on_its_way_arrives(config):
    """The backend does not read at first: bytes wait in its socket, and in a pipe of ours."""
    sent = os.urandom(1 << 20) * 64
    may_read, arrived = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def serve(reader, writer):
        await may_read.wait()
        arrived.set_result(sha256(await reader.read()).hexdigest())
        writer.write(b"thanks")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 16)
    async with server, succession(4, config) as (node, succeed):
        changes = recorded(node)
        await node.service("web", 1)
        await node.endpoints("web", Address(*server.sockets[0].getsockname()))
        reader, writer = await node.connect(node.vip(1))
        writing = node.tasks.create_task(write_all(writer, sent))
        await asyncio.sleep(0.3)
        assert not writing.done(), "it all fitted in, and nothing was on its way"
        await succeed(*changes)
        may_read.set()
        async with asyncio.timeout(20):
            await writing
            assert await arrived == sha256(sent).hexdigest()
            assert await reader.read() == b"thanks"
        writer.close()


async def write_all(writer, data):
    writer.write(data)
    await writer.drain()
    writer.write_eof()


@pytest.mark.parametrize(
    ("family", "workers", "node_port"), [(4, 1, 0), (6, 1, 0), (4, 1, 30053), (6, 2, 0)]
)
async def test_a_flow_of_datagrams_goes_on(family, workers, node_port, config, monkeypatch):
    """Its backend sees the same client before and after, also if it is busy."""
    monkeypatch.setattr(node_module, "WORKERS", workers)
    async with (
        Whoami(family) as a,
        Whoami(family) as b,
        succession(family, config) as (node, succeed),
    ):
        changes = recorded(node)
        await node.service("dns", 1, port=53, proto="UDP", node_port=node_port)
        await node.endpoints("dns", a.address, b.address, proto="UDP")
        where = (NODE_IP[family], node_port) if node_port else (node.vip(1), 53)
        clients = [udp_client(*where) for _ in range(8)]
        for _ in range(20):
            clients[0].send(b"?")
        await asyncio.sleep(0.1)
        drain(clients[0])
        before = [await node.ask_udp("", 0, sock=client) for client in clients]
        assert len(set(before)) == len(clients)
        for _ in range(2):
            await succeed(*changes)
            assert [await node.ask_udp("", 0, sock=client) for client in clients] == before
        for client in clients:
            client.close()


class Whoami(asyncio.DatagramProtocol):
    """A UDP server that answers with its own port and the port of who asks."""

    def __init__(self, family):
        self._ip = LOOPBACK[family]

    async def __aenter__(self):
        loop = asyncio.get_running_loop()
        await loop.create_datagram_endpoint(lambda: self, local_addr=(self._ip, 0))
        self.address = Address(self._ip, self._transport.get_extra_info("sockname")[1])
        return self

    async def __aexit__(self, *_):
        self._transport.close()

    def connection_made(self, transport):
        self._transport = transport

    def datagram_received(self, data, peer):
        self._transport.sendto(b"%d %d" % (self.address.port, peer[1]), peer)


def drain(client):
    with suppress(BlockingIOError):
        while client.recv(2048):
            pass


async def test_a_successor_that_goes_away_changes_nothing(config):
    async with Backend(4, "a") as a, succession(4, config) as (node, succeed):
        changes = recorded(node)
        await node.service("web", 1)
        await node.endpoints("web", a.address)
        place = meeting_place(config.userspace.runtime_dir, 4)
        for _ in range(3):
            visitor = await asyncio.to_thread(_handover.predecessor, place)
            doors, own = await asyncio.to_thread(visitor.entrances)
            found = [
                sock
                for sock in [*(sock for pair in doors for sock in pair), *own.values()]
                if is_listening(sock)
            ]
            assert len(found) == 1
            for sock in [*(sock for pair in doors for sock in pair), *own.values()]:
                sock.close()
            visitor.close()
            assert await node.ask(node.vip(1)) == b"a ?"
        after = await succeed(*changes)
        assert await after.ask(node.vip(1)) == b"a ?"
        once_more = await succeed(*changes)
        assert await once_more.ask(node.vip(1)) == b"a ?"


def is_listening(sock):
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


async def test_a_place_that_a_killed_process_left_is_taken(config):
    place = meeting_place(config.userspace.runtime_dir, 4)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(place))
    async with Backend(4, "a") as a, succession(4, config) as (node, succeed):
        changes = recorded(node)
        await node.service("web", 1)
        await node.endpoints("web", a.address)
        reader, writer = await node.connect(node.vip(1))
        await succeed(*changes)
        writer.write(b"!")
        writer.write_eof()
        assert await reader.read() == b"a !"
        writer.close()


def test_the_place_of_another_namespace_is_abandoned_once_its_process_ends(tmp_path):
    place = tmp_path / "userspace-ipv4-5.sock"
    script = f"""
import socket
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.bind({str(place)!r})
server.listen(1)
print("listening", flush=True)
input()
"""
    words = ["unshare", "--net", sys.executable, "-c", script]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "listening\n"
        assert not is_abandoned(place)
        process.communicate("\n")
    assert is_abandoned(place)
