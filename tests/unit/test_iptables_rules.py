"""What one owner has in iptables, and the text of it."""

from collections import Counter
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from pyproxy.balancer import BY_CLIENT
from pyproxy.model import Address, Backend, Pool
from pyproxy.plan import plan_port
from pyproxy.rules.iptables import (
    ONE,
    Item,
    Ruleset,
    compile_owner,
    endpoint_chain,
    picks,
    probability,
    suffix_of,
)
from pyproxy.rules.iptables_base import ANTI_SPOOF, JUMPS, fixed_chains, jumps
from pyproxy.rules.iptables_layout import Layout, chains_of, read
from pyproxy.rules.iptables_text import cleared, founded, parsed, rewritten, target_of
from pyproxy.rules.iptables_tree import LEAVES, LONGEST_NAME, Leaf, digits_of, tree
from tests.builders import SITE, VIP, endpoint, owner, remote, service_port
from tests.iptables_cluster import cluster
from tests.trace.iptables import chosen

RULESET = Ruleset(4, pods=ip_network("10.244.0.0/16"))
SUFFIX = suffix_of(owner())
SVC, SVL, EXT, FW = (f"KUBE-{word}-{SUFFIX}" for word in ("SVC", "SVL", "EXT", "FW"))
AT_VIP = f"-d {VIP}/32 -p tcp -m tcp --dport 80"
LB = "203.0.113.5"
AT_LB = f"-d {LB}/32 -p tcp -m tcp --dport 80"


def items(*endpoints, ruleset=RULESET, site=SITE, **fields):
    found = sorted(endpoints, key=lambda e: str(e.address))
    return compile_owner(ruleset, plan_port(service_port(**fields), found, site), {})


def rules(found, table):
    """The rules that an owner has in shared chains of a table."""
    return {
        (item.chain, item.match): to
        for item, to in found.items()
        if item.table == table and item.match
    }


def chains(found):
    return {item.chain: lines for item, lines in found.items() if not item.match}


# --- names ----------------------------------------------------------------------------------------


def test_names_are_those_of_kube_proxy():
    port = owner("svc1", "p80", namespace="ns1")
    assert suffix_of(port) == "XPGD46QRK7WJZT7O"
    assert endpoint_chain(port, Address("10.180.0.1", 80)) == "KUBE-SEP-SXIVWICOYRO3J4NJ"


# --- frontends ------------------------------------------------------------------------------------


def test_a_cluster_ip_leads_to_its_endpoints():
    found = items(endpoint(1), remote(2))
    assert rules(found, "nat") == {("KUBE-SERVICES", AT_VIP): SVC}
    assert chains(found) == {
        SVC: (
            "-p tcp -m statistic --mode random --probability 0.50000000000 "
            "-j DNAT --to-destination 10.244.1.1:8080",
            '-p tcp -m comment --comment "default/web" -j DNAT --to-destination 10.244.1.2:8080',
        )
    }
    assert {item.match for item in found if item.table == "ipset"} == {
        f"{VIP},tcp:80",
        "10.244.1.1,tcp:8080,10.244.1.1",
    }


def test_a_service_is_named_where_names_are_wanted():
    found = items(endpoint(1), ruleset=structs.replace(RULESET, commented=False))
    assert chains(found) == {SVC: ("-p tcp -j DNAT --to-destination 10.244.1.1:8080",)}


def test_without_endpoints_a_service_is_refused():
    found = items(node_port=30080, load_balancer_ips=(LB,), source_ranges=("198.51.100.0/24",))
    note = '-m comment --comment "default/web has no endpoints"'
    refuse = "REJECT --reject-with icmp-port-unreachable"
    assert rules(found, "nat") == {}
    assert rules(found, "filter") == {
        ("KUBE-SERVICES", f"-d {VIP}/32 -p tcp {note} -m tcp --dport 80"): refuse,
        ("KUBE-EXTERNAL-SERVICES", f"-d {LB}/32 -p tcp {note} -m tcp --dport 80"): refuse,
        (
            "KUBE-EXTERNAL-SERVICES",
            f"-p tcp {note} -m tcp --dport 30080 -m addrtype --dst-type LOCAL",
        ): refuse,
    }


def test_external_connections_are_masqueraded():
    found = items(endpoint(1), node_port=30080)
    assert chains(found)[EXT] == ("-j KUBE-MARK-MASQ", f"-j {SVC}")
    assert rules(found, "nat")["KUBE-NODEPORTS", "-p tcp -m tcp --dport 30080"] == EXT


