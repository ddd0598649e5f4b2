"""Services with real traffic: all protocols in mode ipvs, and SCTP in each kernel mode."""

from contextlib import asynccontextmanager
from ipaddress import ip_network

import pytest
from msgspec import structs

from pyproxy.host import Host
from pyproxy.model import Address, Endpoint
from pyproxy.proxier import load
from tests.guest import lab
from tests.guest.lab import CLIENT, GATEWAY, POD, STRANGER, Client, Reply, ask, open_socket
from tests.netns.node import NODE_IP, Node, proxied

pytestmark = [
    pytest.mark.asyncio(loop_factories=["asyncio"]),
    pytest.mark.parametrize(
        ("mode", "proto"),
        [
            ("ipvs", "TCP"),
            ("ipvs", "UDP"),
            ("ipvs", "SCTP"),
            ("nftables", "SCTP"),
            ("iptables", "SCTP"),
        ],
    ),
]
ENOUGH = 100  # requests, after which a backend that may be chosen has been
LB = {4: "198.18.0.7", 6: "fd00:198:18::7"}
NODE_PORT = 30080


class Shop:
    """A node that serves Services of one protocol, and pods that stand behind them."""

    def __init__(self, node: Node, proto):
        self._node = node
        self.family, self.proto = node.family, proto
        self.vip = node.vip()

    async def has(self, *pods, **fields):
        """Have one Service, of which pods are the endpoints."""
        await self._node.service("web", 1, proto=self.proto, **fields)
        await self.endpoints(*pods)

    async def endpoints(self, *pods, **conditions):
        found = (
            Endpoint(
                Address(POD[self.family][name], lab.PORT),
                node="elsewhere" if name == "far" else "here",
                **conditions,
            )
            for name in pods
        )
        await self._node.endpoints("web", *found, proto=self.proto)

    async def remove(self):
        await self._node.remove("web")

    async def ask(self, name, ip, port=80, **rest):
        return await ask(name, ip, port, self.proto, **rest)

    async def is_silent(self, name, ip, port=80, **rest):
        return await self.ask(name, ip, port, seconds=lab.SILENCE_SECONDS, **rest) == "silent"

    async def refuses(self, name, ip, port=80):
        """Say whether it does; an attempt of SCTP goes on though it is refused by ICMP."""
        if self.proto == "SCTP":
            return await self.is_silent(name, ip, port)
        return await self.ask(name, ip, port) == "refused"

    async def replies(self, name, ip, port=80, *, pods, **rest):
        """Ask until all these pods have answered; return what each of them saw."""
        found = {}
        for _ in range(ENOUGH):
            reply = await self.ask(name, ip, port, **rest)
            assert isinstance(reply, Reply), f"{name} to {ip} port {port}: {reply}"
            found[reply.pod] = reply.client
            if found.keys() == set(pods):
                break
        return found

    async def connect(self, name, ip, port=80):
        client = Client(name, ip, port, self.proto, None)
        await client.connect()
        return client


@asynccontextmanager
async def shop(mode, proto, family, config):
    load(mode).prepare(config)
    config = structs.replace(config, mode=mode)
    async with lab.pods(family, proto), proxied(family, config, mode=mode, host=Host()) as node:
        yield Shop(node, proto)


@pytest.fixture
def open_shop(mode, proto, family, config):
    return shop(mode, proto, family, config)


def own(family):
    """What pods see of the node."""
    return {NODE_IP[family], GATEWAY[family]}


async def test_a_cluster_ip_leads_to_all_pods_and_hides_whom_it_must(open_shop, family):
    async with open_shop as shop:
        everywhere = ("a", "b", "far")
        await shop.has(*everywhere)
        from_pod = await shop.replies("a", shop.vip, pods=everywhere)
        assert from_pod.pop("a") in own(family), "a pod that reaches itself sees the node"
        assert from_pod == dict.fromkeys(("b", "far"), POD[family]["a"])
        for name in (lab.HOME, "outside"):
            seen = await shop.replies(name, shop.vip, pods=everywhere)
            assert set(seen.values()) <= own(family)


async def test_what_nobody_serves_is_refused(open_shop, family):
    async with open_shop as shop:
        await shop.has("b", node_port=NODE_PORT, type="NodePort")
        assert await shop.refuses("a", shop.vip, 81)
        await shop.endpoints()
        for name in ("a", lab.HOME, "outside"):
            assert await shop.refuses(name, shop.vip)
        assert await shop.refuses("outside", NODE_IP[family], NODE_PORT)
        await shop.endpoints("a")
        assert await shop.ask("b", shop.vip) == Reply("a", POD[family]["b"])


async def test_a_port_of_the_node_is_not_reached_through_a_cluster_ip(open_shop, family, proto):
    async with open_shop as shop:
        await shop.has("b")
        with open_socket(lab.HOME, family, proto) as sock:
            sock.bind(("0.0.0.0" if family == 4 else "::", 81))
            if proto != "UDP":
                sock.listen()
            assert await shop.refuses("a", shop.vip, 81)


