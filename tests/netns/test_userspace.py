"""The userspace mode on the real kernel: who is served, refused, or met with silence."""

import asyncio
import os
import resource
import socket
import struct
import subprocess
from ipaddress import ip_network

import pytest

from pyproxy import balancer
from pyproxy.config import Config, IPTables
from pyproxy.host import Host
from pyproxy.model import Address
from pyproxy.proxier import _sockets, _usertarget
from pyproxy.proxier._capture import WAYS
from pyproxy.proxier._capture import why_not as why_not_captured
from pyproxy.proxier._lookup import Lookup, Unsupported
from pyproxy.reconcile import Verified
from tests.builders import owner
from tests.netns import node as node_module
from tests.netns.node import (
    LOOPBACK,
    NODE_IP,
    POD,
    SILENCE,
    STRANGER,
    proxied,
    udp_client,
)

both = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture(autouse=True, params=WAYS)
def _capture(request, monkeypatch):
    """Do each test with each way to capture."""
    reason = why_not_captured(request.param)
    if reason is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    monkeypatch.setattr(node_module, "CAPTURE", request.param)


class Backend:
    """A TCP and a UDP server that say their name and whom they see."""

    def __init__(self, family, name):
        self.family = family
        self.name = name.encode()
        self.resets = 0
        self.ended = asyncio.Event()

    async def __aenter__(self):
        loop, ip = asyncio.get_running_loop(), LOOPBACK[self.family]
        self._server = await asyncio.start_server(self._serve, ip, 0)
        self.address = Address(ip, self._server.sockets[0].getsockname()[1])
        backend = self

        class Datagrams(asyncio.DatagramProtocol):
            def connection_made(self, transport):
                self.transport = transport

            def datagram_received(self, data, peer):
                self.transport.sendto(backend.name + b" " + data, peer)

        self._udp, _ = await loop.create_datagram_endpoint(Datagrams, local_addr=self.address)
        return self

    async def __aexit__(self, *_):
        self._server.close()
        self._udp.close()

    async def _serve(self, reader, writer):
        try:
            heard = b""
            while data := await reader.read(65536):
                heard += data
                if heard == b"reset me":
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    writer.transport.abort()
                    return
            writer.write(self.name + b" " + heard[:100])
            await writer.drain()
        except ConnectionResetError:
            self.resets += 1
        finally:
            self.ended.set()
            writer.close()


def may_load(family):
    try:
        Lookup(family).close()
    except Unsupported:
        return False
    return True


async def outcome(coroutine):
    try:
        return await coroutine
    except ConnectionRefusedError:
        return "refused"
    except TimeoutError:
        return "silence"
    except OSError as error:
        # uvloop and asyncio word several refusals differently; the number is the same.
        return "refused" if error.errno == 111 else repr(error)


@both
async def test_a_cluster_ip_reaches_all_endpoints_in_turn(family):
    async with Backend(family, "a") as a, Backend(family, "b") as b, proxied(family) as node:
        await node.service("web", 1)
        await node.endpoints("web", a.address, b.address)
        answers = [await node.ask(node.vip(1)) for _ in range(6)]
        assert sorted(answers) == [b"a ?"] * 3 + [b"b ?"] * 3


@both
@pytest.mark.parametrize("default", ["bbr", "cubic"])
async def test_connections_inside_of_the_node_are_not_paced(family, default, monkeypatch, tmp_path):
    setting = tmp_path / "tcp_congestion_control"
    setting.write_text(f"{default}\n")
    kernels = _sockets.CONGESTION_CONTROL.read_text().strip()
    monkeypatch.setattr(_sockets, "CONGESTION_CONTROL", setting)
    monkeypatch.setattr(_sockets, "UNPACED", b"reno" if kernels != "reno" else b"cubic")
    async with Backend(family, "a") as a, proxied(family) as node:
        await node.service("web", 1)
        for where, expected in (("here", _sockets.UNPACED.decode()), ("elsewhere", kernels)):
            await node.endpoints("web", a.address, node=where)
            _reader, writer = await asyncio.open_connection(node.vip(1), 80)
            assert await congestion_control(a.address.port) == [
                expected if default == "bbr" else kernels
            ]
            writer.close()
            async with asyncio.timeout(5):
                while await congestion_control(a.address.port):  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.01)


async def congestion_control(port):
    """Return what the open connections to a port of this node use."""
    words = ("ss", "-tinH", "state", "established", "dport", "=", f":{port}")
    process = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    return [line.split()[0] for line in output.decode().splitlines() if line[0].isspace()]