def test_policy_local_tells_origins_apart():
    found = items(endpoint(1), remote(2), node_port=30080, external_local=True)
    assert chains(found)[EXT] == (
        f"-s 10.244.0.0/16 -j {SVC}",
        "-m addrtype --src-type LOCAL -j KUBE-MARK-MASQ",
        f"-m addrtype --src-type LOCAL -j {SVC}",
        f"-j {SVL}",
    )
    assert len(chains(found)[SVL]) == 1
    assert rules(found, "filter") == {}


def test_policy_local_without_local_endpoints_drops_strangers_only():
    found = items(remote(2), load_balancer_ips=(LB,), external_local=True)
    assert chains(found)[EXT][-1] == f"-m addrtype --src-type LOCAL -j {SVC}"
    note = '-m comment --comment "default/web has no local endpoints"'
    dropped = ("KUBE-EXTERNAL-SERVICES", f"-d {LB}/32 -p tcp {note} -m tcp --dport 80")
    assert rules(found, "filter") == {dropped: "DROP"}


def test_without_a_way_to_tell_pods_they_are_strangers():
    site, blind = structs.replace(SITE, detects_pods=False), Ruleset(4)
    found = items(
        endpoint(1), remote(2), node_port=30080, external_local=True, site=site, ruleset=blind
    )
    assert chains(found)[EXT][0] == "-m addrtype --src-type LOCAL -j KUBE-MARK-MASQ"


def test_internal_policy_local_has_a_chain_beside_that_of_the_cluster():
    found = items(endpoint(1), remote(2), node_port=30080, internal_local=True)
    assert rules(found, "nat")["KUBE-SERVICES", AT_VIP] == SVL
    assert chains(found)[EXT] == ("-j KUBE-MARK-MASQ", f"-j {SVC}")
    assert (len(chains(found)[SVC]), len(chains(found)[SVL])) == (2, 1)


def test_source_ranges_guard_load_balancer_ips_only():
    found = items(
        endpoint(1), load_balancer_ips=(LB,), node_port=30080, source_ranges=("198.51.100.0/24",)
    )
    assert rules(found, "nat")["KUBE-SERVICES", AT_LB] == FW
    assert rules(found, "nat")["KUBE-NODEPORTS", "-p tcp -m tcp --dport 30080"] == EXT
    assert chains(found)[FW] == (f"-s 198.51.100.0/24 -j {EXT}",)
    assert rules(found, "filter") == {("KUBE-PROXY-FIREWALL", AT_LB): "DROP"}


def test_a_health_check_node_port_is_let_in():
    found = items(
        endpoint(1), load_balancer_ips=(LB,), external_local=True, health_check_node_port=31000
    )
    at_port = ("KUBE-NODEPORTS", "-p tcp -m tcp --dport 31000")
    assert rules(found, "filter") == {at_port: "ACCEPT"}


def test_affinity_has_a_chain_for_each_endpoint_that_remembers_clients():
    found = chains(items(endpoint(1), endpoint(2), affinity_seconds=60))
    one, two = (endpoint_chain(owner(), endpoint(n).address) for n in (1, 2))
    recent = "--mask 255.255.255.255 --rsource"
    assert found[SVC] == (
        f"-m recent --rcheck --seconds 60 --reap --name {one} {recent} -j {one}",
        f"-m recent --rcheck --seconds 60 --reap --name {two} {recent} -j {two}",
        f"-m statistic --mode random --probability 0.50000000000 -j {one}",
        f'-m comment --comment "default/web" -j {two}',
    )
    to = "-j DNAT --to-destination 10.244.1.1:8080"
    assert found[one] == (f"-p tcp -m recent --set --name {one} {recent} {to}",)


# --- shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        pytest.param(1, 1, "1.00000000000", id="all"),
        pytest.param(1, 2, "0.50000000000", id="half"),
        pytest.param(1, 3, "0.33333333349", id="as near as the kernel's steps are"),
        pytest.param(1, 1000, "0.00100000016", id="small"),
    ],
)
def test_probability(part, whole, text):
    assert probability(part, whole) == text


@given(st.integers(1, 1000), st.integers(0, 100_000))
def test_a_probability_is_a_number_of_steps(part, more):
    steps = float(probability(part, part + more)) * ONE
    assert abs(steps - round(steps)) < 0.1


def backends(*weights):
    return tuple(Backend(Address(f"10.0.0.{n}", 80), weight) for n, weight in enumerate(weights, 1))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=8))
def test_each_backend_has_the_share_of_its_weight(weights):
    left, shares = 1.0, []
    for match, _address in picks(Pool(backends(*weights)), owner()):
        part = float(match.split()[-1]) if "statistic" in match else 1.0
        shares.append(left * part)
        left -= left * part
    assert shares == pytest.approx([w / sum(weights) for w in weights], abs=1e-6)


