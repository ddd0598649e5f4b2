"""Virtual servers in the kernel: read back, seen by ipvsadm, adopted, drained, removed."""

import asyncio
import errno
import socket
from ipaddress import ip_network

import pytest
from msgspec import structs

from pyproxy.config import IPVS, Config
from pyproxy.counters import Tally, Where
from pyproxy.host import Host
from pyproxy.model import (
    Address,
    Endpoint,
    EndpointSlice,
    Frontend,
    ObjectName,
    PortKey,
    Service,
    SpecPort,
    Upsert,
)
from pyproxy.proxier import _ipvsnl as nl
from pyproxy.proxier import load
from pyproxy.proxier._conntrack import Conntrack
from pyproxy.proxier._ipvsdrain import active, in_use
from pyproxy.proxier._ipvsnl import Busy, Ipvs
from pyproxy.proxier._vips import RULE_PRIORITY
from pyproxy.rules.ipvs import Destination, Server
from pyproxy.rules.ipvs_text import text
from tests.builders import owner
from tests.guest import lab
from tests.guest.lab import CLIENT, POD, STRANGER, Client, output_of
from tests.netns.node import VIP, proxied

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])
SCHEDULERS = ("rr", "wrr", "lc", "wlc", "sh", "dh", "mh", "sed", "nq")
PROTOS = ("TCP", "UDP", "SCTP")
PATIENCE_SECONDS = 60.0
TRACKS = (  # connections are tracked where a rule asks for it
    "table inet tracks { chain c {"
    " type filter hook input priority 0; ct state invalid counter; }; }"
)
LEADS = {  # past virtual servers
    4: "table ip leads {{ chain c {{ type nat hook prerouting priority -100;"
    " ip daddr {} tcp dport 80 dnat to {}; }}; }}",
    6: "table ip6 leads {{ chain c {{ type nat hook prerouting priority -100;"
    " ip6 daddr {} tcp dport 80 dnat to {}; }}; }}",
}
BALANCED = {4: "198.18.0.7", 6: "fd00:198:18::7"}


@pytest.fixture(autouse=True)
def no_servers():
    output_of("ipvsadm", "-C")
    yield
    output_of("ipvsadm", "-C")


@pytest.fixture
def ipvs(family):
    ipvs = Ipvs(family)
    yield ipvs
    ipvs.close()


@pytest.fixture
def kube_ipvs():
    """The device of kube-proxy's mode."""
    lab.batch("link add kube-ipvs0 type dummy", "link set kube-ipvs0 up")
    yield "kube-ipvs0"
    if "kube-ipvs0" in output_of("ip", "link"):
        lab.batch("link del kube-ipvs0")


def saved():
    """What ipvsadm says there is, in an order that does not change."""
    return sorted(line.rstrip() for line in output_of("ipvsadm", "-S", "-n").splitlines())


def as_ipvsadm_puts_it(line):
    """It leaves out a mask that is no mask, and of two schedulers only names flags it knows."""
    line = line.replace(" -M 128", "")
    return line.replace(",flag-3", "")


def listed(ipvs):
    """What our own reading says there is, as items."""
    items = dict(ipvs.servers())
    for frontend in ipvs.servers():
        for address, busy in ipvs.destinations(frontend).items():
            items[Destination(frontend, address)] = busy.weight
    return items


def one_of_each(family):
    """A virtual server with each scheduler, of all protocols, some that remember clients."""
    items = {}
    for number, scheduler in enumerate(SCHEDULERS):
        frontend = Frontend(VIP[family].format(1), 8000 + number, PROTOS[number % 3])
        items[frontend] = Server(scheduler, 600 + number if number % 2 else None)
        for pod, weight in (("a", 1), ("b", 40 * number)):
            items[Destination(frontend, Address(POD[family][pod], lab.PORT))] = weight
    return items


def made(items):
    servers = [nl.new_server(k, v) for k, v in items.items() if isinstance(k, Frontend)]
    backends = [nl.new_destination(k, v) for k, v in items.items() if isinstance(k, Destination)]
    return servers + backends


# --- Messages -------------------------------------------------------------------------------------


async def test_what_is_written_is_read_back_and_is_what_ipvsadm_sees(ipvs, family):
    items = one_of_each(family)
    assert ipvs.carry_out(made(items)) == []
    assert listed(ipvs) == items
    assert saved() == sorted(map(as_ipvsadm_puts_it, text(items).splitlines()))


