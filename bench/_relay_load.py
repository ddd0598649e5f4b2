"""What the bench of the relay sends: each function returns how much came through, in how long."""

import asyncio
import select
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from threading import Thread
from time import perf_counter
from typing import NamedTuple

import uvloop

from bench._relay_peers import IP, Ports, Target
from pyproxy.proxier._batch import Batch

SECONDS = 0.5  # of one measurement
BLOCK = bytes(1 << 20)
MESSAGE = bytes(64)
STALL_SECONDS = 0.3  # without progress, until a stream counts as stalled


class Work(NamedTuple):
    count: float
    seconds: float

    @property
    def rate(self) -> float:
        return self.count / self.seconds


def connections(ports: Ports, at_once: int) -> Work:
    """New connections: one byte each way, then the client closes."""

    async def run() -> int:
        loop = asyncio.get_running_loop()
        until, done = loop.time() + SECONDS, 0

        class Client(asyncio.Protocol):
            def connection_made(self, transport):
                self.transport = transport
                self.closed = loop.create_future()
                transport.write(b"x")

            def data_received(self, _data):
                self.transport.close()

            def connection_lost(self, _error):
                self.closed.set_result(None)

        async def client() -> None:
            nonlocal done
            while loop.time() < until:
                _transport, protocol = await loop.create_connection(Client, IP, ports.echo)
                await protocol.closed
                done += 1

        async with asyncio.TaskGroup() as tasks:
            for _ in range(at_once):
                tasks.create_task(client())
        return done

    started_at = perf_counter()
    return Work(uvloop.run(run()), perf_counter() - started_at)


def bulk(ports: Ports, streams: int) -> Work:
    """Bytes, until the backend has them all."""
    sent = []

    def stream() -> None:
        with socket.create_connection((IP, ports.sink)) as sock:
            count = 0
            while perf_counter() < until:
                sock.sendall(BLOCK)
                count += len(BLOCK)
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b".", "the backend has not got all"
        sent.append(count)

    started_at = perf_counter()
    until = started_at + SECONDS
    threads = [Thread(target=stream) for _ in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Work(sum(sent), perf_counter() - started_at)


def messages(ports: Ports, clients: int) -> Work:
    """Messages of 64 bytes that come back, one on its way on each of the connections."""
    with ExitStack() as stack:
        socks = [
            stack.enter_context(socket.create_connection((IP, ports.echo))) for _ in range(clients)
        ]
        for sock in socks:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return echoed(socks, 1)


def datagrams(ports: Ports, clients: int, in_flight: int) -> Work:
    """Datagrams of 64 bytes that come back, so many on their way for each client."""
    with ExitStack() as stack:
        socks = []
        for _ in range(clients):
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.connect((IP, ports.datagrams))
            socks.append(sock)
        return echoed(socks, in_flight)


def echoed(socks: list[socket.socket], in_flight: int) -> Work:
    """Send anew what comes back."""
    done, batch = 0, Batch()
    with select.epoll() as epoll:
        for sock in socks:
            sock.setblocking(False)
            epoll.register(sock, select.EPOLLIN)
            for _ in range(in_flight):
                sock.send(MESSAGE)
        by_fd = {sock.fileno(): sock for sock in socks}
        started_at = perf_counter()
        while perf_counter() < started_at + SECONDS:
            for fd, _events in epoll.poll(0.1):
                if in_flight > 1:
                    count = batch.receive(fd)
                    batch.send(fd, count)
                    done += count
                else:
                    by_fd[fd].send(by_fd[fd].recv(2048))
                    done += 1
        return Work(done, perf_counter() - started_at)


def stalled_bytes(target: Target) -> tuple[int, int]:
    """Return what is taken in for a reader that reads nothing, and the memory that this costs."""
    before = target.memory_bytes()
    with socket.create_connection((IP, target.ports.stall)) as sock:
        sock.settimeout(STALL_SECONDS)
        count = 0
        with suppress(TimeoutError):
            while True:
                count += sock.send(BLOCK)
        return count, target.memory_bytes() - before


class Test(NamedTuple):
    """``unit`` of them are a figure: GB, a thousand connections."""

    run: Callable[..., Work]
    sizes: tuple[int, ...]
    unit: float
    words: str


TESTS = {
    "bulk, 1 stream": Test(bulk, (1,), 1e9, "GB"),
    "bulk, 8 streams": Test(bulk, (8,), 1e9, "GB"),
    "new connections, one by one": Test(connections, (1,), 1e3, "1000"),
    "new connections, 64 at once": Test(connections, (64,), 1e3, "1000"),
    "1 persistent connection, 64 B": Test(messages, (1,), 1e3, "1000"),
    "64 persistent connections, 64 B": Test(messages, (64,), 1e3, "1000"),
    "UDP, 8 clients, 16 in flight": Test(datagrams, (8, 16), 1e3, "1000"),
    "UDP, 1 client, 64 in flight": Test(datagrams, (1, 64), 1e3, "1000"),
    "UDP, 64 clients, 1 in flight": Test(datagrams, (64, 1), 1e3, "1000"),
    "UDP, 1 client, 1 in flight": Test(datagrams, (1, 1), 1e3, "1000"),
}
