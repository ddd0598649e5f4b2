"""Socket load balancing on the real kernel, in a cgroup of the test's own.

That a connection was balanced shows in its backend: that sees the client's own port, and of a
relayed connection the relay's.
"""

import asyncio
import errno
import os
import socket
import struct
import threading
from collections import Counter
from contextlib import ExitStack, asynccontextmanager
from ipaddress import ip_network
from random import randrange

import pytest

from pyproxy.config import Config, Userspace
from pyproxy.delta import Delta
from pyproxy.model import (
    Address,
    Forward,
    Frontend,
    Pool,
    Reject,
    Route,
    ServicePortName,
    WeightRule,
)
from pyproxy.model import Backend as Balancee
from pyproxy.proxier import _bpf
from pyproxy.proxier._socketlb_kernel import SocketBalancer
from pyproxy.rules.listeners import Listener
from pyproxy.rules.socketlb_code import Fds
from tests.netns.node import LOOPBACK, NODE_IP, proxied
from tests.netns.pods import GATEWAY, POD_IP, plain_socket, pod

both = pytest.mark.parametrize("family", [4, 6])
pytestmark = pytest.mark.usefixtures("privileged")
protocols = pytest.mark.parametrize("proto", ["TCP", "UDP"])


class Backend:
    """Servers, TCP and UDP, that say their name and the client's port. They run in threads."""

    def __init__(self, family, name, ip=None):
        self._stack = ExitStack()
        self.name, self._family = name, family
        self._ip = ip or LOOPBACK[family]
        self._make = plain_socket

    def __enter__(self):
        self.tcp = self._stack.enter_context(self._make(self._family))
        self.tcp.bind((self._ip, 0))
        self.tcp.listen(200)
        self.address = Address(self._ip, self.tcp.getsockname()[1])
        self.udp = self._stack.enter_context(self._make(self._family, socket.SOCK_DGRAM))
        self.udp.bind(self.address)
        self._over = False
        self._threads = [threading.Thread(target=f) for f in (self._accept, self._answer)]
        for sock in (self.tcp, self.udp):
            sock.settimeout(0.05)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over = True
        for thread in self._threads:
            thread.join()
        self._stack.close()

    def _accept(self):
        while not self._over:
            try:
                client, peer = self.tcp.accept()
            except TimeoutError:
                continue
            client.sendall(f"{self.name} {peer[1]}".encode())
            client.close()

    def _answer(self):
        while not self._over:
            try:
                _data, peer = self.udp.recvfrom(2048)
            except TimeoutError:
                continue
            self.udp.sendto(f"{self.name} {peer[1]}".encode(), peer)


@asynccontextmanager
async def balanced(family, config, *names, proto="TCP", **fields):
    """A node with a Service ``web`` of these backends, at ``vip(1)``, port 80."""
    with ExitStack() as stack:
        backends = [stack.enter_context(Backend(family, name)) for name in names]
        async with proxied(family, config) as node:
            await node.service("web", 1, proto=proto, **fields)
            if backends:
                await node.endpoints("web", *(b.address for b in backends), proto=proto)
            yield node, backends


KINDS = {"TCP": socket.SOCK_STREAM, "UDP": socket.SOCK_DGRAM}


async def asked(where, sock):
    """Return the name of the backend, and whether it was reached directly."""
    return await asyncio.to_thread(ask, where, sock)


def ask(where, sock):
    with sock:
        sock.connect(where)
        if sock.type == socket.SOCK_DGRAM:
            sock.send(b"?")
        name, port = sock.recv(100).decode().split()
        return name, int(port) == sock.getsockname()[1]


async def client_asks(family, where, proto="TCP"):
    return await asked(where, plain_socket(family, KINDS[proto]))


@both
@protocols
async def test_connections_take_turns_and_reach_their_backend_directly(family, proto, config):
    async with balanced(family, config, "a", "b", "c", proto=proto) as (node, _):
        answers = [await client_asks(family, (node.vip(), 80), proto) for _ in range(9)]
        assert Counter(answers) == {(name, True): 3 for name in "abc"}