@both
async def test_without_endpoints_clients_are_refused_at_once(family):
    async with proxied(family) as node:
        await node.service("web", 1, node_port=30080)
        await node.service("dns", 2, port=53, proto="UDP")
        assert await outcome(node.ask(node.vip(1))) == "refused"
        assert await outcome(node.ask(NODE_IP[family], 30080)) == "refused"
        assert await outcome(node.ask_udp(node.vip(2), 53)) == "refused"


@both
async def test_an_address_of_others_without_endpoints_is_not_silent(family):
    """The kernel sends no IPv4 reset from an address that is not its own."""
    elsewhere = {4: "203.0.113.9", 6: "2001:db8::9"}[family]
    async with proxied(family) as node:
        await node.service("web", 1, external_ips=(elsewhere,))
        assert await outcome(node.ask(elsewhere)) == "refused"


@both
async def test_undefined_ports_of_a_service_address_stay_silent(family):
    async with Backend(family, "a") as a, proxied(family) as node:
        await node.service("web", 1)
        await node.endpoints("web", a.address)
        # Root of a user namespace may not load the program: then they refuse, and the log says so.
        expected = "silence" if may_load(family) else "refused"
        assert await outcome(node.ask(node.vip(1), 81)) == expected
        assert await outcome(node.ask_udp(node.vip(1), 80)) == expected


@both
async def test_a_local_policy_without_local_endpoints_meets_everybody_with_silence(family):
    async with Backend(family, "a") as a, proxied(family) as node:
        await node.service("web", 1, internal_local=True)
        await node.endpoints("web", a.address, node="elsewhere")
        assert await outcome(node.ask(node.vip(1))) == "silence"
        await node.endpoints("web", a.address)
        assert await node.ask(node.vip(1)) == b"a ?"


@both
async def test_an_external_local_policy_tells_insiders_from_strangers(family):
    async with Backend(family, "a") as a, proxied(family) as node:
        vip = node.vip(9)
        await node.service(
            "web", 1, node_port=30080, type="LoadBalancer", external_local=True,
            load_balancer_ips=(vip,),
        )  # fmt: skip
        await node.endpoints("web", a.address, node="elsewhere")
        for ip, port in ((vip, 80), (NODE_IP[family], 30080)):
            assert await outcome(node.ask(ip, port, source=STRANGER[family])) == "silence"
            assert await node.ask(ip, port, source=NODE_IP[family]) == b"a ?"
            assert await node.ask(ip, port, source=POD[family]) == b"a ?"


@both
@pytest.mark.parametrize("proto", ["TCP", "UDP"])
async def test_source_ranges_leave_others_without_an_answer(family, proto):
    async with Backend(family, "a") as a, proxied(family) as node:
        vip = node.vip(9)
        ask = node.ask if proto == "TCP" else node.ask_udp
        allowed = {
            "load_balancer_ips": (vip,),
            "type": "LoadBalancer",
            "source_ranges": (ip_network(STRANGER[family]),),
        }
        await node.service("web", 1, proto=proto, **allowed)
        await node.endpoints("web", a.address, proto=proto)
        assert await ask(vip, 80, source=STRANGER[family]) == b"a ?"
        assert await outcome(ask(vip, 80, source=POD[family])) == "silence"
        assert await ask(node.vip(1), 80, source=POD[family]) == b"a ?", "the cluster IP is open"
        await node.service("web", 1, proto=proto, **{**allowed, "source_ranges": ()})
        assert await ask(vip, 80, source=POD[family]) == b"a ?"


@both
@pytest.mark.parametrize("proto", ["TCP", "UDP"])
async def test_a_node_port_answers_on_every_address_and_from_it(family, proto):
    async with Backend(family, "a") as a, proxied(family, host=Host()) as node:
        ask = node.ask if proto == "TCP" else node.ask_udp
        await node.service("web", 1, proto=proto, node_port=30080)
        await node.endpoints("web", a.address, proto=proto)
        for ip in (NODE_IP[family], LOOPBACK[family], STRANGER[family]):
            assert await ask(ip, 30080) == b"a ?"


@pytest.mark.parametrize(
    ("config", "served"),
    [
        pytest.param(
            Config(node_port_addresses=("192.0.2.12/32",)), {"192.0.2.12"}, id="nodePortAddresses"
        ),
        pytest.param(Config(node_port_addresses=("primary",)), {"192.0.2.11"}, id="primary"),
        pytest.param(
            Config(iptables=IPTables(localhost_node_ports=False)),
            {"192.0.2.11", "192.0.2.12"},
            id="not on localhost",
        ),
    ],
)
async def test_node_ports_keep_to_the_addresses_they_are_told(config, served):
    async with Backend(4, "a") as a, proxied(4, config) as node:
        await node.service("web", 1, node_port=30080)
        await node.endpoints("web", a.address)
        for ip in ("192.0.2.11", "192.0.2.12", "127.0.0.1"):
            expected = b"a ?" if ip in served else "refused"
            assert await outcome(node.ask(ip, 30080)) == expected