def test_turns_are_counted():
    found = list(picks(Pool(backends(2, 1), "wrr"), owner(), "-m mark "))
    nth = "-m statistic --mode nth --every {} --packet 0 "
    assert found == [
        (nth.format(3), Address("10.0.0.1", 80)),
        (nth.format(2), Address("10.0.0.2", 80)),
        ("-m mark ", Address("10.0.0.1", 80)),
    ]


@pytest.mark.parametrize(
    ("weights", "word"),
    [
        pytest.param([1] * 300, "nth", id="a rule for each backend"),
        pytest.param([255, 1], "nth", id="256 rules"),
        pytest.param([256, 1], "random", id="more rules than a packet should walk"),
    ],
)
def test_a_long_turn_goes_by_chance(weights, word):
    numbered = tuple(Backend(Address(f"10.1.{n // 250}.{n % 250}", 80), w)
                     for n, w in enumerate(weights))  # fmt: skip
    *found, _last = picks(Pool(numbered, "wrr"), owner())
    assert all(f"--mode {word}" in match for match, _ in found)


@pytest.mark.parametrize("scheduler", sorted(BY_CLIENT))
@pytest.mark.parametrize(
    "clients", ["10.244.0.0/22", "10.0.0.0/8", "fd00:10:244::/118", "fd00::/16"]
)
def test_clients_are_spread_by_weight_and_keep_their_backend(clients, scheduler):
    network = ip_network(clients)
    step = network.num_addresses // 1024
    pool = Pool(backends(3, 1, 4), scheduler)
    if network.version == 6:
        found = tuple(
            Backend(Address(f"fd00::{n}", 80), b.weight) for n, b in enumerate(pool.backends)
        )
        pool = Pool(found, scheduler)
    counts = Counter(chosen(pool, owner(), str(network[step * n])) for n in range(1024))
    for backend in pool.backends:
        assert counts[backend.address] / 1024 == pytest.approx(backend.weight / 8, rel=0.25)


# --- the tree -------------------------------------------------------------------------------------

ips = st.one_of(st.ip_addresses(v=4), st.ip_addresses(network="10.96.0.0/22"))


def found_at(grown, ip, chain=""):
    """The rules that a packet to an address meets, as the kernel walks the chains."""
    met = []
    for rule in grown[chain]:
        word, prefix, *rest = rule.split()
        assert word == "-d"
        if ip in ip_network(prefix):
            met += found_at(grown, ip, rest[1]) if rest else [rule]
            if rest and rest[0] == "-g":
                break
    return met


@given(st.lists(ips, max_size=120), ips)
def test_a_packet_meets_its_rules_and_only_those(addresses, other):
    leaves = sorted(Leaf(digits_of(str(ip)), f"-d {ip}/32") for ip in addresses)
    grown = tree(leaves)
    for ip in {*addresses, other}:
        assert found_at(grown, ip) == [f"-d {ip}/32"] * addresses.count(ip)


@given(st.sets(st.ip_addresses(v=6) | st.ip_addresses(network="fd00::/112"), max_size=80))
def test_no_chain_of_different_addresses_is_long_and_no_name_either(addresses):
    grown = tree(sorted(Leaf(digits_of(str(ip)), f"-d {ip}/128") for ip in addresses))
    assert max(map(len, grown.values())) <= LEAVES
    assert max(map(len, grown)) <= LONGEST_NAME


def test_few_frontends_are_one_chain():
    leaves = sorted(Leaf(digits_of(f"10.0.0.{n}"), f"-d 10.0.0.{n}/32") for n in range(LEAVES))
    assert list(tree(leaves)) == [""]


# --- chains ---------------------------------------------------------------------------------------


def all_items(family):
    found = {}
    for port in cluster(family).ports.values():
        found |= compile_owner(Ruleset(family), port, {})
    return {item: content for item, content in found.items() if item.table != "ipset"}


@pytest.mark.parametrize("family", [4, 6])
def test_items_can_be_read_back_from_their_chains(family):
    wanted = all_items(family)
    fixed = fixed_chains(Ruleset(family))
    found = read(chains_of(Ruleset(family), wanted), fixed)
    ours = {item: to for item, to in found.items.items() if fixed_rule(item, fixed) is False}
    assert ours == wanted


def fixed_rule(item, fixed):
    before, after = fixed.get((item.table, item.chain), ((), ()))
    return any(rule.startswith(f"{item.match} -j ") for rule in (*before, *after) if item.match)


