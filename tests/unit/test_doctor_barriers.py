"""Which rules of others keep connections from us, as listings show them."""

from ipaddress import ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from pyproxy.doctor.barriers import of_iptables, of_nft
from pyproxy.doctor.facts import Barrier, Facts, Limits, Served
from pyproxy.doctor.shadows import covers, shadows
from pyproxy.model import Frontend

WEB = Served(Frontend("10.96.0.10", 80, "TCP"), "default/web")
NODE_PORT = Served(Frontend("", 30080, "TCP"), "default/web")
DNS = Served(Frontend("fd00:96::a", 53, "UDP"), "kube-system/dns")
SERVED = (WEB, NODE_PORT, DNS)


def saved(*rules, table="nat"):
    chains = dict.fromkeys(rule.split()[1] for rule in rules)
    declared = [f":{chain} - [0:0]" for chain in chains]
    return "\n".join([f"*{table}", *declared, *rules, "COMMIT", ""])


def hit(barriers, mode="nftables"):
    """Return the severity of each finding, and the frontends that it is about."""
    facts = Facts(mode, barriers=tuple(barriers), served=SERVED)
    return [(f.severity, [str(s.frontend) for s in SERVED if str(s.frontend) in f.what])
            for f in shadows(facts)]  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        pytest.param(
            ["-A PREROUTING -d 10.96.0.10/32 -p tcp -m tcp --dport 80 -j DNAT --to 1.2.3.4"],
            [("error", ["10.96.0.10:80/TCP"])], id="one frontend",
        ),
        pytest.param(
            ["-A PREROUTING -d 10.96.0.0/16 -j REDIRECT --to-ports 15001"],
            [("error", ["10.96.0.10:80/TCP"])], id="all Services",
        ),
        pytest.param(
            ["-A PREROUTING -p tcp -j MESH", "-A MESH -d 10.96.0.0/16 -j RETURN",
             "-A MESH -p tcp -m multiport --dports 79:81,443 -j REDIRECT --to-ports 1"],
            [("error", ["10.96.0.10:80/TCP"])], id="behind a jump",
        ),
        pytest.param(
            ["-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
             "-A DOCKER ! -i docker0 -p tcp -m tcp --dport 30080 -j DNAT --to 172.17.0.2:80"],
            [("warning", ["node:30080/TCP"])], id="a container has the node port",
        ),
        pytest.param(
            ["-A PREROUTING -d 10.96.0.10/32 -p udp -m udp --dport 80 -j DNAT --to 1.2.3.4"],
            [], id="another protocol",
        ),
        pytest.param(
            ["-A PREROUTING -d 10.96.0.10/32 -p tcp -m tcp --dport 81 -j DNAT --to 1.2.3.4"],
            [], id="another port",
        ),
        pytest.param(
            ["-A PREROUTING -s 192.0.2.0/24 -d 10.96.0.10/32 -j DNAT --to 1.2.3.4"],
            [("warning", ["10.96.0.10:80/TCP"])], id="some clients",
        ),
        pytest.param(
            ['-A PREROUTING -m comment --comment "a -j" -d 10.96.0.10/32 -j DNAT --to 1.2.3.4'],
            [("error", ["10.96.0.10:80/TCP"])], id="a comment says nothing",
        ),
        pytest.param(
            ["-A PREROUTING -j KUBE-SERVICES",
             "-A PREROUTING -d 10.96.0.10/32 -j DNAT --to 1.2.3.4"],
            [], id="after the jump to ours",
        ),
        pytest.param(
            ["-A KUBE-SVC-A -d 10.96.0.10/32 -j DNAT --to 1.2.3.4"], [],
            id="a chain that nothing leads to",
        ),
        pytest.param(["-A PREROUTING -j LOOP", "-A LOOP -j LOOP"], [], id="a loop ends"),
        pytest.param(["-A PREROUTING -j DNAT --to 1.2.3.4"], [], id="everything"),
    ],
)  # fmt: skip
def test_nat_of_iptables(rules, expected):
    assert hit(of_iptables(4, "nft", saved(*rules))) == expected