async def test_ipvsadm_makes_of_our_text_what_we_write(ipvs, family):
    items = one_of_each(family)
    output_of("ipvsadm", "-R", text=text(items))
    assert listed(ipvs) == items


async def test_a_server_changes_in_place(ipvs, family):
    web = Frontend(VIP[family].format(1), 80, "TCP")
    one = Destination(web, Address(POD[family]["a"], lab.PORT))
    assert ipvs.carry_out(made({web: Server("rr", 30), one: 1})) == []
    changes = [nl.set_server(web, Server("sh")), nl.set_destination(one, 0)]
    assert ipvs.carry_out(changes) == []
    assert listed(ipvs) == {web: Server("sh"), one: 0}


async def test_what_the_kernel_refuses_is_named_and_stops_nothing_else(ipvs, family):
    web, other = (Frontend(VIP[family].format(1), port, "TCP") for port in (80, 81))
    one = Destination(web, Address(POD[family]["a"], lab.PORT))
    wrong = [
        (nl.new_destination(one, 1), errno.ESRCH),
        (nl.delete_server(web), errno.ESRCH),
        (nl.new_server(web, Server("best")), errno.ENOENT),
        (nl.new_server(other, Server("rr")), errno.EEXIST),
        (nl.delete_destination(one._replace(server=other)), errno.ENOENT),
    ]
    assert ipvs.carry_out([nl.new_server(other, Server("rr"))]) == []
    good = nl.set_server(other, Server("lc"))
    assert ipvs.carry_out([*(request for request, _code in wrong), good]) == wrong
    assert ipvs.servers() == {other: Server("lc")}


async def test_very_many_servers_are_read_back(ipvs, family):
    items = {Frontend(VIP[family].format(1), port, "TCP"): Server("rr") for port in range(1, 2001)}
    assert ipvs.carry_out(made(items)) == []
    assert ipvs.servers() == items
    assert ipvs.carry_out([nl.delete_server(frontend) for frontend in items]) == []
    assert saved() == []


async def test_timeouts_are_set(ipvs):
    ipvs.set_timeouts(901, 121, 301)
    ipvs.set_timeouts(0, 120, 0)
    said = output_of("ipvsadm", "-L", "--timeout")
    assert said.split(":")[1].split() == ["901", "120", "301"]
    ipvs.set_timeouts(900, 120, 300)


# --- A node ---------------------------------------------------------------------------------------


def node(family, config, *changes, keep=False):
    load("ipvs").prepare(config)
    return proxied(family, config, mode="ipvs", host=Host(), changes=changes, keep=keep)


def service(family, proto="TCP", **fields):
    ports = (SpecPort("", proto, 80),)
    fields[f"cluster_ip{family}"] = VIP[family].format(1)
    return Upsert("Service", Service(ObjectName("default", "web"), ports=ports, **fields))


def endpoints(family, *names, proto="TCP", node="here"):
    found = tuple(Endpoint(Address(POD[family][name], lab.PORT), node=node) for name in names)
    same = ObjectName("default", "web")
    return Upsert("EndpointSlice", EndpointSlice(same, same, family, {PortKey("", proto): found}))


def web(family, proto="TCP"):
    return Frontend(VIP[family].format(1), 80, proto)


def weights(ipvs, family, proto="TCP"):
    names = {ip: name for name, ip in POD[family].items()}
    found = ipvs.destinations(web(family, proto))
    return {names[address.ip]: busy.weight for address, busy in found.items()}


async def until(condition):
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110  # the kernel tells nobody
            await asyncio.sleep(0.5)


async def test_a_restart_adopts_what_is_there(family, config):
    cluster = (service(family), endpoints(family, "a", "b"))
    async with node(family, config, *cluster, keep=True):
        before = saved()
    assert saved() == before
    async with node(family, config, *cluster) as restarted:
        report = restarted.observer.reports[0]
        assert (report.error, report.changed) == (None, 0)
        assert saved() == before
    assert saved() == []


async def test_a_restart_carries_out_what_changed_meanwhile(family, config, ipvs):
    async with node(family, config, service(family), endpoints(family, "a"), keep=True):
        pass
    async with node(family, config, service(family), endpoints(family, "b")):
        assert weights(ipvs, family) == {"b": 1}
    async with node(family, config):
        assert saved() == []


