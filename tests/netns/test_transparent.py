"""Whom backends see: clients and backends in namespaces of their own, this one is the node."""

import asyncio
import subprocess
import sys
from contextlib import ExitStack, asynccontextmanager

import pytest

from pyproxy.config import Config, Userspace
from pyproxy.model import Address
from pyproxy.proxier import _transparent
from pyproxy.proxier._nfnetlink import NfTables
from tests.netns.abuse import TRIALS, becomes
from tests.netns.machines import Machine, done, forwards, started
from tests.netns.node import proxied

OUTSIDE = {4: "203.0.113.60", 6: "fd00:6e::60"}
POD = {4: "10.244.1.30", 6: "fd00:10:244::30"}
PORT = 8080
both = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture
def machines():
    with ExitStack() as stack:
        forwards()
        outside = Machine(stack, "v-out", OUTSIDE)
        pod = Machine(stack, "v-pod", POD)
        for ip in POD.values():
            stack.enter_context(pod.answers(ip, PORT))
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
    async with served(family, proto) as (node, _vip):
        await node.service("ports", 2, proto=proto, type="NodePort", node_port=30080)
        await node.endpoints("ports", Address(POD[family], PORT), proto=proto)
        with outside.answers(OUTSIDE[family], 30080):
            seen = await pod.asks(OUTSIDE[family], 30080, kind=proto, count=TRIALS)
        assert seen == {POD[family]: TRIALS}


PORTMAP = """table ip portmap {
  chain prerouting {
    type filter hook prerouting priority -100
    meta mark set meta mark | 0x2000
  }
}
"""


async def test_packets_that_a_port_mapping_of_the_cni_has_marked_go_their_way(machines, tmp_path):
    """Plugin portmap of CNI's marks with 0x2000 what it is to masquerade."""
    outside, _pod = machines
    rules = tmp_path / "portmap.nft"
    rules.write_text(PORTMAP)
    async with served(4):
        await asyncio.to_thread(done, "nft", "-f", str(rules))
        try:
            assert await outside.asks(POD[4], PORT) == {OUTSIDE[4]: 1}
        finally:
            await asyncio.to_thread(done, "nft", "delete", "table", "ip", "portmap")


AFTER = """table inet after { chain c { type filter hook input priority 90;
 tcp dport 80 counter; meta mark and 0x1000 == 0x1000 counter; }; }"""


@both
async def test_what_has_arrived_is_not_marked_any_more(family, machines):
    """Virtual servers of mode ipvs, which a node may move to, would send it by that."""
    outside, _pod = machines
    async with served(family) as (_node, vip):
        await asyncio.to_thread(done, "nft", AFTER)
        assert await outside.asks(vip, count=TRIALS) == {OUTSIDE[family]: TRIALS}
        arrived, marked = await asyncio.to_thread(counted)
        await asyncio.to_thread(done, "nft", "delete", "table", "inet", "after")
    assert arrived > TRIALS
    assert marked == 0