DROP = "-d 10.96.0.10/32 -p tcp -m tcp --dport 80 -j DROP"


@pytest.mark.parametrize(
    ("mode", "table", "chain", "seen"),
    [
        ("nftables", "raw", "PREROUTING", True),
        ("nftables", "filter", "INPUT", False),
        ("nftables", "filter", "OUTPUT", False),
        ("iptables", "mangle", "OUTPUT", True),
        ("ipvs", "filter", "INPUT", True),
        ("ipvs", "filter", "OUTPUT", False),
        ("userspace", "filter", "INPUT", True),
        ("userspace", "filter", "OUTPUT", True),
        ("userspace", "filter", "FORWARD", False),
    ],
)
def test_a_drop_counts_where_packets_still_have_the_services_address(mode, table, chain, seen):
    found = of_iptables(4, "nft", saved(f"-A {chain} {DROP}", table=table))
    assert bool(hit(found, mode)) is seen


def match(left, right, op="=="):
    return {"match": {"op": op, "left": left, "right": right}}


def field(protocol, name):
    return {"payload": {"protocol": protocol, "field": name}}


def table(*rules, family="ip", prio=-150, hook="prerouting"):
    chain = {"family": family, "table": "fw", "name": "first", "hook": hook, "prio": prio}
    named = [{"rule": {"chain": "first", "expr": list(rule)}} for rule in rules]
    return of_nft([{"metainfo": {}}, {"chain": chain}, *named])


DADDR, DPORT = field("ip", "daddr"), field("tcp", "dport")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        pytest.param(
            [match(DADDR, "10.96.0.10"), match(DPORT, 80), {"counter": {}}, {"drop": None}],
            [("error", ["10.96.0.10:80/TCP"])], id="drop",
        ),
        pytest.param(
            [match(DADDR, {"prefix": {"addr": "10.96.0.0", "len": 16}}),
             {"dnat": {"addr": "1.2.3.4"}}],
            [("error", ["10.96.0.10:80/TCP"])], id="a range of addresses",
        ),
        pytest.param(
            [match(DADDR, {"set": ["10.96.0.9", {"range": ["10.96.0.10", "10.96.0.12"]}]}),
             {"reject": {"type": "tcp reset"}}],
            [("error", ["10.96.0.10:80/TCP"])], id="a set",
        ),
        pytest.param(
            [match({"fib": {"result": "type", "flags": ["daddr"]}}, "local"),
             match(DPORT, {"range": [30000, 30100]}), {"redirect": {"port": 1}}],
            [("error", ["node:30080/TCP"])], id="node ports",
        ),
        pytest.param(
            [match({"meta": {"key": "iifname"}}, "eth0"), match(DPORT, {"set": [80, 30080]}),
             {"drop": None}],
            [("warning", ["10.96.0.10:80/TCP", "node:30080/TCP"])], id="one interface",
        ),
        pytest.param(
            [match(DADDR, "@blocked"), {"drop": None}], [], id="a named set: not known",
        ),
        pytest.param(
            [match(DADDR, "10.96.0.10", "!="), match(DPORT, 80), {"drop": None}],
            [("warning", ["10.96.0.10:80/TCP"])], id="all but some",
        ),
        pytest.param(
            [match({"meta": {"key": "l4proto"}}, "udp"), match(field("th", "dport"), 80),
             {"drop": None}],
            [], id="another protocol",
        ),
        pytest.param([match(DADDR, "10.96.0.10"), {"accept": None}], [], id="no verdict of ours"),
    ],
)  # fmt: skip
def test_rules_of_nft(rule, expected):
    assert hit(table(rule)) == expected


def test_a_table_of_both_families_counts_for_both():
    found = table([match(field("udp", "dport"), 53), {"drop": None}], family="inet")
    assert [barrier.family for barrier in found] == [4, 6]
    assert [frontends for _, frontends in hit(found)] == [["[fd00:96::a]:53/UDP"]]


