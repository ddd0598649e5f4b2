from ipaddress import ip_network

import pytest
from msgspec.structs import replace

from pyproxy.config import (
    GATES,
    IPVS,
    Config,
    ConfigError,
    IPTables,
    NFTables,
    NodeIPs,
    detect_node_ips,
    file_name,
    gate,
    local_cidr,
    masquerade_all,
    node_name,
    node_port_cidrs,
    setting,
    sync_periods,
    with_defaults,
    with_mode,
    with_setting,
)
from pyproxy.model import Node


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("cluster_cidr", "clusterCIDR"),
        ("exclude_cidrs", "excludeCIDRs"),
        ("strict_arp", "strictARP"),
        ("enable_dsr", "enableDSR"),
        ("source_vip", "sourceVip"),
        ("oom_score_adj", "oomScoreAdj"),
        ("udp_timeout_seconds", "udpTimeout"),
        ("iptables", "iptables"),
    ],
)
def test_a_field_has_the_name_of_the_file(field, name):
    assert file_name(field) == name


def test_a_value_at_a_path_can_be_replaced():
    config = with_setting(Config(), "conntrack.min", 5)
    assert setting(config, "conntrack.min") == 5
    assert with_setting(config, "conntrack.min", 131072) == Config()


# --- defaults -----------------------------------------------------------------------------------


def test_the_defaults_are_complete():
    assert with_defaults(Config()) == Config()


@pytest.mark.parametrize(
    ("path", "empty"),
    [
        ("client_connection.content_type", ""),
        ("client_connection.qps", 0.0),
        ("client_connection.burst", 0),
        ("logging.format", ""),
        ("logging.flush_frequency_seconds", 0.0),
        ("bind_address", ""),
        ("healthz_bind_address", ""),
        ("metrics_bind_address", ""),
        ("mode", ""),
        ("iptables.sync_period_seconds", 0.0),
        ("iptables.min_sync_period_seconds", 0.0),
        ("ipvs.sync_period_seconds", 0.0),
        ("nftables.sync_period_seconds", 0.0),
        ("nftables.min_sync_period_seconds", 0.0),
        ("detect_local_mode", ""),
        ("config_sync_period_seconds", 0.0),
    ],
)
def test_nothing_means_the_default(path, empty):
    assert with_defaults(with_setting(Config(), path, empty)) == Config()


@pytest.mark.parametrize(
    ("path", "empty"),
    [
        ("ipvs.min_sync_period_seconds", 0.0),
        ("conntrack.max_per_core", 0),
        ("conntrack.tcp_established_timeout_seconds", 0.0),
        ("oom_score_adj", 0),
        ("iptables.masquerade_bit", 0),
        ("iptables.localhost_node_ports", False),
    ],
)
def test_zero_stays_where_it_means_something(path, empty):
    config = with_setting(Config(), path, empty)
    assert with_defaults(config) == config


@pytest.mark.parametrize(
    ("bind", "healthz", "metrics", "expected"),
    [
        pytest.param("", "", "", ("0.0.0.0:10256", "127.0.0.1:10249"), id="nothing"),
        pytest.param("10.0.0.1", "", "", ("0.0.0.0:10256", "127.0.0.1:10249"), id="IPv4"),
        pytest.param("fd00::1", "", "", ("[::]:10256", "[::1]:10249"), id="IPv6"),
        pytest.param("", "127.0.0.1", "::1", ("127.0.0.1:10256", "[::1]:10249"), id="E104 bare IP"),
        pytest.param("::", "1.2.3.4:5", "[::]:6", ("1.2.3.4:5", "[::]:6"), id="given"),
        pytest.param("", "here", "there:1", ("here", "there:1"), id="what is wrong stays"),
    ],
)
def test_the_server_addresses_follow_from_the_bind_address(bind, healthz, metrics, expected):
    config = Config(bind_address=bind, healthz_bind_address=healthz, metrics_bind_address=metrics)
    config = with_defaults(config)
    assert (config.healthz_bind_address, config.metrics_bind_address) == expected