async def test_a_service_port_may_equal_a_node_port():
    async with Backend(4, "a") as a, Backend(4, "b") as b, proxied(4) as node:
        await node.service("one", 1, node_port=30080)
        await node.service("two", 2, port=30080)
        await node.endpoints("one", a.address)
        await node.endpoints("two", b.address)
        assert await node.ask(node.vip(2), 30080) == b"b ?"
        assert await node.ask(NODE_IP[4], 30080) == b"a ?"


async def test_a_port_taken_by_another_program_is_told_and_tried_again():
    async with Backend(4, "a") as a, proxied(4) as node:
        with socket.create_server(("0.0.0.0", 30081)):
            await node.service("web", 1, node_port=30081)
            report = await node.endpoints("web", a.address)
            assert report.error is None
            assert report.unserved == (
                "default/web: node:30081/TCP: port 30081 is taken by another program on this node",
            )
            assert await node.ask(node.vip(1)) == b"a ?", "the rest is served"
        await node.service("other", 2)
        assert await node.ask(NODE_IP[4], 30081) == b"a ?"


@both
async def test_an_open_connection_outlives_its_endpoint_and_its_service(family):
    async with Backend(family, "a") as a, Backend(family, "b") as b, proxied(family) as node:
        await node.service("web", 1)
        await node.endpoints("web", a.address)
        reader, writer = await node.connect(node.vip(1))
        await node.endpoints("web", b.address)
        assert await node.ask(node.vip(1)) == b"b ?"
        await node.endpoints("web")
        writer.write(b"still here")
        writer.write_eof()
        assert await reader.read() == b"a still here"
        writer.close()


@both
async def test_an_open_connection_outlives_the_address_it_came_by(family, monkeypatch):
    monkeypatch.setattr(_usertarget, "LEAVING_SECONDS", 0.05)
    async with Backend(family, "a") as a, proxied(family) as node:
        await node.service("web", 1)
        await node.endpoints("web", a.address)
        reader, writer = await node.connect(node.vip(1))
        await asyncio.sleep(0.05)  # in the backlog it is not ours yet
        await node.service("web", 2)
        assert await node.ask(node.vip(2)) == b"a ?"
        assert await outcome(node.ask(node.vip(1))) == "silence", "it is nobody's any more"
        writer.write(b"still here")
        writer.write_eof()
        assert await reader.read() == b"a still here"
        writer.close()
        await asyncio.sleep(SILENCE)
        assert "unreachable" in (await outcome(node.ask(node.vip(1)))).lower()


async def test_a_reset_is_passed_on_both_ways():
    async with Backend(4, "a") as a, proxied(4) as node:
        await node.service("web", 1)
        await node.endpoints("web", a.address)
        reader, writer = await node.connect(node.vip(1))
        writer.write(b"reset me")
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()

        a.ended.clear()
        _reader, writer = await node.connect(node.vip(1))
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        await asyncio.wait_for(a.ended.wait(), 2)
        assert a.resets == 1


async def test_an_endpoint_that_refuses_is_passed_over():
    async with Backend(4, "a") as a, proxied(4) as node:
        await node.service("web", 1)
        await node.endpoints("web", a.address, Address("127.0.0.1", 1), Address("127.0.0.1", 2))
        assert [await node.ask(node.vip(1)) for _ in range(6)] == [b"a ?"] * 6


async def test_when_no_endpoint_answers_the_client_is_reset():
    async with proxied(4) as node:
        await node.service("web", 1)
        await node.endpoints("web", Address("127.0.0.1", 1))
        with pytest.raises(ConnectionResetError):
            await node.ask(node.vip(1))
        assert ("TCP", "dial_failed") in node.observer.results


async def test_a_stalled_reader_stops_the_writer():
    async def endless(reader, writer):
        try:
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        except ConnectionError:
            writer.close()

    server = await asyncio.start_server(endless, "127.0.0.1", 0)
    async with server, proxied(4) as node:
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        await node.service("web", 1)
        await node.endpoints("web", address)
        sock = socket.create_connection((node.vip(1), 80))
        before = memory()
        await asyncio.sleep(1.0)
        grown = memory() - before
        sock.close()
        await asyncio.sleep(0.05)
        assert grown < 4 << 20, (
            f"{grown >> 10} KiB more, of which the server's own buffers are part"
        )


