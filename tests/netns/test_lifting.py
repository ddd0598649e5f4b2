"""Pods of one bridge that reach each other through a Service: whom the backend sees."""

import json
import socket
import subprocess
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest

from pyproxy.config import Config
from pyproxy.model import Address
from pyproxy.proxier import _lifting, _transparent
from tests.netns.machines import Bridge, Machine, done, forwards
from tests.netns.node import proxied

GATEWAY = {4: "10.244.3.1/24", 6: "fd00:10:244:3::1/64"}
POD = {4: "10.244.3.10", 6: "fd00:10:244:3::10"}
BACKEND = {4: "10.244.3.20", 6: "fd00:10:244:3::20"}
PODS = Config(cluster_cidr="10.244.0.0/16,fd00:10:244::/48")
NODE = {family: address.split("/")[0] for family, address in GATEWAY.items()}
PORT = 8080
FRAGMENTED = 4000  # bytes in a datagram; a frame has 1500
both = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture(scope="module")
def pods(namespace):
    """A pod that asks and one that answers."""
    with ExitStack() as stack:
        forwards()
        bridge = Bridge(stack, "cni9", GATEWAY)
        asking = Machine(stack, "v-asks", POD, bridge=bridge)
        answering = Machine(stack, "v-answers", BACKEND, bridge=bridge)
        for ip in BACKEND.values():
            stack.enter_context(answering.answers(ip, PORT))
        yield asking, answering


@pytest.fixture(params=["0", "1"], ids=["bridged", "bridged and filtered"])
def filtered(request):
    """Whether packets inside of bridges meet the rules for IP, where the kernel can have it so."""
    for table in ("iptables", "ip6tables"):
        switch = Path("/proc/sys/net/bridge", f"bridge-nf-call-{table}")
        if switch.exists():
            switch.write_text(request.param)


@asynccontextmanager
async def served(family, proto="TCP"):
    async with proxied(family, PODS) as node:
        await node.service("web", 1, proto=proto)
        await node.endpoints("web", Address(BACKEND[family], PORT), proto=proto)
        yield node


@both
@pytest.mark.parametrize("proto", ["TCP", "UDP"])
async def test_a_pod_is_seen_by_a_backend_on_its_own_bridge(family, proto, pods, filtered):
    asking, _ = pods
    async with served(family, proto) as node:
        assert await asking.asks(node.vip(1), kind=proto, count=20) == {POD[family]: 20}


@both
async def test_an_answer_in_fragments_comes_whole(family, pods, filtered):
    asking, _ = pods
    async with served(family, "UDP") as node:
        answer = await asking.asks(node.vip(1), kind="UDP", length=FRAGMENTED)
        assert answer == {POD[family]: 1}


async def test_what_pods_say_to_each_other_directly_stays_in_the_bridge(pods):
    asking, _ = pods
    async with served(4) as node:
        assert await asking.asks(node.vip(1)) == {POD[4]: 1}
        before = received()
        assert await asking.asks(BACKEND[4], PORT, count=20) == {POD[4]: 20}
        assert received() - before < 20


async def test_a_backend_whose_answers_are_not_lifted_sees_the_node(pods):
    """Answers that are not lifted go to the client, which knows nothing of them."""
    asking, _ = pods
    async with served(4) as node:
        done("nft", "delete", "table", "bridge", table_name(4))
        assert await asking.asks(node.vip(1)) == {NODE[4]: 1}


async def test_a_kernel_without_rules_for_bridges_shows_the_node(pods, monkeypatch):
    def fail(*_):
        raise _transparent.NfError(95, None, "no tables in bridges", "")

    monkeypatch.setattr(_lifting, "install", fail)
    asking, _ = pods
    async with served(4) as node:
        assert await asking.asks(node.vip(1)) == {NODE[4]: 1}


async def test_a_start_remembers_the_flows_of_the_process_before(pods):
    asking, _ = pods
    async with served(4) as node:
        await asking.asks(node.vip(1))
        notes = remembered(4)
        _lifting.install(_lifting.whole(4, _transparent.TABLE_NAME, _transparent.MARK, 100))
        assert remembered(4) == notes != []


async def test_nothing_is_left_of_it_when_the_mode_is_cleared():
    async with proxied(4, PODS):
        assert _lifting.is_installed(4, _transparent.TABLE_NAME)
    assert not _lifting.is_installed(4, _transparent.TABLE_NAME)


def test_only_a_bridge_is_one(pods):
    netlink = _transparent.Netlink()
    try:
        index = {name: socket.if_nametoindex(name) for name in ("cni9", "v-asks", "lo")}
        kinds = {name: _lifting.is_bridge(netlink, number) for name, number in index.items()}
    finally:
        netlink.close()
    assert kinds == {"cni9": True, "v-asks": False, "lo": False}


def table_name(family):
    return _lifting.lifting.table(family, _transparent.TABLE_NAME).name


def received():
    """Return how many packets have come to this node out of the bridge."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    (counts,) = (line.split() for line in lines if line.lstrip().startswith("cni9:"))
    return int(counts[2])


def remembered(family):
    listed = subprocess.check_output(["nft", "-j", "list", "table", "bridge", table_name(family)])
    maps = [item["map"] for item in json.loads(listed)["nftables"] if "map" in item]
    return [e[0]["elem"]["val"] for m in maps if m["name"] == "answers" for e in m.get("elem", ())]
