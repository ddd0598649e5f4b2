"""Mode iptables in the kernel, with the rules of both flavours."""

import socket
import subprocess
from collections import Counter
from contextlib import suppress
from functools import partial
from ipaddress import ip_network
from unittest.mock import patch

import pytest
from msgspec import structs

from pyproxy.delta import Delta
from pyproxy.model import Address, Endpoint, Frontend, ServicePort, ServicePortName
from pyproxy.plan import Plan, Site, plan_port
from pyproxy.proxier import _nfacct
from pyproxy.proxier._conntrack import Conntrack
from pyproxy.proxier._flavour import programs_of
from pyproxy.proxier._ipmembers import MemberSets, destroy_sets
from pyproxy.proxier._ipset import IP_PORT, IP_PORT_IP, IpSets
from pyproxy.proxier._iptables import Iptables, IptablesError
from pyproxy.proxier._iptarget import IpTarget, remove
from pyproxy.proxier._netlink import Netlink
from pyproxy.reconcile import Reconciler
from pyproxy.report import RestoreReport
from pyproxy.rules.iptables import (
    CLUSTER_IPS,
    HAIRPIN,
    MEMBER,
    SETS,
    Item,
    Ruleset,
    compile_owner,
    set_name,
    suffix_of,
)
from pyproxy.rules.iptables_base import CANARY, INVALID_DROPPED, LOCALHOST_ACCEPTED
from pyproxy.rules.iptables_layout import chains_of
from pyproxy.rules.iptables_text import is_ours, parsed
from pyproxy.topology import Place
from tests.iptables_cluster import cluster
from tests.netns.conftest import ADDRESSES, ADDRESSES6
from tests.netns.node import udp_client
from tests.trace.iptables import chosen

# "\udce9" is a byte that is not UTF-8: "e" with acute in ISO 8859-1.
FOREIGN = """*filter
:KUBE-FIREWALL - [0:0]
:MINE - [0:0]
-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT
-A INPUT -j KUBE-FIREWALL
-A FORWARD -j MINE
-A MINE -m comment --comment "says -j KUBE-SERVICES" -j RETURN
-A MINE -p udp -m comment --comment "caf\udce9" -j RETURN
-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP
COMMIT
*nat
:KUBE-NOT-OURS - [0:0]
-A POSTROUTING -j KUBE-NOT-OURS
COMMIT
*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
"""


class Clock:
    def monotonic(self):
        return 0.0

    def unix(self):
        return 0.0


class Counting(Iptables):
    """Tables that count what is written to them, and by how many targets."""

    def __init__(self, programs):
        super().__init__(programs)
        self.inputs = []
        self.targets = []

    async def restore(self, lines):
        self.inputs.append(lines)
        await super().restore(lines)


def output_of(*argv, text=""):
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        argv, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="surrogateescape"
    )
    output, _ = child.communicate(text, timeout=60)
    assert child.returncode == 0, output
    return output


def flush(programs):
    for table in ("filter", "nat", "mangle"):
        for flag in ("-F", "-X"):
            output_of(programs.plain, "-w", "-t", table, flag)


@pytest.fixture(params=[(4, "nft"), (4, "legacy"), (6, "nft"), (6, "legacy")], ids=str)
async def tables(request):
    family, flavour = request.param
    programs = programs_of(family).get(flavour)
    if programs is None:
        pytest.skip(f"no iptables of flavour {flavour} here")
    flush(programs)
    tables = Counting(programs)
    yield tables
    for each in (*tables.targets, tables):
        await each.aclose()
    flush(programs)
    output_of("ipset", "destroy")


@pytest.fixture
def ruleset(tables):
    family = 6 if "6" in tables.programs.plain else 4
    pods = ip_network("10.244.0.0/16" if family == 4 else "fd00:10:244::/56")
    counted = _nfacct.ensured()
    return Ruleset(family, pods=pods, localhost_node_ports=family == 4, counted=counted)


def target_of(tables, ruleset, **heard):
    target = IpTarget(tables, lambda: ruleset, **heard)
    tables.targets.append(target)
    return target


def proxier(tables, ruleset, **heard):
    target = target_of(tables, ruleset, **heard)
    return Reconciler("iptables", ruleset.family, partial(compile_owner, ruleset), target, Clock())


def without_counters(text):
    """What is there, without what a packet or the date changes."""
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return [line.split(" [")[0] for line in lines]


