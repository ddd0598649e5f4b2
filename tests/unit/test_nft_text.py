from ipaddress import IPv6Address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyproxy.model import Address
from pyproxy.rules.nft import (
    Chain,
    Counter,
    Dnat,
    DnatPick,
    Element,
    Hook,
    Masquerade,
    MatchDnat,
    MatchFamily,
    MatchFragment,
    MatchInput,
    MatchLocal,
    MatchMark,
    MatchNetwork,
    MatchPriority,
    MatchProto,
    MatchSet,
    MatchState,
    MatchSyn,
    MatchTransparent,
    Pick,
    PickVerdict,
    Readdress,
    Reject,
    Rule,
    Set,
    SetMark,
    Table,
    TakeFrame,
    ToggleMark,
    UpdateMap,
    UpdateSet,
    Verdict,
    VerdictMap,
    clipped,
    key_length,
    key_text,
    packed_ip,
    packed_key,
    packed_slot,
    unpacked_key,
)
from pyproxy.rules.nft_text import rule_text, statement_text, text
from tests.nft_ruleset import key_interval, ruleset

IP, IP6 = Table(4, "pyproxy"), Table(6, "pyproxy")
FRONTEND = ("ipv4_addr", "inet_proto", "inet_service")
ENDPOINT = ("daddr", "l4proto", "dport")


@pytest.mark.parametrize(
    ("types", "values", "packed", "printed"),
    [
        pytest.param(
            FRONTEND,
            ("10.96.0.1", "TCP", 80),
            "0a600001 06000000 00500000",
            "10.96.0.1 . tcp . 80",
            id="each field is filled up to four bytes",
        ),
        pytest.param(
            ("ipv6_addr", "inet_proto", "inet_service"),
            ("fd00:96::1", "SCTP", 65535),
            "fd000096000000000000000000000001 84000000 ffff0000",
            "fd00:96::1 . sctp . 65535",
            id="IPv6",
        ),
        pytest.param(("inet_service",), (443,), "01bb", "443", id="a single field is not filled"),
        pytest.param(("inet_proto",), ("UDP",), "11", "udp", id="a protocol is one byte"),
        pytest.param(
            ("inet_proto", "inet_service"), (47, 1), "2f000000 00010000", "47 . 1", id="unknown"
        ),
    ],
)
def test_a_key_has_bytes_and_a_text(types, values, packed, printed):
    key = bytes.fromhex(packed)
    assert packed_key(types, values) == key
    assert unpacked_key(types, key) == values
    assert key_text(types, key) == printed
    assert key_length(types) == len(key)


@pytest.mark.parametrize("number", [0, 3, 255, 256, 70_000])
def test_a_slot_has_the_byte_order_of_the_host(number):
    types = (*FRONTEND, "slot")
    frontend = packed_key(FRONTEND, ("10.96.0.1", "TCP", 80))
    key = frontend + packed_slot(number)
    assert key == packed_key(types, ("10.96.0.1", "TCP", 80, number))
    assert memoryview(key[-4:]).cast("I")[0] == number
    assert key_text(types, key) == f"10.96.0.1 . tcp . 80 . {number}"


@pytest.mark.parametrize(
    ("source", "first", "last", "printed"),
    [
        pytest.param("192.0.2.0/24", "192.0.2.0", "192.0.2.255", "192.0.2.0/24", id="network"),
        pytest.param("192.0.2.7/32", "192.0.2.7", "192.0.2.7", "192.0.2.7", id="one address"),
        pytest.param("0.0.0.0/0", "0.0.0.0", "255.255.255.255", "0.0.0.0/0", id="all"),
        pytest.param("fd00::/9", "fd00::", "fd7f" + ":ffff" * 7, "fd00::/9", id="IPv6"),
    ],
)
def test_a_network_is_an_interval_of_keys(source, first, last, printed):
    network = ip_network(source)
    types = ("inet_service", "ipv4_addr" if network.version == 4 else "ipv6_addr")
    interval = key_interval(types, (80, network))
    assert interval == (packed_key(types, (80, first)), packed_key(types, (80, last)))
    assert key_text(types, *interval) == f"80 . {printed}"


