"""Flows that the kernel really tracks: found, and deleted where they have to be."""

import shutil
import socket
import subprocess
from contextlib import ExitStack, closing

import pytest

from pyproxy import proxier
from pyproxy.config import Config
from pyproxy.config import Conntrack as Limits
from pyproxy.model import Address, Endpoint, Frontend
from pyproxy.plan import plan_port
from pyproxy.proxier._conntrack import FEW, Conntrack, clean
from pyproxy.proxier._sysctls import apply
from pyproxy.rules.flows import Flow, Pending
from pyproxy.rules.listeners import Surroundings
from tests.builders import SITE, owner, service_port
from tests.netns.tracked import inject

VIP = {4: "10.96.0.1", 6: "fd00:10:96::1"}
SECOND_VIP = {4: "10.96.0.2", 6: "fd00:10:96::2"}
BITS = {4: 32, 6: 128}
NO_DELAY = {4: (), 6: ("nodad",)}
CLIENT = {4: "198.51.100.50", 6: "fd00:5e::50"}
NODE_IP = {4: "192.0.2.11", 6: "fd00:c0de::11"}
OLD = {4: Address("10.244.1.10", 5301), 6: Address("fd00:10:244::10", 5301)}
NEW = {4: Address("10.244.1.10", 5302), 6: Address("fd00:10:244::10", 5302)}
UDP, TCP = "UDP", "TCP"
NOWHERE = Surroundings()
REACH_SECONDS = 2.0

pytestmark = pytest.mark.skipif(shutil.which("nft") is None, reason="nft is not installed")


class Nat:
    """Destination NAT by a table of this test, one rule for each frontend."""

    def __init__(self, family):
        self._ip = "ip" if family == 4 else "ip6"

    def use(self, rules):
        """Replace the rules: ``{frontend: backend}``."""
        lines = ["table inet test", "delete table inet test", "table inet test {\nchain out {"]
        lines += ["type nat hook output priority -100;", "ct state new counter"]
        lines += [self._rule(frontend, backend) for frontend, backend in rules.items()]
        run("nft", "-f", "-", text="\n".join([*lines, "}\n}\n"]))

    def _rule(self, frontend, backend):
        at = f"{self._ip} daddr {frontend.ip} " if frontend.ip else ""
        proto = frontend.proto.lower()
        return f"{at}{proto} dport {frontend.port} dnat {self._ip} to {backend}"


def run(*command, text=None):
    child = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    child.communicate(text)
    assert child.returncode == 0, command


@pytest.fixture(params=[4, 6], ids=["IPv4", "IPv6"])
def family(request, namespace):
    ips = (VIP[request.param], SECOND_VIP[request.param])
    for ip in ips:
        run("ip", "address", "replace", ip, "dev", "lo", *NO_DELAY[request.param])
    yield request.param
    for ip in ips:
        run("ip", "address", "del", f"{ip}/{BITS[request.param]}", "dev", "lo")


@pytest.fixture
def nat(family):
    nat = Nat(family)
    nat.use({})
    yield nat
    run("nft", "delete", "table", "inet", "test")


@pytest.fixture
def table(family):
    table = Conntrack(family)
    yield table
    for proto in ("TCP", "UDP", "SCTP"):
        table.delete(list(table.flows([Frontend("", port, proto) for port in (53, 54, 30053)])))


@pytest.fixture
def sockets():
    with ExitStack() as stack:
        yield lambda sock: stack.enter_context(closing(sock))


def udp(address, to=None):
    sock = socket.socket(
        socket.AF_INET6 if ":" in address.ip else socket.AF_INET, socket.SOCK_DGRAM
    )
    sock.settimeout(REACH_SECONDS)
    sock.bind(address)
    if to is not None:
        sock.connect(to)
    return sock


def reaches(client, server):
    """Whether the client's next datagram is answered by this server."""
    client.send(b"?")
    _data, source = server.recvfrom(16)
    server.sendto(b"!", source)
    return client.recv(16) == b"!"


def frontends(family, *, proto=UDP, port=53):
    return [Frontend(VIP[family], port, proto)]


def plan(family, *backends, proto=UDP, **fields):
    """The plan of a Service at the VIP with these endpoints."""
    port = service_port(name=owner("dns", proto=proto), cluster_ip=VIP[family], port=53, **fields)
    return plan_port(port, [Endpoint(backend, node="here") for backend in backends], SITE)