@pytest.mark.parametrize(
    ("mode", "given", "expected"),
    [
        pytest.param("nftables", (), ("primary",), id="nftables keeps to the node's own addresses"),
        pytest.param("nftables", ("10.0.0.0/8",), ("10.0.0.0/8",), id="unless told otherwise"),
        pytest.param("ipvs", (), ("primary",), id="ipvs does what nftables does"),
        pytest.param("ipvs", ("::/0",), ("::/0",), id="ipvs told otherwise"),
        pytest.param("iptables", (), (), id="iptables serves all"),
        pytest.param("userspace", (), (), id="userspace serves all"),
    ],
)
def test_node_port_addresses_depend_on_the_mode(mode, given, expected):
    config = with_mode(Config(node_port_addresses=given), mode)
    assert config == Config(mode=mode, node_port_addresses=expected)


# --- feature gates ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gates", "on"),
    [
        ("AllowServiceExternalIPs", {}, True),
        ("AllowServiceExternalIPs", {"AllowServiceExternalIPs": False}, False),
        ("PreferSameTrafficDistribution", {}, True),
        ("NativeHistograms", {}, False),
        ("NativeHistograms", {"NativeHistograms": True}, True),
        pytest.param("NativeHistograms", {"AllAlpha": True}, True, id="all alpha"),
        pytest.param(
            "NativeHistograms", {"AllAlpha": True, "NativeHistograms": False}, False, id="but one"
        ),
        pytest.param("ComponentFlagz", {"AllBeta": False}, False, id="no beta"),
        pytest.param("AllowServiceExternalIPs", {"AllBeta": False}, True, id="stable is not beta"),
        ("AllAlpha", {}, False),
    ],
)
def test_a_gate_is_as_set_or_as_its_stage(name, gates, on):
    assert gate(Config(feature_gates=gates), name) is on


def test_locked_gates_are_on():
    assert {known.default for known in GATES.values() if known.stage == "locked"} == {True}


# --- decisions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "hostname", "name"),
    [
        ("", "Node-A", "node-a"),
        (" Other ", "node-a", "other"),
        ("", " node-a\n", "node-a"),
    ],
)
def test_the_node_is_named_by_the_override_or_the_host(override, hostname, name):
    assert node_name(Config(hostname_override=override), hostname) == name


@pytest.mark.parametrize(
    ("override", "hostname", "field"), [("  ", "node-a", "hostnameOverride"), ("", " ", "hostname")]
)
def test_a_node_without_a_name_cannot_be_served(override, hostname, field):
    with pytest.raises(ConfigError, match=f"^{field}: the name of this node is empty$"):
        node_name(Config(hostname_override=override), hostname)


BLOCKS = Config(
    iptables=IPTables(masquerade_all=True, sync_period_seconds=11.0, min_sync_period_seconds=1.1),
    nftables=NFTables(sync_period_seconds=22.0, min_sync_period_seconds=2.2),
    ipvs=IPVS(sync_period_seconds=33.0, min_sync_period_seconds=3.3),
)


@pytest.mark.parametrize(
    ("mode", "periods", "masquerade"),
    [
        ("iptables", (11.0, 1.1), True),
        ("userspace", (11.0, 0.0), True),
        ("nftables", (22.0, 2.2), False),
        ("ipvs", (33.0, 3.3), True),
    ],
)
def test_a_mode_has_its_own_block(mode, periods, masquerade):
    assert sync_periods(BLOCKS, mode) == periods
    assert masquerade_all(BLOCKS, mode) is masquerade


