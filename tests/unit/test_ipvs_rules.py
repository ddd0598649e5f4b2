"""What one owner has in mode ipvs: virtual servers, local addresses, and the table beside them."""

from ipaddress import ip_network

import pytest

from pyproxy.model import Frontend
from pyproxy.plan import plan_port
from pyproxy.rules import nftables
from pyproxy.rules.ipvs import (
    BOUND,
    BRIEF_SECONDS,
    Destination,
    LocalAddress,
    Ruleset,
    Server,
    compile_owner,
    kernel_scheduler,
    wanted_schedulers,
)
from pyproxy.rules.nft import Verdict
from pyproxy.rules.nftables import DROP_SILENTLY
from tests.builders import SITE, VIP, address, draining, endpoint, owner, remote, service_port

NODE_IPS = ("192.0.2.11", "198.51.100.1")
TABLE = nftables.Ruleset(4, pods=ip_network("10.244.0.0/16"), node_port_ips=NODE_IPS)
RULESET = Ruleset(TABLE, NODE_IPS)
CLUSTER_IP = Frontend(VIP, 80, "TCP")
LB_IP = "203.0.113.7"
LB = Frontend(LB_IP, 80, "TCP")
NODE_PORTS = tuple(Frontend(ip, 30080, "TCP") for ip in NODE_IPS)
LOCAL = {"external_local": True, "node_port": 30080, "load_balancer_ips": (LB_IP,)}


def items(*endpoints, before=None, ruleset=RULESET, **fields):
    port = plan_port(service_port(**fields), endpoints, SITE)
    return compile_owner(ruleset, port, before or {})


def servers(found):
    return {key: content for key, content in found.items() if isinstance(key, Frontend)}


def weights(found, server=CLUSTER_IP):
    return {
        int(key.address.ip.rsplit(".", 1)[1]): weight
        for key, weight in found.items()
        if isinstance(key, Destination) and key.server == server
    }


def entrances(found):
    return {
        item.container: content.data.chain or content.data.kind
        for item, content in found.items()
        if isinstance(getattr(content, "data", None), Verdict)
    }


def chain(found, name):
    (rules,) = (c for item, c in found.items() if item[:2] == ("chain", name))
    return [rule.statements for rule in rules]


def test_a_cluster_ip_is_a_virtual_server_at_an_address_that_is_local():
    found = items(endpoint(1), remote(2))
    assert servers(found) == {CLUSTER_IP: Server("rr")}
    assert weights(found) == {1: 1, 2: 1}
    assert LocalAddress(VIP, None, owner()) in found
    assert not entrances(found), "to masquerade it is a rule of the fixed part"


def test_a_node_port_is_a_virtual_server_at_each_address_of_the_node():
    found = items(endpoint(1), node_port=30080)
    assert servers(found).keys() == {CLUSTER_IP, *NODE_PORTS}
    assert entrances(found) == {"node-ports": "masquerade"}


def test_only_the_port_of_an_external_address_becomes_local():
    found = items(endpoint(1), load_balancer_ips=(LB_IP,))
    assert LocalAddress(LB_IP, LB, owner()) in found
    assert LocalAddress(LB_IP, None, owner()) not in found


def test_without_endpoints_there_is_no_virtual_server_and_a_refusal():
    found = items(node_port=30080, load_balancer_ips=(LB_IP,))
    assert not servers(found)
    assert entrances(found) == {"no-endpoints": "refuse", "no-endpoint-node-ports": "refuse"}


def test_policy_local_has_virtual_servers_of_local_endpoints_and_others_are_picked_by_the_table():
    found = items(endpoint(1), remote(2), **LOCAL)
    assert weights(found, LB) == weights(found, NODE_PORTS[0]) == {1: 1}
    assert weights(found) == {1: 1, 2: 1}
    assert entrances(found) == {
        "service-ips": "local-pick-2-carried",
        "node-ports": "node-local-pick-2-carried",
    }
    assert chain(found, "local-pick-2-carried")[-1] == (Verdict("goto", "carried"),)