def review_of(*history):
    """What the last of these plans calls for, each having been in force."""
    pending = Pending(ends_forbidden=True)
    for port in history:
        pending.note({port.owner})
        review = pending.take({port.owner: port})
    return review


def test_a_client_whose_backend_is_gone_reaches_the_next(family, nat, table, sockets):
    old, new = sockets(udp(OLD[family])), sockets(udp(NEW[family]))
    client = sockets(udp(Address(CLIENT[family], 0), Address(VIP[family], 53)))
    [frontend] = frontends(family)
    nat.use({frontend: OLD[family]})
    assert reaches(client, old)
    nat.use({frontend: NEW[family]})
    assert reaches(client, old)  # what a flow does that nobody deletes

    review = review_of(plan(family, OLD[family]), plan(family, NEW[family]))
    assert clean(table, review, NOWHERE) == 1
    assert reaches(client, new)
    assert clean(table, review, NOWHERE) == 0


def test_a_flow_is_read_as_it_is(family, nat, table, sockets):
    server = sockets(udp(OLD[family]))
    client = sockets(udp(Address(CLIENT[family], 0), Address(VIP[family], 53)))
    [frontend] = frontends(family)
    nat.use({frontend: OLD[family]})
    assert reaches(client, server)
    [found] = table.flows([frontend])
    source = Address(*client.getsockname()[:2])
    assert found == Flow(UDP, source, Address(VIP[family], 53), OLD[family], found.identity)


def test_a_flow_that_nobody_translated_goes_with_the_first_endpoint(family, nat, table, sockets):
    server = sockets(udp(OLD[family]))
    untranslated = sockets(udp(Address(VIP[family], 53)))
    client = sockets(udp(Address(CLIENT[family], 0), Address(VIP[family], 53)))
    assert reaches(client, untranslated)
    [frontend] = frontends(family)
    nat.use({frontend: OLD[family]})
    assert reaches(client, untranslated)

    review = review_of(plan(family), plan(family, OLD[family]))
    assert clean(table, review, NOWHERE) == 1
    assert reaches(client, server)


def test_other_flows_stay(family, nat, table, sockets):
    old, other = sockets(udp(OLD[family])), Address(SECOND_VIP[family], 53)
    [frontend] = frontends(family)
    [another_port] = frontends(family, port=54)
    nat.use(
        {
            frontend: OLD[family],
            another_port: OLD[family],
            Frontend(other.ip, other.port, UDP): OLD[family],
        }
    )
    clients = [
        sockets(udp(Address(CLIENT[family], 0), to))
        for to in (Address(VIP[family], 53), Address(VIP[family], 54), other)
    ]
    assert [reaches(client, old) for client in clients] == [True, True, True]
    review = review_of(plan(family, OLD[family]), plan(family, NEW[family]))
    assert clean(table, review, NOWHERE) == 1
    found = table.flows([frontend, another_port, Frontend(other.ip, 53, UDP)])
    assert {flow.destination for flow in found} == {Address(VIP[family], 54), other}


def test_tcp_does_not_notice_that_its_endpoint_is_gone(family, nat, table, sockets):
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    listener = sockets(socket.create_server(OLD[family], family=kind))
    [frontend] = frontends(family, proto=TCP)
    nat.use({frontend: OLD[family]})
    client = sockets(socket.create_connection((VIP[family], 53), REACH_SECONDS))
    server = sockets(listener.accept()[0])

    for proto in (UDP, TCP):
        history = (plan(family, who[family], proto=proto) for who in (OLD, NEW))
        assert clean(table, review_of(*history), NOWHERE) == 0
    client.sendall(b"?")
    assert server.recv(16) == b"?"


@pytest.mark.parametrize("proto", [TCP, UDP])
def test_flows_of_a_node_port_given_up_are_deleted(family, proto, table):
    backend, own = OLD[family], Address(NODE_IP[family], 30053)
    client = Address(CLIENT[family], 40000)
    inject([(proto, client, own, backend), (proto, client, Address(VIP[family], 30053), own)])
    history = (plan(family, backend, proto=proto, node_port=port) for port in (30053, 30054))
    assert clean(table, review_of(*history), NOWHERE) == 1
    [left] = table.flows([Frontend("", 30053, proto)])
    assert left.backend == own