@both
@protocols
async def test_to_its_owner_a_socket_is_connected_to_the_service(family, proto, config):
    async with balanced(family, config, "a", proto=proto) as (node, _):
        with plain_socket(family, KINDS[proto]) as client:
            await asyncio.to_thread(client.connect, (node.vip(), 80))
            assert client.getpeername()[:2] == (node.vip(), 80)


@protocols
async def test_a_socket_of_ipv6_reaches_a_service_of_ipv4(proto, config):
    async with balanced(4, config, "a", proto=proto) as (node, _):
        mapped = f"::ffff:{node.vip()}"
        assert await client_asks(6, (mapped, 80), proto) == ("a", True)
        with plain_socket(6, KINDS[proto]) as client:
            await asyncio.to_thread(client.connect, (mapped, 80))
            assert client.getpeername()[:2] == (mapped, 80)


@both
async def test_datagrams_without_a_connection_are_answered_from_the_service(family, config):
    async with balanced(family, config, "a", "b", "c", proto="UDP") as (node, _):
        names = set()
        for _ in range(3):
            with plain_socket(family, socket.SOCK_DGRAM) as client:
                flow = [await exchanged(client, (node.vip(), 80)) for _ in range(4)]
                names.add(flow[0][0])
                assert flow == [(flow[0][0], True, (node.vip(), 80))] * 4
        assert names == {"a", "b", "c"}


async def exchanged(client, where):
    def exchange():
        client.sendto(b"?", where)
        data, peer = client.recvfrom(100)
        name, port = data.decode().split()
        return name, int(port) == client.getsockname()[1], peer[:2]

    return await asyncio.to_thread(exchange)


async def test_an_unconnected_socket_of_ipv6_is_answered_from_the_service_of_ipv4(config):
    async with balanced(4, config, "a", proto="UDP") as (node, _):
        mapped = f"::ffff:{node.vip()}"
        with plain_socket(6, socket.SOCK_DGRAM) as client:
            assert await exchanged(client, (mapped, 80)) == ("a", True, (mapped, 80))


@both
async def test_a_flow_without_a_connection_moves_when_its_backend_serves_no_more(family, config):
    async with balanced(family, config, "a", "b", proto="UDP") as (node, backends):
        with plain_socket(family, socket.SOCK_DGRAM) as client:
            first, _, _ = await exchanged(client, (node.vip(), 80))
            other = next(b for b in backends if b.name != first)
            await node.endpoints("web", other.address, proto="UDP")
            assert await exchanged(client, (node.vip(), 80)) == (other.name, True, (node.vip(), 80))


@both
async def test_a_connected_flow_ends_when_its_backend_serves_no_more(family, config):
    async with balanced(family, config, "a", "b", proto="UDP") as (node, (a, b)):
        with (
            plain_socket(family, socket.SOCK_DGRAM) as one,
            plain_socket(family, socket.SOCK_DGRAM) as two,
            plain_socket(family, socket.SOCK_DGRAM) as direct,
        ):
            for client in (one, two):
                client.connect((node.vip(), 80))
            direct.connect(a.address)
            names = {await said(one): one, await said(two): two}
            await node.endpoints("web", b.address, proto="UDP")
            with pytest.raises(ConnectionAbortedError):
                await asyncio.to_thread(names["a"].recv, 100)
            assert await said(names["b"]) == "b"
            assert await said(direct) == "a"


async def said(client):
    def exchange():
        client.send(b"?")
        return client.recv(100).decode().split()[0]

    return await asyncio.to_thread(exchange)


async def test_flows_of_pods_end_too(config):
    async with balanced(4, config, proto="UDP") as (node, _):
        with pod() as client_pod, Backend(4, "a", GATEWAY[4]) as backend:
            await node.endpoints("web", backend.address, proto="UDP")
            with client_pod.socket(4, socket.SOCK_DGRAM) as client:
                client.connect((node.vip(), 80))
                assert await said(client) == "a"
                await node.endpoints("web", proto="UDP")
                with pytest.raises(ConnectionAbortedError):
                    await asyncio.to_thread(client.recv, 100)