async def test_a_busy_destination_is_drained_resumed_and_waited_for_after_a_restart(
    family, config, ipvs
):
    cluster = (service(family), endpoints(family, "b"))
    async with lab.pods(family, "TCP"):
        client = Client("a", VIP[family].format(1), 80, "TCP", None)
        async with node(family, config, service(family), endpoints(family, "a"), keep=True) as one:
            await client.connect()
            assert (await client.say()).pod == "a"
            await one.change(endpoints(family, "b"))
            assert weights(ipvs, family) == {"a": 0, "b": 1}
            assert (await client.say()).pod == "a"
            await one.change(endpoints(family, "a", "b"))
            assert weights(ipvs, family) == {"a": 1, "b": 1}
            address = Address(POD[family]["a"], lab.PORT)
            assert ipvs.destinations(web(family))[address] == Busy(1, 1, 0)
            await one.change(endpoints(family, "b"))
        async with node(family, config, *cluster):
            assert weights(ipvs, family) == {"a": 0, "b": 1}
            assert (await client.say()).pod == "a"
            client.abort()
            await until(lambda: weights(ipvs, family) == {"b": 1})


async def test_a_service_that_goes_is_served_to_its_last_connection(family, config, ipvs):
    async with (
        lab.pods(family, "TCP"),
        node(family, config, service(family), endpoints(family, "b")) as one,
    ):
        client = Client("a", VIP[family].format(1), 80, "TCP", None)
        await client.connect()
        assert (await client.say()).pod == "b"
        await one.remove("web")
        assert (await client.say()).pod == "b"
        assert weights(ipvs, family) == {"b": 0}
        client.abort()
        await until(lambda: saved() == [])


async def test_a_destination_of_udp_goes_at_once(family, config, ipvs):
    cluster = (service(family, "UDP"), endpoints(family, "a", "b", proto="UDP"))
    async with lab.pods(family, "UDP"), node(family, config, *cluster) as one:
        assert isinstance(await lab.ask("a", VIP[family].format(1), 80, "UDP"), lab.Reply)
        await one.change(endpoints(family, "a", proto="UDP"))
        assert weights(ipvs, family, "UDP") == {"a": 1}


async def test_what_somebody_removes_comes_back_within_the_audit_period(family, config):
    period = structs.replace(config.ipvs, sync_period_seconds=1.0)
    audited = structs.replace(config, ipvs=period)
    async with node(family, audited, service(family), endpoints(family, "a", "b")):
        before = saved()
        output_of("ipvsadm", "-C")
        await until(lambda: saved() == before)


# --- What is not ours -----------------------------------------------------------------------------


def foreign(family):
    """Virtual servers of another program: one of them at an address that a Service has."""
    there = {4: ("203.0.113.9", "10.96.0.1"), 6: ("2001:db8::9", "fd00:10:96::1")}[family]
    servers = [Frontend(ip, 443, "TCP") for ip in there]
    for server in servers:
        at = str(Address(server.ip, server.port))
        output_of("ipvsadm", "-A", "-t", at, "-s", "wlc")
        output_of("ipvsadm", "-a", "-t", at, "-r", str(Address(POD[family]["a"], 1)), "-m")
    return servers


def ours_in_the_kernel(family):
    """Routes, rules and tables that this mode makes."""
    word = {4: "ip", 6: "ip6"}[family]
    found = output_of("ip", f"-{family}", "route", "show", "table", "all", "proto", "99")
    rules = output_of("ip", f"-{family}", "rule").splitlines()
    tables = output_of("nft", "list", "tables").splitlines()
    found += "".join(rule for rule in rules if rule.startswith(f"{RULE_PRIORITY}:"))
    return found + "".join(t for t in tables if f"{word} pyproxy" in t)


@pytest.mark.parametrize("clean_up", [False, True], ids=["as a node goes", "by command"])
async def test_what_others_made_stays(family, config, ipvs, clean_up):
    others = foreign(family)
    before = saved()
    shop = service(family, external_ips=({4: "198.18.0.7", 6: "fd00:198:18::7"}[family],))
    cluster = (shop, endpoints(family, "a", "b"))
    async with node(family, config, *cluster, keep=clean_up):
        assert ipvs.servers(ours=False) == dict.fromkeys(others, Server("wlc"))
        assert len(ipvs.servers()) == 2
        assert ours_in_the_kernel(family)
    if clean_up:
        assert await load("ipvs").cleanup(family, Config()) is None
    assert saved() == before
    assert ours_in_the_kernel(family) == ""