# --- reading and deleting -------------------------------------------------------------------------


def entry(family, number, *, proto=UDP, to=None, backend=None, zone=0):
    source = f"10.200.{number >> 8}.{number & 255}" if family == 4 else f"fd00:c::{number:x}"
    to, backend = to or Address(VIP[family], 53), backend or OLD[family]
    return proto, Address(source, 40000), to, backend, zone


@pytest.mark.parametrize("filters", [True, False], ids=["kernel filters", "nobody filters"])
@pytest.mark.parametrize("ports", [1, FEW, FEW + 1])
def test_the_flows_of_every_frontend_are_found_once(family, filters, ports):
    wanted = [Frontend(VIP[family], 1000 + n, UDP) for n in range(ports)]
    if ports > 1:  # the port of the first is a node port too, the second has two addresses
        wanted += [Frontend("", 1000, UDP), Frontend(SECOND_VIP[family], 1001, UDP)]
    everything = [
        (proto, ip, port)
        for proto in (UDP, TCP)
        for ip in (VIP[family], SECOND_VIP[family], NODE_IP[family])
        for port in range(1000, 1008)
    ]
    inject(
        entry(family, number, proto=proto, to=Address(ip, port))
        for number, (proto, ip, port) in enumerate(everything)
    )
    expected = sorted(
        (ip, port, proto)
        for proto, ip, port in everything
        if {Frontend(ip, port, proto), Frontend("", port, proto)} & set(wanted)
    )
    table = Conntrack(family, filters=filters)
    assert sorted((*f.destination, f.proto) for f in table.flows(wanted)) == expected
    every_port = [Frontend("", port, proto) for port in range(1000, 1008) for proto in (UDP, TCP)]
    assert table.delete(list(table.flows(every_port))) == len(everything)


@pytest.mark.parametrize("proto", ["TCP", "UDP", "SCTP"])
@pytest.mark.parametrize("zone", [0, 7])
def test_a_flow_of_any_protocol_and_zone_can_be_deleted(family, table, proto, zone):
    inject([entry(family, 1, proto=proto, zone=zone), entry(family, 1, proto=proto, zone=9)])
    both = list(table.flows(frontends(family, proto=proto)))
    assert len(both) == 2
    assert {table.delete([flow]) for flow in both} == {1}


def test_flows_that_ended_by_themselves_do_not_count(family, table):
    inject([entry(family, number) for number in range(300)])
    found = list(table.flows(frontends(family)))
    assert table.delete(found[::2]) == 150
    assert table.delete(found) == 150
    assert list(table.flows(frontends(family))) == []


def test_a_hundred_among_ten_thousand(family, table):
    other = Address(SECOND_VIP[family], 53)
    inject([entry(family, n, to=other if n % 100 else None) for n in range(10_000)])
    assert clean(table, review_of(plan(family, NEW[family])), NOWHERE) == 100
    assert len(list(table.flows([Frontend(other.ip, 53, UDP)]))) == 9_900


def test_nothing_to_delete_asks_the_kernel_nothing():
    assert Conntrack(4).delete([]) == 0


def test_timeouts_are_set():
    name = "net/netfilter/nf_conntrack_tcp_timeout_close_wait"
    for seconds in (3600, 3601, 3601):
        assert apply({name: seconds}) == ()
        with open(f"/proc/sys/{name}") as file:
            assert file.read() == f"{seconds}\n"


@pytest.mark.parametrize(
    ("mode", "beside", "seconds"),
    [
        ("nftables", "", 7201),
        ("iptables", "", 7201),
        ("userspace", "", 7201),
        ("nftables", "another", 7200),
        ("userspace", "another", 7200),
    ],
)
def test_a_mode_sets_the_limits_of_a_node_that_it_serves_alone(nat, mode, beside, seconds):
    name = "net/netfilter/nf_conntrack_tcp_timeout_established"
    assert apply({name: 7200}) == ()
    limits = Limits(max_per_core=0, tcp_established_timeout_seconds=7201.0)
    config = Config(conntrack=limits, service_proxy_name=beside)
    assert proxier.load(mode).prepare(config) == ()
    with open(f"/proc/sys/{name}") as file:
        assert file.read() == f"{seconds}\n"