def counted():
    words = ["nft", "list", "table", "inet", "after"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        lines = [line.split() for line in process.communicate()[0].splitlines()]
    return [int(line[line.index("packets") + 1]) for line in lines if "packets" in line]


LISTENER = """
import socket, sys
kind = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
server = socket.create_server((sys.argv[1], int(sys.argv[2])), family=kind)
print("ready", flush=True)
while True:
    with server.accept()[0] as sock:
        assert sock.recv(1) == b""
"""
FIRST_TO_END = """
import socket, sys
with socket.create_connection((sys.argv[1], 80), 3) as sock:
    sock.shutdown(socket.SHUT_WR)
    assert sock.recv(1) == b""
"""


@both
async def test_whoever_comes_next_may_use_the_ports_of_connections_that_have_ended(
    family, machines
):
    outside, pod = machines
    python = sys.executable, "-c"
    async with served(family) as (node, vip):
        await node.endpoints("web", Address(POD[family], 8081))
        with started(pod.command(*python, LISTENER, POD[family], "8081")):
            await asyncio.to_thread(outside.run, *python, FIRST_TO_END, vip)
            assert await becomes(True, lambda: bool(waiting(family)))
    assert waiting(family) == []


TELLER = """
import socket, sys
kind = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
server = socket.create_server((sys.argv[1], int(sys.argv[2])), family=kind)
print("ready", flush=True)
held = []
while True:
    sock, peer = server.accept()
    sock.sendall(b"%d" % peer[1])
    held.append(sock)
"""
HOLDER = """
import socket, sys
held = [socket.create_connection((sys.argv[1], 80), 3) for _ in range(60)]
print(*(sock.recv(9).decode() for sock in held))
"""


@both
async def test_it_connects_from_ports_that_clients_choose_last(family, machines, few_ports):
    outside, pod = machines
    python = sys.executable, "-c"
    async with served(family) as (node, vip):
        await node.endpoints("web", Address(POD[family], 8081))
        with started(pod.command(*python, TELLER, POD[family], "8081")):
            words = outside.command(*python, HOLDER, vip)
            holder = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
            output, _ = await holder.communicate()
    ports = [int(word) for word in output.split()]
    assert len(set(ports)) == 60
    assert set(ports) < set(few_ports)
    assert sum(port % 2 for port in ports[:40]) > 30, "but those that somebody has bound"
    assert [port % 2 for port in ports[50:]] == 10 * [0], "as there are no others"


@pytest.fixture
def few_ports():
    """Ports of this node: 50 that are even, and 50 that are not."""
    before = _transparent.PORT_RANGE.read_text(encoding="ascii")
    _transparent.PORT_RANGE.write_text("40000 40099", encoding="ascii")
    yield range(40000, 40100)
    _transparent.PORT_RANGE.write_text(before, encoding="ascii")


def waiting(family):
    """The connections that the client's address still has here, though nobody has them open."""
    words = ["ss", "-Htan", f"-{family}", "state", "time-wait"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        listed = process.communicate()[0]
    return [line for line in listed.splitlines() if OUTSIDE[family] in line]


async def test_nothing_is_left_of_it_when_the_mode_is_cleared():
    async with proxied(4):
        assert rules_there() == (True, True)
    assert rules_there() == (False, False)


def rules(family):
    return subprocess.check_output(["ip", f"-{family}", "rule"], text=True)


OLD, OTHERS = "0x2000/0x2000", "0x3000/0x3000"


def rule(change, family, mark, table, *words):
    done("ip", f"-{family}", "rule", change, "fwmark", mark, "table", str(table), *words)


@pytest.fixture
def old_rule(family):
    """The rule of an older version, beside rules of others."""
    rule("add", family, OLD, _transparent.ROUTES, "priority", "97", "protocol", "97")
    rule("add", family, OTHERS, _transparent.ROUTES, "priority", "96")
    rule("add", family, OTHERS, 77, "priority", "97", "protocol", "97")
    yield
    for table in (_transparent.ROUTES, 77):
        rule("del", family, OTHERS, table)


@both
async def test_a_start_removes_the_rule_of_an_older_version(family, old_rule):
    async with proxied(family):
        listed = rules(family)
        assert [listed.count(mark) for mark in ("0x1000/0x1000", OLD, OTHERS)] == [1, 0, 2]


@both
async def test_cleaning_up_removes_the_rule_of_an_older_version(family, old_rule):
    assert _transparent.remove(family) is None
    assert [rules(family).count(mark) for mark in (OLD, OTHERS)] == [0, 2]


def rules_there():
    listed = subprocess.check_output(["ip", "rule"], text=True)
    nf_tables = NfTables()
    try:
        chains = nf_tables.chains(_transparent.nf_table(4))
    finally:
        nf_tables.close()
    return "fwmark 0x1000/0x1000" in listed, _transparent.CHAIN.name in {c.name for c in chains}
