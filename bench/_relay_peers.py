"""The processes that the bench of the relay starts: a backend, pyproxy's relay, HAProxy, nginx."""

import asyncio
import ctypes
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import uvloop

from pyproxy.balancer import Picker
from pyproxy.host import LOOPBACK
from pyproxy.model import Address, Backend, Forward, Frontend, Pool, Route, ServicePortName
from pyproxy.process import calm_collector
from pyproxy.proxier._accept import TcpFront
from pyproxy.proxier._batch import DATAGRAMS, HEADER_WORDS, Batch
from pyproxy.proxier._flow import IdleTimeouts, UdpRelay
from pyproxy.proxier._poller import RelayLoop
from pyproxy.proxier._sockets import listening
from pyproxy.proxier._tcp import TcpRelay
from pyproxy.proxier._udp import UdpFront
from pyproxy.rules.listeners import Listener, Surroundings

IP = "127.0.0.1"
NGINX_MODULES = Path("/usr/lib/nginx/modules")
START_SECONDS = 10
IPV4_NAME = 16  # bytes of a struct sockaddr_in
HAPROXY = """\
global
  nbthread {threads}
defaults
  mode tcp
  timeout connect 5s
  timeout client 60s
  timeout server 60s
"""
NGINX = """\
load_module {modules}/ngx_stream_module.so;
daemon off;
master_process off;
pid {folder}/pid;
error_log stderr error;
events {{ worker_connections 4096; }}
stream {{
proxy_half_close on;
{servers}
}}
"""


class Ports(NamedTuple):
    """What the backend has, and a proxy leads to; HAProxy has no UDP."""

    echo: int
    sink: int
    stall: int
    datagrams: int = 0


class Target(NamedTuple):
    """Who is measured: its processes, and where they are to be reached."""

    pids: tuple[int, ...]
    ports: Ports

    def cpu_seconds(self) -> float:
        tasks = [task for pid in self.pids for task in Path(f"/proc/{pid}/task").iterdir()]
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def memory_bytes(self) -> int:
        statms = [Path(f"/proc/{pid}/statm").read_text() for pid in self.pids]
        return sum(int(text.split()[1]) for text in statms) * os.sysconf("SC_PAGESIZE")


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


class NamedBatch(Batch):
    """For a socket that is not connected: each datagram goes back to its sender."""

    def __init__(self) -> None:
        super().__init__()
        self._names = ctypes.create_string_buffer(DATAGRAMS * IPV4_NAME)
        for headers in (self._incoming, self._outgoing):
            for index in range(DATAGRAMS):
                headers[HEADER_WORDS * index] = ctypes.addressof(self._names) + IPV4_NAME * index
                headers[HEADER_WORDS * index + 1] = IPV4_NAME


async def backend() -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(kind, IP, 0, backlog=4096) for kind in (Echo, Sink)]
    stall = socket.create_server((IP, 0))  # who connects is never even accepted
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.setblocking(False)
    datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    datagrams.bind((IP, 0))

    batch = NamedBatch()

    def answer() -> None:
        with suppress(BlockingIOError):
            while True:
                batch.send(datagrams.fileno(), batch.receive(datagrams.fileno()))

    loop.add_reader(datagrams, answer)
    tell([*(server.sockets[0] for server in servers), stall, datagrams])
    await asyncio.Event().wait()


async def relay(ports: Ports, own: Ports) -> None:
    """Relay to these ports, at ports of its own; at 0, at whichever is free."""
    around = Surroundings(loopback=(LOOPBACK[4],))
    tcp = TcpRelay(lambda: around, lambda _result: None)
    udp = UdpRelay(tcp.poller, lambda: around, IdleTimeouts(), lambda _result: None)
    sockets = []
    for name, port, own_port in zip(Ports._fields, ports, own, strict=True):
        proto = "UDP" if name == "datagrams" else "TCP"
        pool = Pool((Backend(Address(IP, port), is_local=True),))
        picker = Picker(random.randrange)
        picker.use([pool])
        action = Forward(pool)
        route = Route(Frontend(IP, 1, proto), "ClusterIP", action, action, action)
        listener = Listener(ServicePortName("bench", name, "", proto), route)
        sock = listening(IP, own_port, proto, wildcard=False)
        sockets.append(sock)
        if proto == "TCP":
            TcpFront(tcp, [sock], listener, picker)
        else:
            UdpFront(udp, [sock], listener, picker, wildcard=False)
    tell(sockets)
    await asyncio.Event().wait()


