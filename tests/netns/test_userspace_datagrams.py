"""UDP through the userspace mode: every size, many clients, and flows that end when they should."""

import asyncio
import os
import resource
import socket
from contextlib import ExitStack, asynccontextmanager, suppress

import pytest

from pyproxy.config import Config, Conntrack
from pyproxy.model import Address
from pyproxy.proxier import _flow
from tests.netns.abuse import becomes, connection_counts, open_files, repeated
from tests.netns.node import LOOPBACK, NODE_IP, proxied, udp_client

families = pytest.mark.parametrize("family", [4, 6])


class Datagrams:
    """A UDP server that gives every datagram back, after its name."""

    def __init__(self, family, name=b""):
        self._name = name
        self._sock = socket.socket(
            socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_DGRAM
        )
        self._sock.setblocking(False)
        self._sock.bind((LOOPBACK[family], 0))
        self.address = Address(*self._sock.getsockname()[:2])

    def __enter__(self):
        asyncio.get_running_loop().add_reader(self._sock, self._answer)
        return self

    def __exit__(self, *_):
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()

    def _answer(self):
        with suppress(BlockingIOError):
            while True:
                data, self.last_peer = self._sock.recvfrom(65535)
                self._sock.sendto(self._name + data, self.last_peer)


@families
async def test_datagrams_of_every_size_pass_whole(family):
    with Datagrams(family) as backend:
        async with proxied(family) as node:
            await node.service("dns", 1, port=53, proto="UDP", node_port=30053)
            await node.endpoints("dns", backend.address, proto="UDP")
            loop = asyncio.get_running_loop()
            for ip, port in ((node.vip(1), 53), (NODE_IP[family], 30053)):
                client = udp_client(ip, port)
                for size in (0, 1, 1472, 1473, 9000, 65_507):
                    sent = os.urandom(size)
                    client.send(sent)
                    async with asyncio.timeout(2):
                        assert await loop.sock_recv(client, 65_535) == sent
                client.close()


async def test_a_thousand_udp_clients_have_flows_that_end_with_their_silence(monkeypatch):
    monkeypatch.setattr(_flow, "SWEEP_SECONDS", 0.1)
    idle = Config(conntrack=Conntrack(udp_timeout_seconds=1.5, udp_stream_timeout_seconds=9.0))
    with Datagrams(4) as backend, ExitStack() as clients:
        async with proxied(4, idle) as node:
            await node.service("dns", 1, port=53, proto="UDP")
            await node.endpoints("dns", backend.address, proto="UDP")
            assert await node.ask_udp(node.vip(1), 53) == b"?"  # by now all is open that stays
            relay = node.frontends._plane.udp
            assert await becomes(0, lambda: relay.open_count) == 0
            files = open_files()

            async def trial(_number):
                client = clients.enter_context(udp_client(node.vip(1), 53))
                answer = await node.ask_udp("", 0, sock=client, seconds=5)
                return None if answer == b"?" else "wrong"

            assert await repeated(trial, times=1000) == set()
            assert relay.open_count > 500
            clients.close()
            assert await becomes(0, lambda: relay.open_count) == 0
            assert open_files() == files
            assert connection_counts(node) == [{}]


async def test_flows_go_with_their_frontend():
    with Datagrams(4) as backend:
        async with proxied(4) as node:
            await node.service("dns", 1, port=53, proto="UDP")
            await node.endpoints("dns", backend.address, proto="UDP")
            assert await node.ask_udp(node.vip(1), 53) == b"?"
            assert node.frontends._plane.udp.open_count == 1
            await node.endpoints("dns", proto="UDP")
            assert node.frontends._plane.udp.open_count == 0


async def test_a_datagram_after_a_refusal_finds_another_backend():
    with Datagrams(4) as backend:
        async with proxied(4) as node:
            await node.service("dns", 1, port=53, proto="UDP")
            await node.endpoints("dns", Address("127.0.0.1", 1), proto="UDP")
            clients = [udp_client(node.vip(1), 53) for _ in range(8)]
            dead = Address("127.0.0.1", 1)
            await node.endpoints("dns", dead, backend.address, proto="UDP")
            for client in clients:
                client.send(b"lost, perhaps")
                await asyncio.sleep(0.01)
                client.send(b"?")
            for client in clients:
                async with asyncio.timeout(2):
                    heard = await asyncio.get_running_loop().sock_recv(client, 100)
                assert heard in (b"?", b"lost, perhaps")
                client.close()


@asynccontextmanager
async def room_for_64_flows(monkeypatch):
    """Give a node with Service dns, and the Service's backend."""
    monkeypatch.setattr(_flow, "FLOW_SHARE", resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 64)
    with Datagrams(4) as backend:
        async with proxied(4) as node:
            await node.service("dns", 1, port=53, proto="UDP")
            await node.endpoints("dns", backend.address, proto="UDP")
            yield node, backend


async def test_flows_leave_file_descriptors_for_connections(monkeypatch):
    async with room_for_64_flows(monkeypatch) as (node, _backend):
        for _ in range(200):
            assert await node.ask_udp(node.vip(1), 53) == b"?"
        assert 32 < node.frontends._plane.udp.open_count <= 80


async def test_of_too_many_flows_those_go_that_were_silent_longest(monkeypatch):
    async with room_for_64_flows(monkeypatch) as (node, backend):
        with udp_client(node.vip(1), 53) as client:
            flows = set()
            for number in range(200):
                assert await node.ask_udp(node.vip(1), 53) == b"?"
                if number % 20 == 0:
                    assert await node.ask_udp("", 0, sock=client) == b"?"
                    flows.add(backend.last_peer)
            assert len(flows) == 1