def test_policy_local_without_local_endpoints_drops_and_has_no_virtual_server():
    found = items(remote(2), **LOCAL)
    assert servers(found).keys() == {CLUSTER_IP}
    assert chain(found, "local-pick-1-nothing")[-1] == (DROP_SILENTLY,)


def test_policy_local_whose_endpoints_are_all_local_needs_no_picks():
    found = items(endpoint(1), **LOCAL)
    assert entrances(found)["service-ips"] == "local-carried-carried"
    assert "endpoints" not in {key[0] for key in found}


def test_affinity_is_the_virtual_servers():
    found = items(endpoint(1), affinity_seconds=BRIEF_SECONDS, node_port=30080)
    assert set(servers(found).values()) == {Server("rr", BRIEF_SECONDS)}


def test_brief_affinity_is_the_tables():
    found = items(endpoint(1), remote(2), affinity_seconds=BRIEF_SECONDS - 1, **LOCAL)
    port = plan_port(
        service_port(affinity_seconds=BRIEF_SECONDS - 1, **LOCAL), [endpoint(1), remote(2)], SITE
    )
    local = LocalAddress(VIP, None, owner())
    assert found == {**nftables.compile_owner(TABLE, port, {}), local: BOUND}
    assert not wanted_schedulers(RULESET, port)


@pytest.mark.parametrize(
    ("name", "default", "weighted", "kernels"),
    [
        pytest.param(None, "wlc", False, "wlc", id="the default is the configured one"),
        pytest.param("sh", "rr", False, "sh", id="a Service has its own"),
        pytest.param(None, "rr", True, "wrr", id="weights count also by default"),
        pytest.param("lc", "rr", True, "wlc", id="and with the fewest connections"),
        pytest.param("rr", "wlc", True, "rr", id="who asks for equal shares gets them"),
        *(pytest.param(name, "rr", True, name, id=name) for name in ("dh", "mh", "sed", "nq")),
        pytest.param("random", "rr", False, "rr", id="the kernel has no random one"),
    ],
)
def test_schedulers_have_the_kernels_names(name, default, weighted, kernels):
    assert kernel_scheduler(name, default, weighted=weighted) == kernels


def test_weights_are_those_of_the_destinations():
    found = items(endpoint(1), endpoint(2), weights=(("ip", "10.244.1.2", 3),))
    assert weights(found) == {1: 1, 2: 3}


def test_a_flow_of_udp_stays_with_a_backend_that_serves_on():
    name, server = owner(proto="UDP"), Frontend(VIP, 80, "UDP")
    old = items(endpoint(1), endpoint(2), name=name)
    new = items(draining(1), endpoint(2), name=name, before=old)
    assert weights(new, server) == {1: 0, 2: 1}
    assert Destination(server, address(1)) not in items(endpoint(2), name=name, before=new)
    assert weights(items(draining(1), endpoint(2), name=name), server) == {2: 1}, "it had none"


def test_a_scheduler_that_the_kernel_has_not_is_replaced():
    ruleset = Ruleset(TABLE, NODE_IPS, missing=frozenset({"mh"}))
    assert servers(items(endpoint(1), scheduler="mh", ruleset=ruleset)) == {
        CLUSTER_IP: Server("rr")
    }


def test_a_service_says_which_schedulers_it_needs():
    port = plan_port(service_port(scheduler="mh", **LOCAL), [endpoint(1), remote(2)], SITE)
    assert wanted_schedulers(RULESET, port) == {"mh"}
    assert wanted_schedulers(RULESET, plan_port(service_port(), [], SITE)) == frozenset()


def test_with_scheduler_dh_nobody_drains():
    old = items(endpoint(1), endpoint(2), scheduler="dh")
    new = items(draining(1), endpoint(2), scheduler="dh", before=old)
    assert weights(new) == {2: 1}
