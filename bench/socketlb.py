"""Socket load balancing as ratios to a connection straight to the backend.

python -m bench.socketlb [ROUNDS]      root, cgroup v2; in a network namespace of its own

Each round measures, one after the other: a client outside the cgroup that connects to the backend
(``direct``), one in the cgroup that connects to the Service, and one in the cgroup that connects to
the backend, which is what the programs cost those who ask for no Service.
"""

import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from threading import Event, Thread
from time import perf_counter

from bench._lab import isolate
from pyproxy.model import Address, Backend, Forward, Frontend, Pool, Route, ServicePortName
from pyproxy.proxier._socketlb_kernel import SocketBalancer
from pyproxy.proxier._socketlb_site import mounts
from pyproxy.rules.listeners import Listener

IPS = {4: ("127.0.0.1", "10.96.0.1"), 6: ("::1", "fd00:10:96::1")}
ECHO, SINK, SERVICES = 7001, 7002, 10_000
SECONDS = 0.1  # of one measurement: short, and many, for others may use the machine
BLOCK = bytes(1 << 20)
CLIENTS = ("direct", "service", "bystander")


def opened(ip: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, kind)


def serve(ip: str) -> None:
    """Echo streams and datagrams at one port, and swallow streams at another."""
    for kind, port, work in (
        (socket.SOCK_STREAM, ECHO, echo),
        (socket.SOCK_STREAM, SINK, swallow),
        (socket.SOCK_DGRAM, ECHO, reply),
    ):
        sock = opened(ip, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((ip, port))
        if kind is socket.SOCK_STREAM:
            sock.listen(4096)
        Thread(target=work, args=(sock,), daemon=True).start()
    Event().wait()


def echo(listener: socket.socket) -> None:
    """Serve one connection after the other."""
    while True:
        client, _ = listener.accept()
        with client, suppress(OSError):
            while data := client.recv(4096):
                client.sendall(data)


def swallow(listener: socket.socket) -> None:
    buffer = bytearray(1 << 20)
    while True:
        client, _ = listener.accept()
        with client:
            while client.recv_into(buffer):
                pass
            client.sendall(b".")


def reply(datagrams: socket.socket) -> None:
    while True:
        data, peer = datagrams.recvfrom(2048)
        datagrams.sendto(data, peer)


def connections(ip: str) -> float:
    """Connections in a second: connect, and close with a reset, for ports would run out."""
    started_at, done = perf_counter(), 0
    linger = b"\1\0\0\0\0\0\0\0"
    while perf_counter() < started_at + SECONDS:
        with opened(ip) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            sock.connect((ip, ECHO))
            sock.send(b"x")
            sock.recv(1)
        done += 1
    return done / (perf_counter() - started_at)


def requests(ip: str) -> float:
    """Round trips of 64 bytes in a second, on one connection."""
    with opened(ip) as sock:
        sock.connect((ip, ECHO))
        return repeated(lambda: (sock.send(bytes(64)), sock.recv(64)))


def bulk(ip: str) -> float:
    """MB in a second, until the backend has it all."""
    with opened(ip) as sock:
        sock.connect((ip, SINK))
        started_at, count = perf_counter(), 0
        while perf_counter() < started_at + SECONDS:
            sock.sendall(BLOCK)
            count += len(BLOCK)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b".", "the backend has not got all"
        return count / (perf_counter() - started_at) / 1e6


def flow(ip: str) -> float:
    """Datagrams there and back in a second, from a socket without a peer."""
    with opened(ip, socket.SOCK_DGRAM) as sock:
        return repeated(lambda: (sock.sendto(bytes(64), (ip, ECHO)), sock.recvfrom(64)))


def repeated(work: Callable[[], object]) -> float:
    started_at, done = perf_counter(), 0
    while perf_counter() < started_at + SECONDS:
        work()
        done += 1
    return done / (perf_counter() - started_at)


TESTS = {
    "connections/s": connections,
    "round trips/s": requests,
    "MB/s": bulk,
    "UDP round trips/s": flow,
}


@contextmanager
def cgroup():
    """A cgroup for the clients, and the one they come from."""
    root = next(mount.at for mount in mounts() if mount.kind == "cgroup2" and mount.root == "/")
    home = root / Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
    group = home / f"pyproxy-bench-{os.getpid()}"
    group.mkdir()
    try:
        yield home, group
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def listener(frontend: Frontend, *backends: Address) -> Listener:
    action = Forward(Pool(tuple(Backend(address) for address in backends)))
    owner = ServicePortName("bench", frontend.ip, str(frontend.port), frontend.proto)
    route = Route(frontend, "ClusterIP", action, action, action)
    return Listener(owner, route, frozenset(backends))


def fill(balancer: SocketBalancer, family: int) -> None:
    """Load many Services with ten endpoints each; say how long that took, and one change."""
    pattern = "10.97.{}.{}" if family == 4 else "fd00:97::{:x}:{:x}"
    ips = [pattern.format(n >> 8, n & 255) for n in range(SERVICES)]
    node = "10.244.0.{}" if family == 4 else "fd00:244::{}"
    frontends = [Frontend(ip, 80, "TCP") for ip in ips]
    backends = [Address(node.format(n), 8080) for n in range(11)]
    started_at = perf_counter()
    for frontend in frontends:
        balancer.put(frontend, listener(frontend, *backends[:10]))
    loaded = perf_counter() - started_at
    started_at = perf_counter()
    for frontend in frontends[:1000]:
        balancer.put(frontend, listener(frontend, *backends[1:]))
    changed = perf_counter() - started_at
    each = f"{changed * 1000:.0f} us for one that changes"  # of a thousand
    print(f"IPv{family} {SERVICES:,} Services x 10 endpoints in {loaded:.2f} s, {each}", flush=True)


def measure(family: int, rounds: int, home: Path, group: Path) -> None:
    direct, vip = IPS[family]
    where = {"direct": (home, direct), "service": (group, vip), "bystander": (group, direct)}
    for name, test in TESTS.items():
        rates: dict[str, list[float]] = {client: [] for client in CLIENTS}
        for number in range(rounds):
            order = CLIENTS if number % 2 else tuple(reversed(CLIENTS))
            for client in order:
                of, ip = where[client]
                (of / "cgroup.procs").write_text(str(os.getpid()))
                rates[client].append(test(ip))
        base = rates["direct"]
        line = f"IPv{family} {name:<18} direct {median(base):9,.0f}"
        for client in CLIENTS[1:]:
            ratios = sorted(rate / of for rate, of in zip(rates[client], base, strict=True))
            spread = f"{quarter(ratios, 1):.2f}-{quarter(ratios, 3):.2f}"
            line += f" | {client} {median(ratios):.2f} ({spread})"
        print(line, flush=True)


def quarter(ordered: list[float], number: int) -> float:
    return ordered[len(ordered) * number // 4]


def main(rounds: int) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with cgroup() as (home, group):
        for family, (ip, vip) in IPS.items():
            server = get_context("spawn").Process(target=serve, args=(ip,), daemon=True)
            server.start()
            balancer = SocketBalancer(family, group, None, random.randrange)
            try:
                fill(balancer, family)
                for port, proto in ((ECHO, "TCP"), (SINK, "TCP"), (ECHO, "UDP")):
                    frontend = Frontend(vip, port, proto)
                    balancer.put(frontend, listener(frontend, Address(ip, port)))
                balancer.attach()
                wait_for(ip)
                measure(family, rounds, home, group)
            finally:
                balancer.close()
                server.kill()
                server.join()


def wait_for(ip: str) -> None:
    until = perf_counter() + 10
    while perf_counter() < until:
        with suppress(ConnectionRefusedError), opened(ip) as sock:
            sock.connect((ip, SINK))
            return
    raise TimeoutError("the backend does not listen")


if __name__ == "__main__":
    isolate("bench.socketlb")
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 99)
