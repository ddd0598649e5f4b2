"""The userspace relay as ratios to no proxy at all, and to HAProxy where that is installed.

python bench/relay.py [ROUNDS]      client, proxy and backend are processes; loopback, no root
"""

import asyncio
import os
import random
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from threading import Thread
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1]))

import uvloop

from pyproxy.balancer import Picker
from pyproxy.model import Address, Backend, Forward, Frontend, Pool, Route, ServicePortName
from pyproxy.proxier._sockets import listening
from pyproxy.proxier._tcp import TcpFront, TcpRelay
from pyproxy.proxier._udp import IdleTimeouts, UdpFront, UdpRelay
from pyproxy.rules.listeners import Listener, Surroundings

IP = "127.0.0.1"
SECONDS = 0.5  # of one measurement
TICKS = os.sysconf("SC_CLK_TCK")
BLOCK = bytes(1 << 20)

Ports = list[int]  # one that echoes TCP, one that swallows TCP, one that echoes UDP
HAPROXY = """
global
  nbthread 1
defaults
  mode tcp
  timeout connect 5s
  timeout client 60s
  timeout server 60s
"""


class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(data)


class Sink(asyncio.BufferedProtocol):
    """Swallows everything; says so when it has all."""

    buffer = memoryview(bytearray(1 << 20))

    def connection_made(self, transport):
        self.transport = transport

    def get_buffer(self, _size):
        return self.buffer

    def buffer_updated(self, _count):
        pass

    def eof_received(self):
        self.transport.write(b".")


async def backend() -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(kind, IP, 0, backlog=4096) for kind in (Echo, Sink)]
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.setblocking(False)
    datagrams.bind((IP, 0))

    def answer() -> None:
        with suppress(BlockingIOError):
            while True:
                data, peer = datagrams.recvfrom(2048)
                datagrams.sendto(data, peer)

    loop.add_reader(datagrams, answer)
    tell([*(server.sockets[0] for server in servers), datagrams])
    await asyncio.Event().wait()


async def proxy(ports: Ports) -> None:
    def observe(_result: str) -> None:
        pass

    sockets = []
    async with asyncio.TaskGroup() as tasks:
        tcp = TcpRelay(Surroundings, observe)
        udp = UdpRelay(Surroundings, IdleTimeouts(), observe)
        for port, proto in zip(ports, ("TCP", "TCP", "UDP"), strict=True):
            pool = Pool((Backend(Address(IP, port)),))
            picker = Picker(random.randrange)
            picker.use([pool])
            action = Forward(pool)
            route = Route(Frontend(IP, 1, proto), "ClusterIP", action, action, action)
            listener = Listener(ServicePortName("bench", "relay", "", proto), route)
            sock = listening(IP, 0, proto, wildcard=False)
            sockets.append(sock)
            if proto == "TCP":
                TcpFront(tcp, [sock], listener, picker)
            else:
                UdpFront(udp, [sock], listener, picker, wildcard=False)
        tell(sockets)
        await asyncio.Event().wait()


def tell(sockets: list[socket.socket]) -> None:
    print(*(sock.getsockname()[1] for sock in sockets), flush=True)