async def test_a_node_port_leads_everywhere_and_hides_strangers(open_shop, family):
    async with open_shop as shop:
        await shop.has("b", "far", node_port=NODE_PORT, type="NodePort")
        for name in ("a", lab.HOME, "outside"):
            seen = await shop.replies(name, NODE_IP[family], NODE_PORT, pods=("b", "far"))
            assert set(seen.values()) <= own(family)


async def test_policy_local_keeps_the_address_and_stays_here(open_shop, family):
    async with open_shop as shop:
        exposed = {"node_port": NODE_PORT, "load_balancer_ips": (LB[family],)}
        await shop.has("b", "far", type="LoadBalancer", external_local=True, **exposed)
        for place in ((LB[family],), (NODE_IP[family], NODE_PORT)):
            for _ in range(4):
                reply = await shop.ask("outside", *place, source=STRANGER[family])
                assert reply == Reply("b", STRANGER[family])
            seen = await shop.replies("a", *place, pods=("b", "far"))
            assert set(seen.values()) == {POD[family]["a"]}
            await shop.replies(lab.HOME, *place, pods=("b", "far"))


async def test_policy_local_without_pods_here_is_silent_to_strangers_only(open_shop, family):
    async with open_shop as shop:
        await shop.has(
            "far", type="LoadBalancer", external_local=True, load_balancer_ips=(LB[family],)
        )
        assert await shop.is_silent("outside", LB[family])
        assert (await shop.ask("a", LB[family])).pod == "far"
        assert (await shop.ask(lab.HOME, LB[family])).pod == "far"


async def test_internal_policy_local_stays_here(open_shop):
    async with open_shop as shop:
        await shop.has("b", "far", internal_local=True)
        assert {(await shop.ask("a", shop.vip)).pod for _ in range(6)} == {"b"}
        await shop.endpoints("far")
        assert await shop.is_silent("a", shop.vip)


async def test_source_ranges_keep_others_out(open_shop, family):
    async with open_shop as shop:
        allowed = (ip_network(CLIENT[family]),)
        await shop.has(
            "b", type="LoadBalancer", load_balancer_ips=(LB[family],), source_ranges=allowed
        )
        assert (await shop.ask("outside", LB[family], source=CLIENT[family])).pod == "b"
        assert await shop.is_silent("outside", LB[family], source=STRANGER[family])
        assert (await shop.ask("outside", shop.vip, source=STRANGER[family])).pod == "b"


async def test_of_an_external_ip_only_the_port_is_taken(open_shop, family):
    async with open_shop as shop:
        machine = POD[family]["far"]
        await shop.has("b", external_ips=(machine,))
        assert (await shop.ask("a", machine)).pod == "b"
        assert (await shop.ask("a", machine, lab.PORT)).pod == "far"
        await shop.remove()
        assert (await shop.ask("a", machine, lab.PORT)).pod == "far"


async def test_affinity_keeps_a_client_with_its_pod(open_shop, family):
    async with open_shop as shop:
        await shop.has("a", "b", "far", affinity_seconds=600)
        sources = (CLIENT[family], STRANGER[family])
        for source in sources:
            pods = {(await shop.ask("outside", shop.vip, source=source)).pod for _ in range(8)}
            assert len(pods) == 1
        (pod,) = pods
        await shop.endpoints(*{"a", "b", "far"} - {pod})
        assert (await shop.ask("outside", shop.vip, source=STRANGER[family])).pod != pod


async def test_a_pod_that_ends_gets_no_new_connections(open_shop):
    async with open_shop as shop:
        await shop.has("b", "far")
        await shop.endpoints("far")
        assert {(await shop.ask("a", shop.vip)).pod for _ in range(6)} == {"far"}
        await shop.endpoints("b")
        assert {(await shop.ask("a", shop.vip)).pod for _ in range(6)} == {"b"}


async def test_where_all_end_those_that_still_serve_do(open_shop):
    async with open_shop as shop:
        await shop.has("b")
        await shop.endpoints("b", ready=False, serving=True, terminating=True)
        assert (await shop.ask("a", shop.vip)).pod == "b"


async def test_what_is_open_goes_on_where_it_can(open_shop, proto):
    """Of UDP, what one socket sends must find another pod."""
    async with open_shop as shop:
        await shop.has("b")
        client = await shop.connect("a", shop.vip)
        try:
            assert (await client.say()).pod == "b"
            await shop.endpoints("far")
            if proto == "TCP":
                assert (await client.say()).pod == "b"
            if proto == "UDP":
                assert (await client.say()).pod == "far"
            assert (await shop.ask("a", shop.vip)).pod == "far"
        finally:
            client.abort()