@both
async def test_weights_count(family, config):
    ips = LOOPBACK[family], NODE_IP[family]
    weights = (WeightRule("ip", ips[0], 3), WeightRule("ip", ips[1], 1))
    async with balanced(family, config, weights=weights) as (node, _):
        with Backend(family, "a", ips[0]) as a, Backend(family, "b", ips[1]) as b:
            await node.endpoints("web", a.address, b.address)
            answers = [await client_asks(family, (node.vip(), 80)) for _ in range(8)]
            assert Counter(answers) == {("a", True): 6, ("b", True): 2}


@both
@protocols
async def test_affinity_keeps_a_client_with_one_endpoint(family, proto, config):
    fields = {"proto": proto, "affinity_seconds": 600}
    async with balanced(family, config, "a", "b", "c", **fields) as (node, backends):
        where = (node.vip(), 80)
        [(name, direct)] = {await client_asks(family, where, proto) for _ in range(8)}
        assert direct
        others = [b.address for b in backends if b.name != name]
        await node.endpoints("web", *others, proto=proto)
        [(moved, _)] = {await client_asks(family, where, proto) for _ in range(8)}
        assert moved != name
        await node.endpoints("web", *(b.address for b in backends), proto=proto)
        assert {await client_asks(family, where, proto) for _ in range(8)} == {(moved, True)}


async def test_affinity_ends_some_time_after_the_last_connection(config, bpffs):
    async with balanced(4, config, "a", "b", affinity_seconds=600) as (node, _):
        where = (node.vip(), 80)
        first, _ = await client_asks(4, where)
        affinity = pinned_map(bpffs, "affinity", 16, 32)
        [client] = affinity.keys()
        for seconds, name in ((590, first), (610, {"a": "b", "b": "a"}[first])):
            backend, used_at = struct.unpack("=24sQ", affinity.get(client))
            before = (used_at - seconds * 10**9) % 2**64  # the machine may be younger than that
            affinity[client] = struct.pack("=24sQ", backend, before)
            assert await client_asks(4, where) == (name, True)
        affinity.close()


@both
@protocols
async def test_without_endpoints_clients_are_refused_at_once(family, proto, config):
    async with balanced(family, config, proto=proto, node_port=30080) as (node, _):
        for where in ((node.vip(), 80), (NODE_IP[family], 30080)):
            with plain_socket(family, KINDS[proto]) as client:
                assert client.connect_ex(where) == errno.ECONNREFUSED
        if proto == "UDP":
            with (
                plain_socket(family, socket.SOCK_DGRAM) as client,
                pytest.raises(ConnectionRefusedError),
            ):
                client.sendto(b"?", (node.vip(), 80))


@both
async def test_what_is_to_be_dropped_is_left_to_the_listeners(family, config):
    async with balanced(family, config, internal_local=True) as (node, _):
        with Backend(family, "a") as a:
            await node.endpoints("web", a.address, node="elsewhere")
            with plain_socket(family) as client:
                client.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    await asyncio.to_thread(client.connect, (node.vip(), 80))
            await node.endpoints("web", a.address)
            assert await client_asks(family, (node.vip(), 80)) == ("a", True)


@both
@protocols
async def test_node_ports_answer_at_the_nodes_addresses(family, proto, config):
    async with balanced(family, config, "a", proto=proto, node_port=30080):
        assert await client_asks(family, (NODE_IP[family], 30080), proto) == ("a", True)
        assert await client_asks(family, (LOOPBACK[family], 30080), proto) == ("a", True)