@pytest.mark.parametrize(
    ("bind", "known", "expected"),
    [
        pytest.param("0.0.0.0", [], NodeIPs(4, "127.0.0.1", "::1"), id="E109 nothing known"),
        pytest.param("0.0.0.0", ["10.0.0.1"], NodeIPs(4, "10.0.0.1", "::1"), id="IPv4"),
        pytest.param("0.0.0.0", ["fd00::1"], NodeIPs(6, "127.0.0.1", "fd00::1"), id="E109 IPv6"),
        pytest.param(
            "0.0.0.0", ["10.0.0.1", "fd00::1"], NodeIPs(4, "10.0.0.1", "fd00::1"), id="dual"
        ),
        pytest.param(
            "0.0.0.0", ["fd00::1", "10.0.0.1"], NodeIPs(6, "10.0.0.1", "fd00::1"), id="IPv6 first"
        ),
        pytest.param(
            "0.0.0.0", ["10.0.0.1", "10.0.0.2"], NodeIPs(4, "10.0.0.1", "::1"), id="first counts"
        ),
        pytest.param(
            "::1", ["10.0.0.1", "fd00::1"], NodeIPs(6, "10.0.0.1", "::1"), id="E109 bind ::1"
        ),
        pytest.param("10.9.9.9", ["fd00::1"], NodeIPs(4, "10.9.9.9", "fd00::1"), id="bind IPv4"),
        pytest.param("::", ["10.0.0.1"], NodeIPs(4, "10.0.0.1", "::1"), id="bind to all"),
    ],
)
def test_the_bind_address_wins_over_those_of_the_node(bind, known, expected):
    assert detect_node_ips(Config(bind_address=bind), known) == expected


@pytest.mark.parametrize(
    ("addresses", "family", "expected"),
    [
        pytest.param((), 4, None, id="unset is all"),
        pytest.param(("10.0.0.0/8",), 4, ("10.0.0.0/8",), id="a list"),
        pytest.param(("10.1.2.3/8",), 4, ("10.0.0.0/8",), id="host bits do not count"),
        pytest.param(("10.0.0.0/8",), 6, None, id="none of the family is all of it"),
        pytest.param(("10.0.0.0/8", "0.0.0.0/0"), 4, None, id="zero makes it all"),
        pytest.param(("::/0", "10.0.0.0/8"), 4, ("10.0.0.0/8",), id="zero of the other family"),
        pytest.param(("10.0.0.0/8", "fd00::/8"), 6, ("fd00::/8",), id="by family"),
        pytest.param(("primary",), 4, ("192.0.2.7/32",), id="primary"),
        pytest.param(("primary",), 6, ("fd00::7/128",), id="primary IPv6"),
    ],
)
def test_node_ports_answer_in_ranges(addresses, family, expected):
    config = Config(node_port_addresses=addresses)
    networks = None if expected is None else tuple(map(ip_network, expected))
    assert node_port_cidrs(config, family, ("192.0.2.7", "192.0.2.8", "fd00::7")) == networks


@pytest.mark.parametrize("ips", [(), ("127.0.0.1", "::1")], ids=["none", "placeholders"])
@pytest.mark.parametrize("family", [4, 6])
def test_primary_without_an_address_is_all_of_them(ips, family):
    assert node_port_cidrs(Config(node_port_addresses=("primary",)), family, ips) is None


NODE = Node("a", pod_cidrs=("10.244.1.0/24", "fd00:244:1::/64", "10.244.9.0/24"))


@pytest.mark.parametrize(
    ("mode", "cluster_cidr", "family", "expected"),
    [
        ("ClusterCIDR", "10.0.0.0/8,fd00::/8", 4, "10.0.0.0/8"),
        ("ClusterCIDR", "10.0.0.0/8,fd00::/8", 6, "fd00::/8"),
        pytest.param("ClusterCIDR", "fd00::/8,10.0.0.0/8", 4, "10.0.0.0/8", id="E110 any order"),
        pytest.param("ClusterCIDR", "10.0.0.0/8", 6, None, id="other family"),
        pytest.param("ClusterCIDR", "", 4, None, id="not set"),
        pytest.param("NodeCIDR", "10.0.0.0/8", 4, "10.244.1.0/24", id="the node's first"),
        pytest.param("NodeCIDR", "", 6, "fd00:244:1::/64", id="the node's IPv6"),
        pytest.param("BridgeInterface", "10.0.0.0/8", 4, None, id="not by range"),
        pytest.param("InterfaceNamePrefix", "10.0.0.0/8", 4, None, id="not by range either"),
    ],
)
def test_local_pods_are_in_a_range(mode, cluster_cidr, family, expected):
    config = Config(detect_local_mode=mode, cluster_cidr=cluster_cidr)
    network = None if expected is None else ip_network(expected)
    assert local_cidr(config, family, NODE) == network


def test_without_a_node_there_is_no_range_of_it():
    assert local_cidr(replace(Config(), detect_local_mode="NodeCIDR"), 4, None) is None
