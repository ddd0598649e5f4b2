"""What a move between modes decides before it changes anything, and what it tries."""

import pytest

from pyproxy import cli
from pyproxy.config import Config
from pyproxy.migration import DETOUR, Probe, Request, Situation, evenly, obstacle, sample, way
from pyproxy.model import Address, Backend, Forward, Frontend, Pool, PortPlan, Reject, Route
from pyproxy.plan import Plan
from pyproxy.rules.iptables_text import parsed, silenced, woken
from tests.builders import owner

SAVED = """\
*nat
:PREROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
:MINE - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -j MINE
-A PREROUTING -i eth0 -j KUBE-SERVICES
-A KUBE-SERVICES -j KUBE-POSTROUTING
COMMIT
*filter
:INPUT ACCEPT [0:0]
-A INPUT -j ACCEPT
COMMIT
"""
PORTALS = 'PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES'


def test_to_silence_chains_is_to_remove_the_jumps_from_others_chains():
    lines = ["*nat", f"-D {PORTALS}", "-D PREROUTING -i eth0 -j KUBE-SERVICES", "COMMIT"]
    assert silenced(parsed(SAVED)) == lines


def test_to_wake_them_puts_the_jumps_in_front_in_their_order():
    lines = ["*nat", "-I PREROUTING -i eth0 -j KUBE-SERVICES", f"-I {PORTALS}", "COMMIT"]
    assert woken(parsed(SAVED)) == lines


@pytest.mark.parametrize(
    ("to", "then_run", "running", "why"),
    [
        pytest.param("nftables", False, None, None, id="rules alone"),
        pytest.param("nftables", False, "iptables", None, id="beside another mode"),
        pytest.param("nftables", False, "", None, id="beside one that does not tell"),
        pytest.param("nftables", False, "nftables", "a proxy in mode nftables", id="the same"),
        pytest.param("nftables", True, "iptables", "a proxy in mode iptables", id="its ports"),
        pytest.param("nftables", True, "", "a proxy runs here, on the ports", id="unknown"),
        pytest.param("userspace", False, None, "mode userspace lives in", id="nobody serves"),
        pytest.param("userspace", True, None, None, id="userspace stays"),
    ],
)
def test_a_move_that_cannot_be_is_refused_before_anything_changes(to, then_run, running, why):
    found = obstacle(Request(to, then_run, False, 20), Situation((), running))
    assert (found is None) is (why is None)
    assert (found or "").startswith(why or "")


def test_connections_of_virtual_servers_are_waited_for_on_the_way_to_sockets():
    now = Situation((), None, held=3)
    assert obstacle(Request("userspace", True, False, 20), now) is None
    assert way(now, Config(mode="userspace")).startswith(
        "userspace, by way of nftables: move there, serve until 3 connections of virtual servers"
        " have ended (at most 15m0s,"
    )


def test_they_are_not_cut_where_nothing_can_serve_meanwhile():
    now = Situation((), None, held=3, no_stopover="no nf_tables")
    found = obstacle(Request("userspace", True, False, 20), now)
    assert found is not None
    assert found.startswith("3 connections of virtual servers would be cut, and mode nftables,")
    assert way(now, Config(mode="userspace")) == "userspace"


def test_the_first_of_two_moves_is_asked_for_as_the_whole_is():
    asked = Request("userspace", True, False, 5)
    assert asked.stopover() == Request("nftables", True, False, 5, is_stopover=True)


def route(ip, kind="ClusterIP", proto="TCP", action=None):
    forward = action or Forward(Pool((Backend(Address("10.244.1.5", 80)),)))
    return Route(Frontend(ip, 80, proto), kind, forward, forward, forward)


def test_only_cluster_ips_that_forward_the_node_over_tcp_are_tried():
    routes = (
        route("10.96.0.1"),
        route("10.96.0.2", proto="UDP"),
        route("198.18.0.1", kind="LoadBalancer"),
        route("10.96.0.3", action=Reject()),
    )
    plan = Plan()
    plan.ports[owner()] = PortPlan(owner(), routes)
    probe = Probe(Address("10.96.0.1", 80), (Address("10.244.1.5", 80),))
    assert sample(plan, 20) == [probe]


@pytest.mark.parametrize(
    ("count", "found"), [(5, [0, 1, 2, 3]), (4, [0, 1, 2, 3]), (2, [0, 2]), (0, [])]
)
def test_a_sample_is_spread_over_all(count, found):
    assert evenly(range(4), count) == found


@pytest.mark.parametrize(
    ("codes", "moves", "code"),
    [
        pytest.param([0], ["userspace"], 0, id="nothing to wait for"),
        pytest.param([1], ["userspace"], 1, id="it is refused"),
        pytest.param([DETOUR, 0, 0], ["userspace", "nftables", "userspace"], 0, id="in two moves"),
        pytest.param([DETOUR, 1], ["userspace", "nftables"], 1, id="the first fails"),
        pytest.param([DETOUR, 0, 1], ["userspace", "nftables", "userspace"], 1, id="the second"),
        pytest.param(
            [DETOUR, 0, DETOUR], ["userspace", "nftables", "userspace"], 1,
            id="somebody makes virtual servers",
        ),
    ],
)  # fmt: skip
def test_the_command_goes_on_as_long_as_moves_succeed(codes, moves, code, monkeypatch):
    made = []

    def make_move(asked, shared):
        assert shared == ["--cluster-cidr=10.0.0.0/8"]
        made.append(asked.to)
        return codes[len(made) - 1]

    monkeypatch.setattr(cli, "make_move", make_move)
    words = ["--to=userspace", "--then-run", "--cluster-cidr=10.0.0.0/8"]
    assert cli.migrate(words) == code
    assert made == moves