def tell(sockets: Sequence[socket.socket]) -> None:
    print(*(sock.getsockname()[1] for sock in sockets), flush=True)


@contextmanager
def running(*role: object) -> Iterator[Target]:
    """Run this file in a role."""
    command = [sys.executable, "-m", "bench._relay_peers", *map(str, role)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        yield Target((process.pid,), Ports(*(int(word) for word in words)))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def relays(ports: Ports, workers: int) -> Iterator[Target]:
    """Run so many processes that relay, at the same ports."""
    with ExitStack() as stack:
        first = stack.enter_context(running("relay", *ports, *[0] * len(ports)))
        others = [
            stack.enter_context(running("relay", *ports, *first.ports)) for _ in range(1, workers)
        ]
        yield Target(tuple(pid for each in (first, *others) for pid in each.pids), first.ports)


@contextmanager
def haproxy(ports: Ports, threads: int) -> Iterator[Target]:
    own = Ports(*free_ports(socket.SOCK_STREAM, 3))
    lines = [
        f"listen {name}\n  bind {IP}:{near}\n  server s {IP}:{far}\n"
        for name, near, far in zip(Ports._fields[:3], own, ports, strict=False)
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "haproxy.cfg")
        config.write_text(HAPROXY.format(threads=threads) + "".join(lines))
        with listening_process(["haproxy", "-db", "-q", "-f", str(config)], own.sink) as pid:
            yield Target((pid,), own)


@contextmanager
def nginx(ports: Ports) -> Iterator[Target]:
    own = Ports(*free_ports(socket.SOCK_STREAM, 3), *free_ports(socket.SOCK_DGRAM, 1))
    servers = "\n".join(
        f"server {{ listen {IP}:{near}{kind}; proxy_pass {IP}:{far}; }}"
        for near, far, kind in zip(own, ports, ("", "", "", " udp"), strict=True)
    )
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "nginx.conf")
        config.write_text(NGINX.format(modules=NGINX_MODULES, folder=folder, servers=servers))
        with listening_process(["nginx", "-p", folder, "-c", str(config)], own.sink) as pid:
            yield Target((pid,), own)


@contextmanager
def listening_process(command: Sequence[str], port: int) -> Iterator[int]:
    process = subprocess.Popen(command)
    try:
        wait_for(process, port)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def wait_for(process: subprocess.Popen, port: int) -> None:
    for _ in range(START_SECONDS * 100):
        with suppress(ConnectionRefusedError), socket.create_connection((IP, port)):
            return
        with suppress(subprocess.TimeoutExpired):
            raise RuntimeError(f"{process.args[0]} ended with {process.wait(0.01)}")
    raise TimeoutError(f"{process.args[0]} does not listen")


def free_ports(kind: int, count: int) -> list[int]:
    spare = [socket.socket(socket.AF_INET, kind) for _ in range(count)]
    for sock in spare:
        sock.bind((IP, 0))
    ports = [sock.getsockname()[1] for sock in spare]
    for sock in spare:
        sock.close()
    return ports


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["backend"]:
            uvloop.run(backend())
        case ["relay", *words]:
            calm_collector()
            with asyncio.Runner(loop_factory=RelayLoop) as runner:
                numbers = [int(word) for word in words]
                half = len(numbers) // 2
                runner.run(relay(Ports(*numbers[:half]), Ports(*numbers[half:])))