def test_rules_behind_ours_do_no_harm():
    assert hit(table([match(DPORT, 80), {"drop": None}], prio=0)) == []


def test_evidence_names_table_chain_and_rule():
    facts = Facts("nftables", barriers=tuple(table([match(DADDR, "10.96.0.10"), {"drop": None}])),
                  served=SERVED)  # fmt: skip
    (finding,) = shadows(facts)
    assert finding.evidence == "nft table ip fw, chain first: ip daddr 10.96.0.10 drop"
    assert finding.what.endswith("drops connections to 10.96.0.10:80/TCP (default/web)")


def test_many_frontends_are_counted():
    many = tuple(Served(Frontend("10.96.0.1", port, "TCP"), "default/many") for port in range(9))
    facts = Facts("nftables", barriers=tuple(table([match(DADDR, "10.96.0.1"), {"drop": None}])))
    (finding,) = shadows(replace(facts, served=many))
    assert finding.what.endswith("and 6 more")


def test_a_policy_is_about_nobody():
    barrier = Barrier(4, "prerouting", -300, "drop", Limits(protocols=("TCP",)), "", "")
    assert not covers(barrier, WEB)
    narrowed = barrier._replace(limits=Limits(destinations=(ip_network("10.96.0.10/32"),)))
    assert covers(narrowed, WEB)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        pytest.param("-d 10.0.0.0/255.0.0.255 -p tcp -m tcp --dport 80 -j DROP", "some", id="mask"),
        pytest.param("-p tcp -m tcp --dport http -j DROP", None, id="a port's name"),
        pytest.param("-m comment --comment don't -d 10.96.0.10/32 -j DROP", "drops", id="quote"),
    ],
)
def test_what_is_odd_in_one_rule_does_not_hide_the_others(rule, text):
    more = "-A PREROUTING -p tcp -m tcp --dport 30080 -j DROP"
    barriers = of_iptables(4, "nft", saved(f"-A PREROUTING {rule}", more, table="raw"))
    found = [f.what for f in shadows(Facts("nftables", barriers=tuple(barriers), served=SERVED))]
    assert any("node:30080/TCP" in what for what in found)
    assert text is None or any(text in what and "10.96.0.10" in what for what in found)


words = st.sampled_from(
    ["-d", "10.96.0.0/16", "!", "-p", "tcp", "--dport", "80", "79:", ":81", "1:2:3", "-m",
     "multiport", "--dports", "80,443", "-j", "DNAT", "DROP", "LOOP", "--comment", "'", '"', "\\",
     "--dst-type", "LOCAL"]
)  # fmt: skip


@given(st.lists(st.lists(words | st.text(max_size=8), max_size=9), max_size=5))
@example([["--comment", "\x1e*"]])  # no end of a line
def test_no_listing_is_too_odd_to_be_read(rules):
    lines = [f"-A PREROUTING {' '.join(rule)}".replace("\n", " ") for rule in rules]
    text = "\n".join(["*nat", ":PREROUTING - [0:0]", ":LOOP - [0:0]", *lines, "-A LOOP -j LOOP"])
    for barrier in of_iptables(4, "nft", text):
        assert barrier.where == "iptables (nft) IPv4 nat PREROUTING"
        assert all(first >= 0 for first, _last in barrier.limits.ports or ())


json_values = st.recursive(
    st.none() | st.integers(-1, 70000) | st.sampled_from(["tcp", "10.96.0.10", "@set", "local"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["set", "range", "prefix", "addr", "len", "x"]), inner)
    ),
    max_leaves=6,
)


@given(st.sampled_from([DADDR, DPORT, {"meta": {"key": "l4proto"}}, {"x": 1}, "y"]), json_values)
def test_no_match_of_nft_is_too_odd_to_be_read(left, right):
    (barrier,) = table([match(left, right), {"drop": None}])
    assert barrier.kind == "drop"