async def test_what_kube_proxy_left_goes_and_other_things_stay(family, ipvs):
    here = VIP[family].format(9)
    others = foreign(family)
    lab.batch("link add kube-ipvs0 type dummy", lab.address(here, "kube-ipvs0", lab.BITS[family]))
    output_of("ipvsadm", "-A", "-t", str(Address(here, 80)), "-s", "rr")
    assert await load("ipvs").cleanup(family, Config(), ours=False) is None
    assert "kube-ipvs0" not in output_of("ip", "link")
    assert ipvs.servers(ours=False).keys() == set(others)


async def test_what_kube_proxy_left_stays_while_it_has_connections(family, ipvs, kube_ipvs):
    web = Frontend(VIP[family].format(9), 80, "TCP")
    place, backend = Address(web.ip, web.port), Address(POD[family]["b"], lab.PORT)
    lab.batch(lab.address(web.ip, kube_ipvs, lab.BITS[family]))
    output_of("ipvsadm", "-A", "-t", str(place), "-s", "rr")
    output_of("ipvsadm", "-a", "-t", str(place), "-r", str(backend), "-m")
    async with lab.pods(family, "TCP"):
        client = Client("a", *place, "TCP", None)
        await client.connect()
        assert active(family, ()) == 1
        assert in_use(family, ()) == {web}
        assert {a: found.weight for a, found in ipvs.destinations(web).items()} == {backend: 0}
        assert (await client.say()).pod == "b"
        client.abort()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while in_use(family, ()):  # noqa: ASYNC110 - the kernel tells nobody
                await asyncio.sleep(0.1)
    assert not ipvs.servers(ours=False)
    assert await load("ipvs").cleanup(family, Config()) is None


async def test_answers_by_nat_to_the_port_of_one_that_has_ended_are_no_connection(
    family, ipvs, kube_ipvs
):
    web, other = (Frontend(VIP[family].format(n), 80, "TCP") for n in (9, 8))
    assert not [told for told in load("ipvs").prepare(Config()) if "net.ipv4.vs" in told]
    place, backend = Address(web.ip, web.port), Address(POD[family]["b"], lab.PORT)
    lab.batch(lab.address(web.ip, kube_ipvs, lab.BITS[family]))
    output_of("ipvsadm", "-A", "-t", str(place), "-s", "rr")
    output_of("ipvsadm", "-a", "-t", str(place), "-r", str(backend), "-m")
    output_of("nft", "-f", "-", text=LEADS[family].format(other.ip, backend))
    async with lab.pods(family, "TCP"):
        clients = [Client("a", ip, 80, "TCP", None) for ip in (web.ip, other.ip)]
        for client in clients:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.sock.bind((POD[family]["a"], 40000))
            await client.connect()
            assert (await client.say()).pod == "b"
            if client.peer[0] == web.ip:
                client.close()
        assert ipvs.destinations(web)[backend].active == 1, "as IPVS counts"
        assert active(family, ()) == 0
        assert in_use(family, ()) == frozenset()
        clients[1].close()
    output_of("nft", "delete", "table", {4: "ip", 6: "ip6"}[family], "leads")
    assert not ipvs.servers(ours=False)
    assert await load("ipvs").cleanup(family, Config()) is None


async def test_flows_of_udp_are_forgotten_with_their_server(family, ipvs, kube_ipvs):
    """Else they would go where no server is any more, for as long as their client talks."""
    output_of("nft", "-f", "-", text=TRACKS)
    dns = Frontend(VIP[family].format(9), 53, "UDP")
    place, backend = Address(dns.ip, dns.port), Address(POD[family]["b"], lab.PORT)
    assert not [told for told in load("ipvs").prepare(Config()) if "net.ipv4.vs" in told]
    lab.batch(lab.address(dns.ip, kube_ipvs, lab.BITS[family]))
    output_of("ipvsadm", "-A", "-u", str(place), "-s", "rr")
    output_of("ipvsadm", "-a", "-u", str(place), "-r", str(backend), "-m")
    async with lab.pods(family, "UDP"):
        assert (await lab.ask("a", *place, "UDP")).pod == "b"
    assert len(list(Conntrack(family).flows([dns]))) == 1
    assert in_use(family, ()) == frozenset()
    assert list(Conntrack(family).flows([dns])) == []
    output_of("nft", "delete", "table", "inet", "tracks")
    assert not ipvs.servers(ours=False)
    assert await load("ipvs").cleanup(family, Config()) is None