def test_an_interval_that_is_no_network_has_both_its_ends():
    types = ("inet_service", "ipv4_addr")
    first, last = packed_key(types, (80, "10.0.0.1")), packed_key(types, (90, "10.0.0.4"))
    assert key_text(types, first, last) == "80-90 . 10.0.0.1-10.0.0.4"


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (MatchNetwork("saddr", ip_network("10.0.0.0/8")), "ip saddr 10.0.0.0/8"),
        (MatchNetwork("daddr", ip_network("10.0.0.1/32"), inside=False), "ip daddr != 10.0.0.1"),
        (MatchSet(("daddr",), "cluster-ips"), "ip daddr @cluster-ips"),
        (MatchSet(("daddr", "dport"), "x", inside=False), "ip daddr . th dport != @x"),
        (MatchInput("cali*", same=False), 'iifname != "cali*"'),
        (MatchInput("cni0"), 'iifname "cni0"'),
        (MatchLocal("daddr"), "fib daddr type local"),
        (MatchState("new"), "ct state new"),
        (MatchDnat(), "ct status dnat"),
        (MatchTransparent(), "socket transparent 1"),
        (MatchMark(0x4000), "meta mark and 0x4000 == 0x4000"),
        (MatchProto("SCTP"), "meta l4proto sctp"),
        (SetMark(0x4000), "meta mark set mark or 0x4000"),
        (ToggleMark(0x4000), "meta mark set mark xor 0x4000"),
        (Dnat(Address("10.0.0.1", 80)), "dnat to 10.0.0.1:80"),
        (UpdateSet("affinity", "saddr"), "update @affinity { ip saddr }"),
        (Reject(), "reject"),
        (Reject(reset=True), "reject with tcp reset"),
        (MatchSyn(), "tcp flags & (syn | ack) == syn"),
        (MatchFamily(), "meta protocol ip"),
        (MatchPriority(0x7079000A), "meta priority 7079:a"),
        (MatchFragment("first"), "ip frag-off & 0x3fff == 0x2000"),
        (MatchFragment("later"), "ip frag-off & 0x1fff != 0x0"),
        (
            UpdateMap(("saddr", "sport"), "m", "ether saddr", 90),
            "update @m { ip saddr . th sport timeout 90s : ether saddr }",
        ),
        (Readdress(("saddr", "id"), "m"), "ether daddr set ip saddr . ip id map @m"),
        (TakeFrame(), "meta pkttype set host"),
        (Masquerade(), "masquerade fully-random"),
        (Counter(), "counter"),
        (Verdict("drop"), "drop"),
        (Verdict("goto", "pick-3"), "goto pick-3"),
        (VerdictMap(ENDPOINT, "m"), "ip daddr . meta l4proto . th dport vmap @m"),
        (
            PickVerdict(Pick("random", 2), (Verdict("goto", "a"), Verdict("drop"))),
            "numgen random mod 2 vmap { 0 : goto a, 1 : drop }",
        ),
        (
            DnatPick(("l4proto", "dport"), Pick("turn", 3), "m"),
            "dnat ip to meta l4proto . th dport . numgen inc mod 3 map @m",
        ),
    ],
)
def test_a_statement_is_written_as_nft_reads_it(statement, words):
    assert statement_text(IP, statement) == words


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (MatchNetwork("saddr", ip_network("fd00::/8")), "ip6 saddr fd00::/8"),
        (Dnat(Address("fd00::1", 80)), "dnat to [fd00::1]:80"),
        (MatchFamily(), "meta protocol ip6"),
        (MatchFragment("later"), "ip6 nexthdr ipv6-frag @nh,336,16 & 0xfff8 != 0x0"),
        (Readdress(("saddr", "id"), "m"), "ether daddr set ip6 saddr . frag id map @m"),
        (
            DnatPick(("daddr",), Pick("source", 3, seed=0xAB), "m"),
            "dnat ip6 to ip6 daddr . jhash ip6 saddr mod 3 seed 0xab map @m",
        ),
    ],
)
def test_a_statement_says_its_family(statement, words):
    assert statement_text(IP6, statement) == words


def test_a_rule_ends_in_its_comment():
    assert rule_text(IP, Rule("refuse", (MatchState("new"), Reject()), "why")) == (
        'ct state new reject comment "why"'
    )