async def test_the_kernel_prints_each_rule_as_we_wrote_it(tables, ruleset):
    plan = cluster(ruleset.family)
    report = await proxier(tables, ruleset).sync(plan, set(plan.ports))
    assert report.error is None
    assert report.unserved == ()
    items = {}
    for port in plan.ports.values():
        items |= compile_owner(ruleset, port, {})
    there = parsed(await tables.save())
    ours = {place: rules for place, rules in there.items() if is_ours(place[1])}
    assert ours == chains_of(ruleset, items)


async def test_a_second_process_writes_nothing(tables, ruleset):
    plan = cluster(ruleset.family)
    await proxier(tables, ruleset).sync(plan, set(plan.ports))
    tables.inputs.clear()
    report = await proxier(tables, ruleset).sync(plan, set())
    assert report.error is None
    assert tables.inputs == []


async def test_a_change_writes_the_chains_it_concerns(tables, ruleset):
    plan = cluster(ruleset.family)
    carrier = proxier(tables, ruleset)
    await carrier.sync(plan, set(plan.ports))
    tables.inputs.clear()
    owner = next(iter(plan.ports))
    changed = cluster(ruleset.family, endpoints=5)
    await carrier.sync(changed, {owner})
    [lines] = tables.inputs
    assert {line.split(" ")[0][1:9] for line in lines if line.startswith(":")} == {"KUBE-SVC"}


async def test_a_change_closes_no_socket_of_netfilter(tables, ruleset):
    """To close one waits until the kernel has freed what the last commit replaced."""
    carrier = proxier(tables, ruleset)
    plan = cluster(ruleset.family)
    await carrier.sync(plan, set(plan.ports))
    closed = []
    with patch.object(Netlink, "close", lambda self: closed.append(self)):
        for endpoints in (4, 1):
            plan = cluster(ruleset.family, endpoints=endpoints)
            assert (await carrier.sync(plan, set(plan.ports))).changed
    assert closed == []


async def test_rules_are_counted_as_they_are_written(tables, ruleset):
    plan, reports = cluster(ruleset.family), []
    carrier = proxier(tables, ruleset, on_restore=reports.append)
    await carrier.sync(plan, set(plan.ports))
    there = parsed(await tables.save())
    owned = Counter({"filter": 0, "nat": 0})
    for (table, chain), rules in there.items():
        if is_ours(chain) and table in owned:
            owned[table] += len(rules)
    owner = next(iter(plan.ports))
    await carrier.sync(cluster(ruleset.family, endpoints=5), {owner})
    await carrier.sync(plan, set())
    more = {"filter": owned["filter"], "nat": owned["nat"] + 2}
    family = ruleset.family
    assert reports == [
        RestoreReport(family, True, False, dict(owned), dict(owned)),
        RestoreReport(family, False, False, more, {"nat": 5}),
    ]


async def test_a_restore_that_failed_is_told(tables, ruleset):
    reports = []
    target = target_of(tables, ruleset, on_restore=reports.append)
    await target.adopt()
    await target.apply(Delta({}, {}, {}))
    bad = Item("nat", "KUBE-SVC-BAD")
    await target.apply(Delta({bad: ("-m nonsense -j RETURN",)}, {}, {}))
    assert [(report.full, report.failed) for report in reports] == [(True, False), (False, True)]


@pytest.mark.parametrize("tables", [(4, "nft"), (4, "legacy")], indirect=True, ids=str)
async def test_what_comes_to_a_node_port_at_loopback_is_counted(tables, ruleset, request):
    assert ruleset.counted, "the kernel has no nfacct"
    plan = cluster(4)
    await proxier(tables, ruleset).sync(plan, set(plan.ports))
    output_of("ip", "route", "replace", "10.244.1.0/24", "dev", "lo")
    request.addfinalizer(lambda: output_of("ip", "route", "delete", "10.244.1.0/24", "dev", "lo"))
    output_of("conntrack", "-F")
    before = _nfacct.packets(LOCALHOST_ACCEPTED)
    for port in (30001, 30001, 9):
        with suppress(OSError), socket.socket() as sock:
            sock.settimeout(0.05)
            sock.connect(("127.0.0.1", port))
    assert _nfacct.packets(LOCALHOST_ACCEPTED) == before + 2
    assert _nfacct.packets(INVALID_DROPPED) is not None


def test_counters_come_and_go():
    _nfacct.remove()
    assert _nfacct.packets(INVALID_DROPPED) is None
    assert _nfacct.ensured()
    assert _nfacct.ensured()  # they are there
    assert _nfacct.packets(INVALID_DROPPED) == 0