@contextmanager
def running(*role: object) -> Iterator[tuple[int, Ports]]:
    """Run this file in another role; yield its process id and ports."""
    command = [sys.executable, __file__, *map(str, role)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.pid, [int(word) for word in process.stdout.readline().split()]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def haproxy(ports: Ports) -> Iterator[tuple[int, Ports]]:
    spare = [socket.create_server((IP, 0)) for _ in range(2)]
    own = [sock.getsockname()[1] for sock in spare]
    for sock in spare:
        sock.close()
    lines = [
        f"listen l{near}\n  bind {IP}:{near}\n  server s {IP}:{far}\n"
        for near, far in zip(own, ports, strict=False)
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".cfg") as file:
        file.write(HAPROXY + "".join(lines))
        file.flush()
        process = subprocess.Popen(["haproxy", "-db", "-q", "-f", file.name])
        try:
            wait_for(own[1])
            yield process.pid, own
        finally:
            process.kill()
            process.wait()


def wait_for(port: int) -> None:
    for _ in range(10_000):
        with suppress(ConnectionRefusedError), socket.create_connection((IP, port)):
            return
    raise TimeoutError("HAProxy does not listen")


def connections(ports: Ports, at_once: int) -> float:
    """New connections in a second: one byte each way, then the client closes."""

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
                _transport, protocol = await loop.create_connection(Client, IP, ports[0])
                await protocol.closed
                done += 1

        async with asyncio.TaskGroup() as tasks:
            for _ in range(at_once):
                tasks.create_task(client())
        return done

    started_at = perf_counter()
    return uvloop.run(run()) / (perf_counter() - started_at)


def bulk(ports: Ports, streams: int) -> float:
    """MB in a second, until the backend has it all."""
    sent = []

    def stream() -> None:
        with socket.create_connection((IP, ports[1])) as sock:
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
    return sum(sent) / (perf_counter() - started_at) / 1e6


def datagrams(ports: Ports, clients: int, in_flight: int = 16) -> float:
    """Datagrams of 64 bytes that come back in a second."""
    done = 0
    with selectors.DefaultSelector() as selector, ExitStack() as stack:
        for _ in range(clients):
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.setblocking(False)
            sock.connect((IP, ports[2]))
            selector.register(sock, selectors.EVENT_READ)
            for _ in range(in_flight):
                sock.send(bytes(64))
        started_at = perf_counter()
        while perf_counter() < started_at + SECONDS:
            for key, _events in selector.select(0.1):
                with suppress(BlockingIOError):
                    while True:
                        key.fileobj.send(key.fileobj.recv(2048))
                        done += 1
        return done / (perf_counter() - started_at)


TESTS: dict[str, tuple[Callable[[Ports, int], float], int]] = {
    "new connections/s, one by one": (connections, 1),
    "new connections/s, 64 at once": (connections, 64),
    "MB/s, 1 stream": (bulk, 1),
    "MB/s, 8 streams": (bulk, 8),
    "UDP echoes/s, 8 clients": (datagrams, 8),
}


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def measured(targets: dict[str, tuple[int, Ports]], rounds: int) -> None:
    for name, (test, size) in TESTS.items():
        rates: dict[str, list[float]] = {target: [] for target in targets}
        costs: dict[str, list[float]] = {target: [] for target in targets}
        for _ in range(rounds):  # interleaved, for others may use the machine
            for target, (pid, ports) in targets.items():
                if test is datagrams and len(ports) < 3:
                    continue
                before = cpu_seconds(pid)
                rates[target].append(test(ports, size))
                used = cpu_seconds(pid) - before
                costs[target].append(used / (rates[target][-1] * SECONDS) * 1e6)
        report(name, rates, costs)


def report(name: str, rates: dict[str, list[float]], costs: dict[str, list[float]]) -> None:
    direct = rates["direct"]
    line = f"{name:<31}direct {median(direct):9,.0f}"
    for target, found in rates.items():
        if target != "direct" and found:
            ratio = median(rate / base for rate, base in zip(found, direct, strict=True))
            line += f" | {target} {ratio:.2f} of it, {median(costs[target]):5.0f} us CPU each"
    if rates.get("haproxy"):
        pairs = zip(rates["pyproxy"], rates["haproxy"], strict=True)
        line += f" | pyproxy/haproxy {median(own / other for own, other in pairs):.2f}"
    print(line, flush=True)


def main(rounds: int) -> None:
    with ExitStack() as stack:
        pid, ports = stack.enter_context(running("backend"))
        targets = {"direct": (pid, ports), "pyproxy": stack.enter_context(running("proxy", *ports))}
        if shutil.which("haproxy"):
            targets["haproxy"] = stack.enter_context(haproxy(ports))
        measured(targets, rounds)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["backend"]:
            uvloop.run(backend())
        case ["proxy", *words]:
            uvloop.run(proxy([int(word) for word in words]))
        case words:
            main(int(words[0]) if words else 3)