def test_a_table_is_replaced_as_a_whole_and_reads_like_a_listing():
    pick = DnatPick(ENDPOINT, Pick("random", 2), "endpoints")
    front = packed_key(FRONTEND, ("10.96.0.1", "TCP", 80))
    target = ("ipv4_addr", "inet_service")
    written = text(
        Table(4, "pyproxy", "rules for Services"),
        [Chain("pick-2"), Chain("nat-output", Hook("nat", "output", -100))],
        [
            Set("service-ips", FRONTEND, "verdict"),
            Set("endpoints", (*FRONTEND, "slot"), target),
            Set("seen", ("ipv4_addr",), flags=("dynamic", "timeout"), timeout_seconds=60, size=9),
        ],
        [Rule("nat-output", (VerdictMap(ENDPOINT, "service-ips"),)), Rule("pick-2", (pick,))],
        {
            "service-ips": [Element(front, data=Verdict("goto", "pick-2"), comment="default/web")],
            "endpoints": [
                Element(front + packed_slot(256), data=packed_key(target, ("10.0.0.2", 80))),
                Element(front + packed_slot(1), data=packed_key(target, ("10.0.0.1", 80))),
            ],
        },
    )
    assert written.expandtabs(2).splitlines() == [
        "add table ip pyproxy",
        "delete table ip pyproxy",
        "table ip pyproxy {",
        '  comment "rules for Services"',
        "",
        "  map service-ips {",
        "    type ipv4_addr . inet_proto . inet_service : verdict",
        "    elements = {",
        '      10.96.0.1 . tcp . 80 comment "default/web" : goto pick-2',
        "    }",
        "  }",
        "",
        "  map endpoints {",
        "    typeof ip daddr . meta l4proto . th dport . meta cpu : ip daddr . th dport",
        "    elements = {",
        "      10.96.0.1 . tcp . 80 . 1 : 10.0.0.1 . 80,",
        "      10.96.0.1 . tcp . 80 . 256 : 10.0.0.2 . 80",
        "    }",
        "  }",
        "",
        "  set seen {",
        "    type ipv4_addr",
        "    size 9",
        "    flags dynamic,timeout",
        "    timeout 60s",
        "  }",
        "",
        "  chain pick-2 {",
        "    dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 2 map @endpoints",
        "  }",
        "",
        "  chain nat-output {",
        "    type nat hook output priority -100; policy accept;",
        "    ip daddr . meta l4proto . th dport vmap @service-ips",
        "  }",
        "}",
    ]


def test_an_empty_table_is_a_table():
    assert text(IP, [], [], [], {}).split() == [
        "add",
        "table",
        "ip",
        "pyproxy",
        "delete",
        "table",
        "ip",
        "pyproxy",
        "table",
        "ip",
        "pyproxy",
        "{",
        "}",
    ]


@pytest.mark.parametrize("family", [4, 6])
def test_the_order_of_elements_does_not_matter(family):
    rules = ruleset(family)
    turned = {name: list(reversed(some)) for name, some in rules.elements.items()}
    assert text(*rules._replace(elements=turned)) == text(*rules)


@pytest.mark.parametrize(
    ("comment", "kept"),
    [
        pytest.param("default/web:http", "default/web:http", id="as it is"),
        pytest.param('a "b"', "a 'b'", id="nft has no way to write a quotation mark"),
        pytest.param("x" * 200, "x" * 127, id="too long"),
        pytest.param("é" * 100, "é" * 63, id="not cut within a character"),
    ],
)
def test_a_comment_is_what_nft_can_read(comment, kept):
    assert clipped(comment) == kept


@given(st.lists(st.sampled_from([0, 1, 0xA0, 0xFD00, 0xFFFF]), min_size=8, max_size=8))
def test_addresses_are_packed_as_they_are_written(groups):
    address = IPv6Address(b"".join(group.to_bytes(2, "big") for group in groups))
    assert packed_ip(str(address)) == address.packed


def test_addresses_are_packed_in_any_way_of_writing_that_is_canonical_somewhere():
    assert packed_ip("::ffff:192.0.2.1") == IPv6Address("::ffff:192.0.2.1").packed
    assert packed_ip("192.0.2.1") == bytes([192, 0, 2, 1])
