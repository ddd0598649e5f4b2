"""A small network around this namespace, which is the node: pods on it, and what is beyond it."""

import asyncio
import os
import socket
import subprocess
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pyroute2 import netns

from tests.netns.node import NODE_IP

ANSWER_SECONDS = 10.0  # at most: milliseconds, but this machine may be slow
SILENCE_SECONDS = 2.0  # at least: a refusal may have to wait for the second SYN of TCP
PORT = 8080  # where all pods answer
SOCKETS = {
    "TCP": (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    "UDP": (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    "SCTP": (socket.SOCK_STREAM, socket.IPPROTO_SCTP),
}
PODS = {4: "10.244.0.0/16", 6: "fd00:10:244::/48"}
# Pods a and b are on the node; far is on another one, which is in the namespace outside.
POD = {
    4: {"a": "10.244.1.10", "b": "10.244.1.11", "far": "10.244.2.10"},
    6: {"a": "fd00:10:244:1::10", "b": "fd00:10:244:1::11", "far": "fd00:10:244:2::10"},
}
CLIENT = {4: "192.0.2.50", 6: "fd00:c0de::50"}
STRANGER = {4: "198.51.100.50", 6: "fd00:5e::50"}
GATEWAY = {4: "10.244.1.1", 6: "fd00:10:244:1::1"}  # of pods: an address of the node
SERVICES = {4: "10.96.0.0/16", 6: "fd00:10:96::/112"}
BALANCED = {4: "198.18.0.0/16", 6: "fd00:198:18::/112"}
ANYWHERE = {4: "0.0.0.0/0", 6: "::/0"}
BITS = {4: 32, 6: 128}
HOME = "node"
NAMESPACES = {"a": "a", "b": "b", "far": "outside"}
SYSCTLS = {
    "net/ipv4/ip_forward": 1,
    "net/ipv4/conf/all/rp_filter": 0,
    "net/ipv4/conf/default/rp_filter": 0,
    "net/ipv4/conf/all/send_redirects": 0,
    "net/ipv4/icmp_ratelimit": 0,
    "net/ipv6/conf/all/forwarding": 1,
    "net/ipv6/icmp/ratelimit": 0,
}


class Reply(NamedTuple):
    """Which pod answered, and whom it saw."""

    pod: str
    client: str


def build():
    """Make the namespaces and links of both families. They stay until ``remove``."""
    for name in ("a", "b", "outside"):
        batch(f"netns add {name}")
    for name in (HOME, "a", "b", "outside"):
        with inside(name):
            for key, value in SYSCTLS.items():
                Path("/proc/sys", key).write_text(str(value))
    lines = ["link set lo up", "link add uplink type veth peer name eth0 netns outside"]
    lines += ["link set uplink up"]
    for name in ("a", "b"):
        lines.append(f"link add pod-{name} type veth peer name eth0 netns {name}")
        lines.append(f"link set pod-{name} up")
    for family in (4, 6):
        lines += [address(NODE_IP[family], "uplink", {4: 24, 6: 64}[family])]
        lines += [f"route add default via {CLIENT[family]}"]
        for name in ("a", "b"):
            lines.append(address(GATEWAY[family], f"pod-{name}", BITS[family]))
            lines.append(f"route add {POD[family][name]} dev pod-{name}")
    batch(*lines)
    for name in ("a", "b"):
        batch("link set lo up", "link set eth0 up", *pod_lines(name), name=name)
    batch("link set lo up", "link set eth0 up", *outside_lines(), name="outside")


def remove():
    for name in ("a", "b", "outside"):
        batch(f"netns del {name}")


def pod_lines(name):
    for family in (4, 6):
        yield address(POD[family][name], "eth0", BITS[family])
        yield f"route add {GATEWAY[family]} dev eth0"
        yield f"route add default via {GATEWAY[family]}"


def outside_lines():
    for family in (4, 6):
        yield address(CLIENT[family], "eth0", {4: 24, 6: 64}[family])
        for ip in (STRANGER[family], POD[family]["far"]):
            yield address(ip, "lo", BITS[family])
        for network in (PODS[family], SERVICES[family], BALANCED[family]):
            yield f"route add {network} via {NODE_IP[family]}"
        yield f"route add blackhole {ANYWHERE[family]}"


def address(ip, device, bits):
    return f"address add {ip}/{bits} dev {device}" + (" nodad" if ":" in ip else "")


def batch(*lines, name=HOME):
    """Have ``ip`` do all lines, in a namespace."""
    with inside(name):
        output_of("ip", "-batch", "-", text="\n".join(lines))


def output_of(*argv, text=""):
    pipe = subprocess.PIPE
    child = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    output, _ = child.communicate(text, timeout=120)
    assert child.returncode == 0, output
    return output


@contextmanager
def inside(name):
    """Put this thread into a namespace: nobody may await in the block."""
    if name == HOME:
        yield
        return
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    netns.setns(name)
    try:
        yield
    finally:
        netns.setns(home)
        os.close(home)


def open_socket(name, family, proto):
    kind, number = SOCKETS[proto]
    with inside(name):
        sock = socket.socket({4: socket.AF_INET, 6: socket.AF_INET6}[family], kind, number)
    sock.setblocking(False)
    return sock


# --- pods -----------------------------------------------------------------------------------------


class Pods:
    """What answers in pods, with the pod's name and the address it sees."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._sockets = []
        self._jobs = []

    def serve(self, name, ip, proto):
        sock = open_socket(NAMESPACES[name], 6 if ":" in ip else 4, proto)
        self._sockets.append(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((ip, PORT))
        if proto == "UDP":
            self._start(self._answer(sock, name))
        else:
            sock.listen()
            self._start(self._accept(sock, name))

    async def close(self):
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        for sock in self._sockets:
            sock.close()

    def _start(self, job):
        self._jobs.append(self._loop.create_task(job))

    async def _answer(self, sock, name):
        while True:
            _said, peer = await self._loop.sock_recvfrom(sock, 64)
            await self._loop.sock_sendto(sock, f"{name} {peer[0]}".encode(), peer)

    async def _accept(self, sock, name):
        while True:
            connection, peer = await self._loop.sock_accept(sock)
            self._sockets.append(connection)
            self._start(self._converse(connection, f"{name} {peer[0]}".encode()))

    async def _converse(self, connection, word):
        with connection, suppress(ConnectionError):
            while await self._loop.sock_recv(connection, 64):
                await self._loop.sock_sendall(connection, word)


@asynccontextmanager
async def pods(family, proto):
    """Have all pods answer."""
    found = Pods()
    try:
        for name, ip in POD[family].items():
            found.serve(name, ip, proto)
        yield
    finally:
        await found.close()


# --- clients --------------------------------------------------------------------------------------


class Client:
    """A connection, or a socket that has one peer."""

    def __init__(self, name, ip, port, proto, source):
        self.sock = open_socket(name, 6 if ":" in ip else 4, proto)
        if source:
            self.sock.bind((source, 0))
        self.peer = (ip, port)

    async def connect(self, seconds=ANSWER_SECONDS):
        async with asyncio.timeout(seconds):
            await asyncio.get_running_loop().sock_connect(self.sock, self.peer)

    async def say(self, seconds=ANSWER_SECONDS):
        """Ask who is there."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(seconds):
            with suppress(PermissionError):  # the node's own, and refused: it will be told why
                await loop.sock_sendall(self.sock, b"?")
            return Reply(*(await loop.sock_recv(self.sock, 64)).decode().split())

    def close(self):
        self.sock.close()

    def abort(self):
        """Close so that the other side is told at once, and nothing lingers."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()


async def ask(name, ip, port, proto="TCP", *, source=None, seconds=ANSWER_SECONDS):
    """Ask from a namespace; return the reply, or a word for why there is none."""
    client = Client(name, ip, port, proto, source)
    try:
        await client.connect(seconds)
        return await client.say(seconds)
    except TimeoutError:
        return "silent"
    except ConnectionRefusedError:
        return "refused"
    finally:
        client.close()
