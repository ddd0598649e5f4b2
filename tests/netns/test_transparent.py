"""Whom backends see: clients and backends in namespaces of their own, this one is the node."""

import asyncio
import json
import subprocess
import sys
from contextlib import ExitStack, asynccontextmanager, contextmanager

import pytest

from pyproxy.config import Config, Userspace
from pyproxy.model import Address
from pyproxy.proxier import _transparent
from pyproxy.proxier._nfnetlink import NfTables
from tests.netns.abuse import TRIALS
from tests.netns.node import proxied

OUTSIDE = {4: "203.0.113.60", 6: "fd00:6e::60"}
POD = {4: "10.244.1.30", 6: "fd00:10:244::30"}
GATEWAY = {4: "169.254.1.1", 6: "fe80::1"}
PORT = 8080
both = pytest.mark.parametrize("family", [4, 6])

WHO = """
import socket, sys, threading
ip, port = sys.argv[1], int(sys.argv[2])
kind = socket.AF_INET6 if ":" in ip else socket.AF_INET
tcp, udp = socket.socket(kind, socket.SOCK_STREAM), socket.socket(kind, socket.SOCK_DGRAM)
tcp.bind((ip, port)); tcp.listen(100); udp.bind((ip, port))
print("ready", flush=True)
def datagrams():
    while True:
        _, peer = udp.recvfrom(100)
        udp.sendto(peer[0].encode(), peer)
threading.Thread(target=datagrams, daemon=True).start()
while True:
    sock, peer = tcp.accept()
    sock.sendall(peer[0].encode())
    sock.close()
"""
ASK = """
import collections, json, socket, sys
ip, port, kind, count = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
seen = collections.Counter()
for _ in range(count):
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM if kind == "TCP" else socket.SOCK_DGRAM)
    sock.settimeout(3)
    try:
        sock.connect((ip, port))
        sock.send(b"?")
        seen[sock.recv(100).decode()] += 1
    except OSError as error:
        seen[str(error)] += 1
    sock.close()
print(json.dumps(seen))
"""


class Machine:
    """A namespace behind an interface of this one."""

    def __init__(self, stack, name, addresses):
        command = ["unshare", "--net", "sh", "-c", "echo; exec sleep 1000"]
        process = stack.enter_context(started(command))
        self._pid = str(process.pid)
        done("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", self._pid)
        stack.callback(done, "ip", "link", "del", name)
        done("ip", "link", "set", name, "up")
        done("ip", "addr", "add", f"{GATEWAY[4]}/32", "dev", name)
        done("ip", "addr", "add", f"{GATEWAY[6]}/64", "dev", name, "nodad")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "link", "set", "eth0", "up")
        for family, ip in addresses.items():
            flags = ["nodad"] if family == 6 else []
            self.run("ip", "addr", "add", ip, "dev", "eth0", *flags)
            gateway = [GATEWAY[family], "dev", "eth0"]
            if family == 4:
                self.run("ip", "route", "add", *gateway, "scope", "link")
            self.run("ip", f"-{family}", "route", "add", "default", "via", *gateway)
            done("ip", f"-{family}", "route", "add", ip, "dev", name)

    def command(self, *words):
        return ["nsenter", "-t", self._pid, "-n", *words]

    def run(self, *words):
        done(*self.command(*words))

    async def asks(self, ip, port=80, *, kind="TCP", count=1):
        words = self.command(sys.executable, "-c", ASK, ip, str(port), kind, str(count))
        process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
        answer, _ = await process.communicate()
        return json.loads(answer)


@contextmanager
def started(command):
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def done(*command):
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    _, said = process.communicate()
    assert process.returncode == 0, (command, said)


@pytest.fixture
def machines():
    with ExitStack() as stack:
        for name in ("ipv4.ip_forward", "ipv6.conf.all.forwarding"):
            done("sysctl", "-qw", f"net.{name}=1")
        outside = Machine(stack, "v-out", OUTSIDE)
        pod = Machine(stack, "v-pod", POD)
        for ip in POD.values():
            words = pod.command(sys.executable, "-c", WHO, ip, str(PORT))
            stack.enter_context(started(words))
        yield outside, pod


@asynccontextmanager
async def served(family, proto="TCP", *, keep=True):
    config = Config(userspace=Userspace(keep_client_address=keep))
    async with proxied(family, config) as node:
        vip = node.vip(9)
        fields = {"type": "LoadBalancer", "external_local": True, "load_balancer_ips": (vip,)}
        await node.service("web", 1, proto=proto, **fields)
        await node.endpoints("web", Address(POD[family], PORT), proto=proto)
        yield node, vip


@both
@pytest.mark.parametrize("proto", ["TCP", "UDP"])
async def test_a_local_endpoint_sees_who_asks_from_outside(family, proto, machines):
    outside, _pod = machines
    async with served(family, proto) as (_node, vip):
        seen = await outside.asks(vip, kind=proto, count=TRIALS)
        assert seen == {OUTSIDE[family]: TRIALS}


@both
async def test_it_sees_the_node_where_that_is_switched_off(family, machines):
    outside, _pod = machines
    async with served(family, keep=False) as (_node, vip):
        assert OUTSIDE[family] not in await outside.asks(vip)


@both
@pytest.mark.parametrize("proto", ["TCP", "UDP"])
async def test_a_pod_that_reaches_itself_sees_the_node(family, proto, machines):
    _outside, pod = machines
    async with served(family, proto) as (node, _vip):
        (seen,) = await pod.asks(node.vip(1), kind=proto)
        assert seen != POD[family]
        assert "timed out" not in seen


@both
@pytest.mark.parametrize("proto", ["TCP", "UDP"])
async def test_what_passes_through_to_the_number_of_a_node_port_is_left_alone(
    family, proto, machines
):
    outside, pod = machines
    words = outside.command(sys.executable, "-c", WHO, OUTSIDE[family], "30080")
    async with served(family, proto) as (node, _vip):
        await node.service("ports", 2, proto=proto, type="NodePort", node_port=30080)
        await node.endpoints("ports", Address(POD[family], PORT), proto=proto)
        with started(words):
            seen = await pod.asks(OUTSIDE[family], 30080, kind=proto, count=TRIALS)
        assert seen == {POD[family]: TRIALS}


async def test_nothing_is_left_of_it_when_the_mode_is_cleared():
    async with proxied(4):
        assert rules_there() == (True, True)
    assert rules_there() == (False, False)


def rules_there():
    listed = subprocess.check_output(["ip", "rule"], text=True)
    nf_tables = NfTables()
    try:
        chains = nf_tables.chains(_transparent.nf_table(4))
    finally:
        nf_tables.close()
    return "fwmark 0x2000/0x2000" in listed, _transparent.CHAIN.name in {c.name for c in chains}