def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@both
async def test_a_udp_flow_keeps_its_backend_until_that_serves_no_more(family):
    async with Backend(family, "a") as a, Backend(family, "b") as b, proxied(family) as node:
        await node.service("dns", 1, port=53, proto="UDP")
        await node.endpoints("dns", a.address, proto="UDP")
        client = udp_client(node.vip(1), 53)
        assert await node.ask_udp(node.vip(1), 53, sock=client) == b"a ?"
        await node.endpoints("dns", a.address, b.address, proto="UDP")
        assert await node.ask_udp(node.vip(1), 53, sock=client) == b"a ?"
        await node.endpoints("dns", b.address, proto="UDP")
        assert await node.ask_udp(node.vip(1), 53, sock=client) == b"b ?"
        client.close()


async def test_affinity_keeps_a_client_with_one_endpoint():
    async with Backend(4, "a") as a, Backend(4, "b") as b, proxied(4) as node:
        await node.service("web", 1, node_port=30080, affinity_seconds=600)
        await node.endpoints("web", a.address, b.address)
        first = await node.ask(node.vip(1), source=POD[4])
        again = [await node.ask(node.vip(1), source=POD[4]) for _ in range(4)]
        again += [await node.ask(NODE_IP[4], 30080, source=POD[4])]
        assert again == [first] * 5


async def test_the_log_says_once_that_affinity_forgets_clients(monkeypatch, caplog):
    monkeypatch.setattr(balancer, "MOST_CLIENTS", 1)
    async with Backend(4, "a") as a, proxied(4) as node:
        await node.service("web", 1, node_port=30080, affinity_seconds=600)
        await node.endpoints("web", a.address)
        for source in (POD[4], STRANGER[4], POD[4]):
            assert await node.ask(node.vip(1), source=source)
        told = [r.service for r in caplog.records if "affinity forgets" in r.message]
        assert told == ["default/web"]


async def test_running_out_of_file_descriptors_ends_nothing():
    async with Backend(4, "a") as a, proxied(4) as node:
        await node.service("web", 1)
        await node.endpoints("web", a.address)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        clients = [socket.socket() for _ in range(4)]
        lowest = max(c.fileno() for c in clients) + 3  # room for the first, and half the second
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
            for client in clients:
                client.setblocking(False)
                client.connect_ex((node.vip(1), 80))
            await asyncio.sleep(2 * SILENCE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for client in clients:
                client.close()
        await asyncio.sleep(2 * SILENCE)
        assert await node.ask(node.vip(1)) == b"a ?"


async def test_an_address_that_is_given_up_is_no_longer_local():
    async with Backend(4, "a") as a, proxied(4) as node:
        await node.service("web", 1)
        await node.endpoints("web", a.address)
        assert await node.ask(node.vip(1)) == b"a ?"
        await node.service("web", 2)
        assert "unreachable" in (await outcome(node.ask(node.vip(1)))).lower()
        assert await node.ask(node.vip(2)) == b"a ?"


@both
async def test_of_an_address_of_others_only_the_port_is_taken(family):
    other = "203.0.113.7" if family == 4 else "2001:db8::7"
    async with Backend(family, "a") as a, proxied(family) as node:
        await node.service("web", 1, external_ips=(other,))
        await node.service("dns", 2, port=53, proto="UDP", external_ips=(other,))
        await node.endpoints("web", a.address)
        await node.endpoints("dns", a.address, proto="UDP")
        assert await node.ask(other) == b"a ?"
        assert await node.ask_udp(other, 53) == b"a ?"
        for port in (53, 81):  # not ours: it goes where the node's routes lead, here nowhere
            assert "unreachable" in (await outcome(node.ask(other, port))).lower()
        await node.service("web", 1)
        assert "unreachable" in (await outcome(node.ask(other))).lower()
        assert await node.ask_udp(other, 53) == b"a ?"


async def test_what_an_earlier_process_left_is_taken_over_or_removed():
    async with Backend(4, "a") as a:
        async with proxied(4) as node:
            await node.service("web", 1)
            await node.endpoints("web", a.address)
            from pyproxy.proxier._vips import Vips, whole_address

            routes = Vips(4, None)
            routes.add([whole_address("10.96.0.77")])
            node.carrier.distrust()
            await node.service("api", 2)
            assert {vip.ip for vip in routes.listed()} == {"10.96.0.1", "10.96.0.2"}
        assert routes.listed() == set()
        routes.close()


async def test_it_verifies_sockets_and_routes_and_mends_nothing():
    from pyproxy.proxier._vips import Vips, whole_address

    async with Backend(4, "a") as a, proxied(4) as node:
        await node.service("web", 1, node_port=30080)
        await node.endpoints("web", a.address)
        web = owner("web")
        assert await node.carrier.verify({web}) == Verified(2)
        routes = Vips(4, None)
        routes.remove([whole_address("10.96.0.1")])
        found = await node.carrier.verify({web})
        assert [d.entry for d in found.differences] == ["local route 10.96.0.1"]
        routes.add([whole_address("10.96.0.1")])
        assert await node.carrier.verify({web}) == Verified(2)
        routes.close()
