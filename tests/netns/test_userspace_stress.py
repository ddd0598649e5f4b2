"""TCP through the userspace mode under abuse: nothing is lost, hangs, or is left over."""

import asyncio
import hashlib
import os
import resource
import socket
import struct
import sys
from contextlib import asynccontextmanager, suppress
from itertools import count

import pytest

from pyproxy.model import Address
from pyproxy.proxier import _tcp
from tests.netns.abuse import TRIALS, becomes, connection_counts, open_files, repeated
from tests.netns.node import LOOPBACK, proxied

LINGER_RESET = struct.pack("ii", 1, 0)
OUT_OF_FILES = "out of file descriptors: new connections wait"
SLOW_ECHO = """
import asyncio

async def answer(reader, writer):
    writer.write(await reader.readexactly(1))
    await asyncio.sleep(0.1)
    writer.close()

async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


def reset(writer):
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    writer.transport.abort()


@asynccontextmanager
async def served(answer, config=None, family=4):
    """A node with one Service, of which ``answer(reader, writer)`` is the only backend.

    In the end nothing of the connections may be left.
    """

    async def closing(reader, writer):
        try:
            with suppress(ConnectionError):
                await answer(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(closing, LOOPBACK[family], 0, backlog=1024)
    async with server, proxied(family, config) as node:
        node.backend = Address(*server.sockets[0].getsockname()[:2])
        await node.service("web", 1)
        await node.endpoints("web", node.backend)
        files, tasks = open_files(), len(asyncio.all_tasks())
        yield node
        assert await becomes(files, open_files) == files
        assert await becomes(tasks, lambda: len(asyncio.all_tasks())) == tasks
        assert await becomes([{}], lambda: connection_counts(node)) == [{}]


async def connected(node):
    return await asyncio.open_connection(node.vip(1), 80)


async def test_who_ends_first_still_hears_the_answer():
    async def digest(reader, writer):
        writer.write(hashlib.sha1(await reader.read()).digest())
        await writer.drain()

    async def trial(number):
        data = bytes([number % 256]) * (0, 1, 1000, 70_000)[number % 4]
        reader, writer = await connected(node)
        writer.write(data)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        return None if answer == hashlib.sha1(data).digest() else answer

    async with served(digest) as node:
        assert await repeated(trial) == set()


async def test_a_backend_that_ends_first_still_hears_the_client():
    heard = {}

    async def banner(reader, writer):
        writer.write(b"banner")
        writer.write_eof()
        data = await reader.read()
        heard[data[:4]] = len(data)

    async def trial(number):
        reader, writer = await connected(node)
        greeting = await reader.read()
        writer.write(struct.pack("!I", number) + bytes(70_000 * (number % 2)))
        await writer.drain()
        writer.close()
        return None if greeting == b"banner" else greeting

    wanted = {struct.pack("!I", n): 4 + 70_000 * (n % 2) for n in range(TRIALS)}
    async with served(banner) as node:
        assert await repeated(trial) == set()
        assert await becomes(wanted, lambda: heard) == wanted


async def test_both_sides_may_speak_first():
    async def speaks(reader, writer):
        writer.write(b"backend" * 100)
        assert await reader.readexactly(600) == b"client" * 100
        writer.write(b".")
        await writer.drain()

    async def trial(_number):
        reader, writer = await connected(node)
        writer.write(b"client" * 100)
        heard = await reader.read()
        writer.close()
        return None if heard == b"backend" * 100 + b"." else heard

    async with served(speaks) as node:
        assert await repeated(trial) == set()


async def test_what_was_sent_before_a_close_at_once_arrives():
    heard = {}

    async def listens(reader, _writer):
        data = await reader.read()
        heard[data[:4]] = len(data)

    async def trial(number):
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (node.vip(1), 80))
        sock.send(struct.pack("!I", number) + bytes(1000 * (number % 20)))
        sock.close()

    wanted = {struct.pack("!I", n): 4 + 1000 * (n % 20) for n in range(500)}
    async with served(listens) as node:
        await repeated(trial, times=500)
        assert await becomes(wanted, lambda: heard) == wanted


async def test_a_client_that_is_gone_before_its_backend_is_reached_leaves_nothing():
    async def listens(reader, _writer):
        await reader.read()

    async def trial(number):
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (node.vip(1), 80))
        if number % 2:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        sock.close()

    async with served(listens) as node:
        await repeated(trial)


async def test_a_backend_that_resets_at_once_resets_every_client():
    async def resets(_reader, writer):
        reset(writer)

    async def trial(_number):
        reader, writer = await connected(node)
        try:
            return await reader.read() or "an end instead of a reset"
        except ConnectionResetError:
            return None
        finally:
            writer.close()

    async with served(resets) as node:
        assert await repeated(trial, times=500) == set()


async def test_a_reset_in_the_middle_of_a_transfer_is_passed_on():
    ends = []

    async def receives(reader, _writer):
        try:
            while await reader.read(65536):
                pass
            ends.append("end")
        except ConnectionResetError:
            ends.append("reset")

    async def trial(_number):
        _reader, writer = await connected(node)
        for _ in range(20):
            writer.write(bytes(65536))
            await writer.drain()
        reset(writer)

    async with served(receives) as node:
        await repeated(trial, times=20, at_once=4)
        assert await becomes(20, lambda: len(ends)) == 20
        assert set(ends) == {"reset"}


async def test_a_reset_after_an_end_is_noticed(monkeypatch):
    monkeypatch.setattr(_tcp, "SWEEP_SECONDS", 0.1)
    heard, over = asyncio.Event(), asyncio.Event()

    async def says_nothing(reader, _writer):
        await reader.read()
        heard.set()
        await over.wait()

    async with served(says_nothing) as node:
        _reader, writer = await connected(node)
        writer.write_eof()
        await heard.wait()
        relay = node.frontends._plane.tcp
        assert relay.open_count == 1
        reset(writer)
        assert await becomes(0, lambda: relay.open_count) == 0
        over.set()


async def test_much_goes_both_ways_at_once_and_arrives_as_it_was():
    size, block = 24 << 20, os.urandom(1 << 16)

    async def exchange(reader, writer):
        async def send():
            for _ in range(size // len(block)):
                writer.write(block)
                await writer.drain()
            writer.write_eof()

        heard = hashlib.blake2b()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send())
            while data := await reader.read(1 << 20):
                heard.update(data)
        digests.append(heard.digest())

    digests = []
    wanted = hashlib.blake2b(block * (size // len(block))).digest()
    async with served(exchange) as node:
        reader, writer = await connected(node)
        await exchange(reader, writer)
        writer.close()
        assert await becomes([wanted] * 2, lambda: digests) == [wanted] * 2


async def test_updates_cost_no_connection_while_an_endpoint_stays():
    async def echo(reader, writer):
        writer.write(await reader.readexactly(1))
        await writer.drain()

    async def trial(_number):
        reader, writer = await connected(node)
        writer.write(b"x")
        answer = await reader.read()
        writer.close()
        return None if answer == b"x" else answer

    async def storm():
        dead = [Address("127.0.0.1", port) for port in (1, 2, 3)]
        for number in count():
            await node.endpoints("web", *dead[: number % 4], node.backend)
            await asyncio.sleep(0)

    async with served(echo) as node:
        async with asyncio.TaskGroup() as tasks:
            storming = tasks.create_task(storm())
            found = await repeated(trial, times=800)
            storming.cancel()
        assert found == set()
        assert len(node.observer.reports) > 50
        await node.endpoints("web", node.backend)


async def test_a_frontend_may_lose_its_endpoints_while_it_dials():
    """Also with another frontend of the same Service that stays."""
    deaf = socket.socket()
    deaf.bind(("127.0.0.1", 0))
    deaf.listen(0)
    filler = [socket.create_connection(deaf.getsockname()[:2]) for _ in range(1)]

    async def nobody(_reader, _writer):
        pass

    async with served(nobody) as node:
        await node.service("web", 1, external_ips=("203.0.113.7",))
        await node.endpoints("web", Address(*deaf.getsockname()))
        reader, writer = await asyncio.open_connection("203.0.113.7", 80)
        await asyncio.sleep(0.05)
        await node.service("web", 1)
        await node.endpoints("web", Address("127.0.0.1", 1))
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 3)
        writer.close()
        await node.endpoints("web", node.backend)
    for sock in (*filler, deaf):
        sock.close()


async def test_without_file_descriptors_connections_wait_and_it_is_told_once(caplog):
    """The backend is another process: it must not feel the limit."""

    async def answered(sock):
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(sock, b"x")
            async with asyncio.timeout(8):
                return await loop.sock_recv(sock, 10)
        finally:
            sock.close()

    command = [sys.executable, "-c", SLOW_ECHO]
    backend = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        async with proxied(4) as node:
            await node.service("web", 1)
            port = int(await backend.stdout.readline())
            await node.endpoints("web", Address("127.0.0.1", port))
            clients = [socket.socket() for _ in range(24)]
            highest = max(client.fileno() for client in clients)
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 14, limits[1]))
            for client in clients:
                client.setblocking(False)
                client.connect_ex((node.vip(1), 80))
            async with asyncio.TaskGroup() as tasks:
                answers = [tasks.create_task(answered(client)) for client in clients]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        backend.kill()
        await backend.wait()
    assert [answer.result() for answer in answers] == [b"x"] * len(clients)
    assert [r.msg for r in caplog.records].count(OUT_OF_FILES) == 1