@pytest.mark.parametrize("family", [4, 6])
def test_one_item_less_changes_what_leaving_it_out_would(family):
    wanted = all_items(family)
    layout = Layout(Ruleset(family))
    for item, content in wanted.items():
        layout.put(item, content)
    before = {place: rules for place, rules in layout.take().items() if rules is not None}
    gone = next(item for item in wanted if item.chain == "KUBE-SERVICES" and item.table == "nat")
    layout.drop(gone)
    after = {p: rules for p, rules in (before | layout.take()).items() if rules is not None}
    assert after == chains_of(Ruleset(family), {i: c for i, c in wanted.items() if i != gone})


def test_branches_of_an_earlier_tree_go_with_what_they_led_to():
    """A start, or a full sync, may find a tree of which next to nothing is left."""
    branch = ("nat", "KUBE-T-0A60003")
    layout = Layout(RULESET, [branch, ("nat", "KUBE-SERVICES"), ("nat", "OTHERS")])
    found = layout.take()
    assert found[branch] is None
    assert ("nat", "OTHERS") not in found
    layout.put(Item("nat", "KUBE-SERVICES", "-d 10.96.0.1/32 -p tcp -m tcp --dport 80"), SVC)
    assert branch not in layout.take()


def test_what_leads_to_a_chain_is_found():
    layout = Layout(RULESET)
    found = items(endpoint(1), node_port=30080, affinity_seconds=60)
    for item, content in found.items():
        if item.table != "ipset":
            layout.put(item, content)
    sep = Item("nat", endpoint_chain(owner(), endpoint(1).address))
    assert {item.chain for item in layout.pointing_at([sep])} == {
        sep.chain, SVC, EXT, "KUBE-SERVICES", "KUBE-NODEPORTS",
    }  # fmt: skip


def test_node_ports_are_served_at_chosen_addresses():
    ruleset = Ruleset(4, node_port_ips=("192.0.2.11",))
    _before, after = fixed_chains(ruleset)["nat", "KUBE-SERVICES"]
    assert [rule.split()[:2] for rule in after] == [["-d", "192.0.2.11/32"]]


def test_node_ports_at_loopback_addresses_bring_the_rule_against_spoofing():
    assert jumps(Ruleset(4)) == JUMPS
    lines = founded({}, (), jumps(Ruleset(4, localhost_node_ports=True)))
    assert f"-A KUBE-FIREWALL {ANTI_SPOOF}" in lines


# --- text -----------------------------------------------------------------------------------------


def test_input_names_the_chain_of_each_line():
    lines = rewritten({("nat", "A"): ("-j B", "-j C"), ("nat", "D"): None, ("filter", "E"): ()})
    assert [line.text for line in lines] == [
        "*filter", ":E - [0:0]", "COMMIT",
        "*nat", ":A - [0:0]", ":D - [0:0]", "-A A -j B", "-A A -j C", "-X D", "COMMIT",
    ]  # fmt: skip
    assert lines[6].place == ("nat", "A")
    assert lines[6].rule == "-j B"


def test_what_is_there_is_not_added_again():
    there = parsed("*nat\n:OUTPUT ACCEPT [0:0]\n:A - [0:0]\n-A OUTPUT -j A\nCOMMIT\n")
    assert founded(there, [("nat", "A")], []) == []
    assert founded(there, [("nat", "B")], []) == ["*nat", ":B - [0:0]", "COMMIT"]


def test_clearing_removes_our_chains_and_the_jumps_to_them():
    there = parsed(
        "*nat\n:OUTPUT ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n:MINE - [0:0]\n"
        '-A OUTPUT -m comment --comment "not -j KUBE-SERVICES" -j MINE\n'
        '-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES\n'
        "COMMIT\n*filter\n:KUBE-FIREWALL - [0:0]\nCOMMIT\n"
    )
    assert cleared(there) == [
        "*nat",
        ":KUBE-SERVICES - [0:0]",
        '-D OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
        "-X KUBE-SERVICES",
        "COMMIT",
    ]


@pytest.mark.parametrize(
    ("rule", "target"),
    [
        pytest.param("-j DROP", "DROP", id="verdict"),
        pytest.param("-d 10.0.0.0/8 -g KUBE-T-0A", "KUBE-T-0A", id="goto"),
        pytest.param('-m comment --comment "a -j b" -j C', "C", id="in a comment"),
        pytest.param("-p tcp -j DNAT --to-destination 10.0.0.1:80", "DNAT", id="with options"),
        pytest.param("-p tcp", "", id="none"),
    ],
)
def test_target(rule, target):
    assert target_of(rule) == target