async def test_what_others_made_in_excluded_ranges_stays_with_its_address(family, ipvs):
    here, bits = VIP[family].format(9), lab.BITS[family]
    lab.batch("link add kube-ipvs0 type dummy", lab.address(here, "kube-ipvs0", bits))
    output_of("ipvsadm", "-A", "-t", str(Address(here, 80)), "-s", "rr")
    spared = Config(ipvs=IPVS(exclude_cidrs=(f"{here}/{bits}",)))
    assert await load("ipvs").cleanup(family, spared) is None
    assert here in output_of("ip", f"-{family}", "addr", "show", "kube-ipvs0")
    assert ipvs.servers(ours=False) == {Frontend(here, 80, "TCP"): Server("rr")}
    assert await load("ipvs").cleanup(family, Config()) is None
    assert "kube-ipvs0" not in output_of("ip", "link")
    assert not ipvs.servers(ours=False)


# --- Settings -------------------------------------------------------------------------------------


async def test_addresses_are_shown_on_the_device_and_packets_go_where_they_went(family, config):
    shown = structs.replace(config, ipvs=IPVS(bind_addresses=True))
    external = {4: "198.18.0.7", 6: "fd00:198:18::7"}[family]
    addresses = {VIP[family].format(1), external}
    cluster = (service(family, external_ips=(external,)), endpoints(family, "a"))
    async with node(family, config, *cluster):
        before = local_routes(family)
    async with node(family, shown, *cluster, keep=True) as one:
        assert on_device(family) == addresses
        assert local_routes(family) == before
        assert await load("ipvs").cleanup(family, shown, ours=False) is None
        assert on_device(family) == addresses, "they are no leftovers"
        await one.remove("web")
        assert on_device(family) == set()
    async with node(family, config, *cluster):
        assert "kube-ipvs0" not in output_of("ip", "link"), "nobody wants to see it any more"


def on_device(family):
    lines = output_of("ip", "-o", f"-{family}", "addr", "show", "kube-ipvs0").splitlines()
    return {line.split()[3].partition("/")[0] for line in lines}


def local_routes(family):
    return sorted(output_of("ip", f"-{family}", "route", "show", "table", "all").splitlines())


async def test_what_goes_through_is_counted(family, config, ipvs):
    cluster = (service(family), endpoints(family, "b"))
    async with lab.pods(family, "TCP"), node(family, config, *cluster) as proxy:
        assert isinstance(await lab.ask("a", VIP[family].format(1), 80, "TCP"), lab.Reply)
        await until(lambda: ipvs.counters()[web(family)].connections == 1)
        counted = ipvs.counters()[web(family)]
        assert counted.packets_in >= 4
        assert counted.packets_out >= 3
        assert counted.bytes_in > 40 * counted.packets_in
        assert ipvs.destination_counters(web(family)) == {
            Address(POD[family]["b"], lab.PORT): counted
        }
        reading = await proxy.carrier.counters(by_endpoint=True)
        found = Tally().take(reading, by_endpoint=True)
        where = [Where(owner("web")), Where(owner("web"), Address(POD[family]["b"], lab.PORT))]
        assert found == dict.fromkeys(where, counted)


async def test_what_is_refused_is_counted_by_the_reason(family, config):
    counting = structs.replace(config, service_metrics="service")
    lb = BALANCED[family]
    ranges = (ip_network(CLIENT[family]),)
    local = service(
        family,
        type="LoadBalancer",
        external_local=True,
        load_balancer_ips=(lb,),
        source_ranges=ranges,
    )
    async with node(family, counting, local) as proxy:
        assert await lab.ask("a", VIP[family].format(1), 80, "TCP") == "refused"
        tally = Tally()
        tally.take(await proxy.carrier.counters(by_endpoint=False), by_endpoint=False)
        await proxy.change(endpoints(family, "far", node="elsewhere"))
        for source in (CLIENT[family], STRANGER[family]):
            seconds = lab.SILENCE_SECONDS
            assert await lab.ask("outside", lb, 80, source=source, seconds=seconds) == "silent"
        reading = await proxy.carrier.counters(by_endpoint=False)
        found = tally.take(reading, by_endpoint=False)[Where(owner("web"))]
        assert min(found.rejected, found.dropped, found.denied) >= 1


async def test_a_scheduler_that_the_kernel_has_not_is_replaced(family, config, ipvs):
    wrong = structs.replace(config, ipvs=IPVS(scheduler="best"))
    assert "ipvs.scheduler: the kernel has no scheduler best, and rr is used" in load(
        "ipvs"
    ).prepare(wrong)
    async with node(family, wrong, service(family), endpoints(family, "a")):
        assert ipvs.servers() == {web(family): Server("rr")}