@both
async def test_a_pod_reaches_what_is_not_masqueraded_and_its_loopback_is_its_own(family, config):
    fields = {"type": "NodePort", "node_port": 30080, "external_local": True}
    async with balanced(family, config, **fields) as (node, _):
        with pod() as client_pod, Backend(family, "a", GATEWAY[family]) as backend:
            await node.endpoints("web", backend.address)
            await node.host.read()
            for where in ((node.vip(), 80), (GATEWAY[family], 30080)):
                assert await asked(where, client_pod.socket(family)) == ("a", True)
            with client_pod.socket(family) as client:
                assert client.connect_ex((LOOPBACK[family], 30080)) == errno.ECONNREFUSED
                assert client.connect_ex(("::" if family == 6 else "0.0.0.0", 30080)) != 0


@both
async def test_a_pod_that_is_to_be_masqueraded_is_relayed_and_the_node_is_not(family, config):
    async with balanced(family, config, node_port=30080) as (node, _):
        with pod() as client_pod, Backend(family, "a", GATEWAY[family]) as backend:
            await node.endpoints("web", backend.address)
            await node.host.read()
            where = GATEWAY[family], 30080
            assert await asked(where, client_pod.socket(family)) == ("a", False)
            assert await client_asks(family, where) == ("a", True)


@both
@protocols
async def test_a_pod_that_would_be_given_itself_is_relayed(family, proto, config):
    async with balanced(family, config, proto=proto) as (node, _):
        with pod() as client_pod, Itself(client_pod, family) as itself:
            await node.endpoints("web", itself, proto=proto)
            for _ in range(2):
                client = client_pod.socket(family, KINDS[proto])
                assert await asked((node.vip(), 80), client) == ("itself", False)


class Itself(Backend):
    """A backend in a pod."""

    def __init__(self, of, family):
        super().__init__(family, "itself", POD_IP[family])
        self._pod = of

    def __enter__(self):
        self._make = self._pod.socket
        return super().__enter__().address


@both
async def test_origins_with_different_policies_have_different_endpoints(family, config):
    """A policy says so only of strangers; that programs tell pods from the node is shown here."""
    async with balanced(family, config) as (node, _):
        with (
            pod() as client_pod,
            Backend(family, "near", GATEWAY[family]) as near,
            Backend(family, "far", GATEWAY[family]) as far,
        ):
            route = Route(
                Frontend(node.vip(9), 80, "TCP"),
                "ClusterIP",
                Forward(Pool((Balancee(near.address),))),
                Forward(Pool((Balancee(far.address),))),
                Reject(),
            )
            listener = Listener(ServicePortName("default", "own", "", "TCP"), route)
            await node.carrier._target.apply(Delta({route.frontend: listener}, {}, {}))
            assert await asked((node.vip(9), 80), client_pod.socket(family)) == ("near", True)
            assert await client_asks(family, (node.vip(9), 80)) == ("far", True)


@both
async def test_source_ranges_are_left_to_the_listeners(family, config):
    ip = "198.18.0.1" if family == 4 else "fd00:198:18::1"
    node_only = (ip_network(NODE_IP[family]),)
    fields = {"type": "LoadBalancer", "load_balancer_ips": (ip,), "source_ranges": node_only}
    async with balanced(family, config, "a", **fields) as (node, _):
        assert await client_asks(family, (ip, 80)) == ("a", False)
        assert await client_asks(family, (node.vip(), 80)) == ("a", True)


@both
async def test_what_is_bound_to_loopback_is_relayed(family, config):
    async with balanced(family, config, "a") as (node, _):
        client = plain_socket(family)
        client.bind((LOOPBACK[family], 0))
        assert await asked((node.vip(), 80), client) == ("a", False)


async def test_processes_of_other_cgroups_are_relayed(config, test_cgroup):
    async with balanced(4, config, "a") as (node, _):
        (test_cgroup.parent / "cgroup.procs").write_text(str(os.getpid()))
        assert await client_asks(4, (node.vip(), 80)) == ("a", False)
        (test_cgroup / "cgroup.procs").write_text(str(os.getpid()))
        assert await client_asks(4, (node.vip(), 80)) == ("a", True)