async def test_what_others_flush_is_there_again_and_told(tables, ruleset):
    plan, told = cluster(ruleset.family), []
    carrier = proxier(tables, ruleset, on_drift=told.append)
    await carrier.sync(plan, set(plan.ports))
    before = without_counters(await tables.save())
    assert await tables.has_canary()
    flush(tables.programs)
    assert not await tables.has_canary()
    carrier.distrust()
    report = await carrier.sync(plan, set())
    assert report.error is None
    assert without_counters(await tables.save()) == before
    assert len(told) == 1


async def test_rules_of_others_stay_as_they_are(tables, ruleset):
    output_of(tables.programs.restore, text=FOREIGN)
    before = without_counters(await tables.save())
    plan = cluster(ruleset.family)
    plain = structs.replace(ruleset, localhost_node_ports=False)
    await proxier(tables, plain).sync(plan, set(plan.ports))
    with_ours = without_counters(await tables.save())
    assert set(before) <= set(with_ours)
    await remove([tables], ruleset.family)
    assert without_counters(await tables.save()) == before
    assert output_of("ipset", "list", "-n") == ""


async def test_the_chain_shared_with_kubelet_gets_one_rule_and_keeps_its_own(tables, ruleset):
    output_of(tables.programs.restore, text=FOREIGN)
    plan = cluster(ruleset.family)
    for _ in range(2):
        await proxier(tables, ruleset).sync(plan, set(plan.ports))
    await remove([tables], ruleset.family)
    rules = parsed(await tables.save())["filter", "KUBE-FIREWALL"]
    assert len(rules) == (2 if ruleset.localhost_node_ports else 1)


async def test_clearing_an_empty_host_writes_nothing(tables, ruleset):
    await remove([tables], ruleset.family)
    assert tables.inputs == []


async def test_a_rule_that_is_refused_is_left_out_with_what_leads_to_it(tables, ruleset):
    target = target_of(tables, ruleset)
    await target.adopt()
    ip = "10.96.0.9/32" if ruleset.family == 4 else "fd00:10:96::9/128"
    bad = Item("nat", "KUBE-SVC-BAD")
    to_bad = Item("nat", "KUBE-SERVICES", f"-d {ip} -p tcp -m tcp --dport 80")
    good = Item("nat", "KUBE-NODEPORTS", "-p tcp -m tcp --dport 30080")
    added = {
        bad: ("-p tcp -m nonsense -j RETURN",),
        to_bad: "KUBE-SVC-BAD",
        good: "KUBE-MARK-MASQ",
    }
    refused = await target.apply(Delta(added, {}, {}))
    assert refused.keys() == {bad, to_bad}
    assert "nonsense" in refused[bad]
    there = parsed(await tables.save())
    assert there["nat", "KUBE-NODEPORTS"] == (f"{good.match} -j KUBE-MARK-MASQ",)
    assert ("nat", "KUBE-SVC-BAD") not in there


async def test_what_the_kernel_refuses_does_not_stop_the_rest(tables, ruleset):
    """The kernel, unlike the program, may say no more than that the whole is not to its liking."""
    target = target_of(tables, ruleset)
    await target.adopt()
    bad = Item("nat", "KUBE-SVC-BAD")
    good = Item("nat", "KUBE-SVC-GOOD")
    ip = "10.0.0.1" if ruleset.family == 4 else "[fd00::1]"
    to = f"-p tcp -j DNAT --to-destination {ip}:80"
    added = {bad: ("-j TPROXY --on-port 1 --on-ip 0.0.0.0 --tproxy-mark 0x0/0x0",), good: (to,)}
    refused = await target.apply(Delta(added, {}, {}))
    assert refused.keys() == {bad}
    assert parsed(await tables.save())["nat", "KUBE-SVC-GOOD"] == (to,)


async def test_an_error_names_the_line_of_its_own_input(tables):
    for lines in (["*nat", ":GOOD - [0:0]", "COMMIT"], ["*nat", "-A GOOD -m nonsense", "COMMIT"]):
        refused = None
        try:
            await tables.restore(lines)
        except IptablesError as error:
            refused = error
    assert refused is not None
    assert refused.line == 1


async def test_a_program_that_cannot_start_is_an_error(tables):
    gone = Iptables(tables.programs._replace(save="no-such-program"))
    with pytest.raises(IptablesError, match="no-such-program: No such file"):
        await gone.save()