async def test_a_namespace_that_is_not_the_nodes_can_be_left_out(config, bpffs):
    async with balanced(4, config) as (node, _):
        with pod() as stranger, Backend(4, "a", GATEWAY[4]) as backend:
            await node.endpoints("web", backend.address)
            assert await asked((node.vip(), 80), stranger.socket(4)) == ("a", True)
            with pinned_map(bpffs, "origins", 8, 4) as origins:
                origins[bytes(8)] = struct.pack("=I", 0)
            assert await asked((node.vip(), 80), stranger.socket(4)) == ("a", False)
            assert await client_asks(4, (node.vip(), 80)) == ("a", True)


def pinned_map(bpffs, name, key_size, value_size):
    [path] = bpffs.glob(f"pyproxy/*/{name}")
    return _bpf.pinned_map(path, key_size, value_size)


@both
async def test_no_connection_fails_while_endpoints_come_and_go(family, config):
    async with balanced(family, config, "a", "b", "c", "d") as (node, backends):
        over, results = False, Counter()

        def load():
            while not over:
                try:
                    results[ask((node.vip(), 80), plain_socket(family))[1]] += 1
                except OSError as error:
                    results[repr(error)] += 1

        threads = [threading.Thread(target=load) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for turn in range(60):
                some = backends[turn % 3 :] if turn % 2 else backends[: 1 + turn % 4]
                await node.endpoints("web", *(b.address for b in some))
        finally:
            over = True
            for thread in threads:
                await asyncio.to_thread(thread.join)
        assert set(results) == {True}


async def test_a_service_that_goes_is_balanced_no_more(config):
    async with balanced(4, config, "a") as (node, _):
        assert await client_asks(4, (node.vip(), 80)) == ("a", True)
        await node.service("web", 2)
        assert await client_asks(4, (node.vip(2), 80)) == ("a", True)
        with plain_socket(4) as client:
            client.settimeout(0.3)
            with pytest.raises(OSError, match=r"timed out|refused|unreachable"):
                await asyncio.to_thread(client.connect, (node.vip(1), 80))


@both
async def test_sockets_are_balanced_while_no_process_runs_and_by_the_next(family, config, bpffs):
    with (
        Backend(family, "a") as a,
        Backend(family, "b") as b,
        plain_socket(family, socket.SOCK_DGRAM) as flow,
    ):
        async with proxied(family, config, keep=True) as node:
            where = (node.vip(), 80)
            await serve(node, a.address)
            assert await exchanged(flow, where) == ("a", True, where)
        assert await client_asks(family, where) == ("a", True)
        assert await exchanged(flow, where) == ("a", True, where)
        async with proxied(family, config, keep=True) as node:
            await serve(node, a.address, b.address)
            names = [await client_asks(family, where) for _ in range(4)]
            assert Counter(names) == {("a", True): 2, ("b", True): 2}
            assert await exchanged(flow, where) == ("a", True, where)
            await node.carrier.clear()
            assert not list(bpffs.glob("pyproxy/*"))


@both
def test_programs_need_not_be_able_to_refuse(family, test_cgroup):
    """Before Linux 5.18 they cannot; their listeners do."""
    balancer = SocketBalancer(family, test_cgroup, None, randrange)
    fds = Fds(**{name: held.fd for name, held in balancer._maps.items()})
    for loaded in balancer._load(fds, can_refuse=False).values():
        loaded.close()
    balancer.close()


async def test_what_was_pinned_goes_when_it_is_switched_off(config, bpffs):
    with Backend(4, "a") as backend:
        async with proxied(4, config, keep=True) as node:
            await serve(node, backend.address)
        assert await client_asks(4, (node.vip(), 80)) == ("a", True)
        off = Config(userspace=Userspace(cgroup=config.userspace.cgroup, socket_lb="off"))
        async with proxied(4, off) as node:
            await serve(node, backend.address)
            assert not list(bpffs.glob("pyproxy/*"))
            assert await client_asks(4, (node.vip(), 80)) == ("a", False)


async def serve(node, *addresses):
    for proto in ("TCP", "UDP"):
        await node.service(f"web-{proto.lower()}", 1, proto=proto)
        await node.endpoints(f"web-{proto.lower()}", *addresses, proto=proto)