@pytest.mark.parametrize("family", [4, 6])
def test_sets_hold_what_was_added_and_not_removed(family):
    ip = "10.0.0.1" if family == 4 else "fd00::1"
    sets = IpSets(family)
    try:
        for kind, last in ((IP_PORT, ""), (IP_PORT_IP, f",{ip}")):
            name = set_name("TRIAL", family)
            members = {f"{ip},{proto}:80{last}" for proto in ("tcp", "udp", "sctp")}
            assert sets.members(name) is None
            sets.create(name, kind)
            sets.add(name, members)
            sets.add(name, members)  # which are there
            sets.remove(name, [f"{ip},udp:80{last}"])
            sets.remove(name, [f"{ip},udp:80{last}"])  # which is not
            assert sets.members(name) == members - {f"{ip},udp:80{last}"}
            sets.destroy(name)
            sets.destroy(name)
    finally:
        sets.close()


async def test_members_are_there_as_long_as_an_owner_wants_them():
    sets, kernel, name = MemberSets(4), IpSets(4), set_name(HAIRPIN, 4)
    first, second = (f"10.0.0.{n},tcp:80,10.0.0.{n}" for n in (1, 2))
    one, other = (ServicePortName("default", word, "http", "TCP") for word in ("one", "other"))
    steps = [  # who wants what, who wants it no more, and what is there then
        ([(first, one), (second, one)], [(first, None)], {first, second}),
        ([(second, other)], [(first, one), (second, one)], {second}),
        ([(first, one)], [(first, one), (first, other)], {second}),
        ([], [(second, other)], set()),
    ]
    try:
        kernel.create(name, IP_PORT_IP)
        kernel.add(name, [first])
        assert await sets.read() == {Item(SETS, HAIRPIN, first): MEMBER}
        for wanted, unwanted, there in steps:
            for member, owner in wanted:
                sets.put(Item(SETS, HAIRPIN, member, owner))
            for member, owner in unwanted:
                sets.drop(Item(SETS, HAIRPIN, member, owner))
            await sets.add_wanted()
            await sets.remove_unwanted()
            assert kernel.members(name) == there
    finally:
        await sets.aclose()
        kernel.close()
        destroy_sets(4)


async def test_the_canary_is_in_each_table(tables, ruleset):
    plan = cluster(ruleset.family, others=0)
    await proxier(tables, ruleset).sync(plan, set(plan.ports))
    there = parsed(await tables.save())
    assert {table for table, chain in there if chain == CANARY} == {"filter", "nat", "mangle"}


async def test_it_verifies_owners_against_the_kernel_and_mends_nothing(tables, ruleset):
    plan = cluster(ruleset.family)
    carrier = proxier(tables, ruleset)
    await carrier.sync(plan, set(plan.ports))
    owners = set(plan.ports)
    found = await carrier.verify(owners)
    assert (found.entries > len(owners), found.differences) == (True, ())
    some = next(iter(sorted(owners)))
    chain = f"KUBE-SVC-{suffix_of(some)}"
    output_of(tables.programs.plain, "-w", "-t", "nat", "-F", chain)
    output_of("ipset", "flush", set_name(CLUSTER_IPS, ruleset.family))
    entries = {d.entry.split()[1]: d.held for d in (await carrier.verify(owners)).differences}
    assert entries == {chain: "", CLUSTER_IPS: None}


async def test_a_client_goes_where_the_hash_of_its_address_says(tables, ruleset):
    family = ruleset.family
    vip = "10.96.0.77" if family == 4 else "fd00:10:96::77"
    output_of("ip", "route", "replace", f"{vip}/{32 if family == 4 else 128}", "dev", "lo")
    output_of("conntrack", "-F")
    clients = [a.split("/")[0] for a in (ADDRESSES if family == 4 else ADDRESSES6)]
    ports = [Endpoint(Address(clients[0], number)) for number in range(9001, 9008)]
    name = ServicePortName("default", "hashed", "", "UDP")
    port = ServicePort(name=name, cluster_ip=vip, port=80, scheduler="sh")
    plan = Plan()
    plan.put(name, plan_port(port, ports, Site(Place("here"), clients[0])))
    report = await proxier(tables, ruleset).sync(plan, {name})
    assert report.error is None
    assert report.unserved == ()
    [backends] = {route.from_node.pool for route in plan.ports[name].routes}
    for client in clients:
        for _ in range(4):
            with udp_client(vip, 80, client) as sock:
                sock.send(b"?")
    flows = list(Conntrack(family).flows([Frontend(vip, 80, "UDP")]))
    assert len(flows) == 4 * len(clients)
    found = {(flow.source.ip, flow.backend) for flow in flows}
    assert found == {(client, chosen(backends, name, client)) for client in clients}
