from ipaddress import ip_network

import pytest

from pyproxy.model import Address, Frontend
from pyproxy.plan import Site, plan_port
from pyproxy.rules.flows import (
    Flow,
    Pending,
    Review,
    Tightened,
    affected,
    breaks,
    broken,
    condemned,
    lookup,
    stale,
)
from pyproxy.rules.listeners import Surroundings
from tests.builders import HERE, SITE, VIP, address, draining, endpoint, owner, remote, service_port

EXTERNAL_IP = "203.0.113.7"
LB_IP = "203.0.113.8"
CLIENT = "198.51.100.50"
POD = "10.244.1.99"
NODE = "192.0.2.11"
FIRST = address(1)
ELSEWHERE = Address("8.8.8.8", 30053)
AROUND = Surroundings(node_ips=frozenset({NODE, "127.0.0.1"}), pods=(ip_network("10.244.1.0/24"),))
OWNER = {proto: owner("dns", proto=proto) for proto in ("TCP", "UDP", "SCTP")}


def planned(*endpoints, proto="UDP", site=SITE, **fields):
    port = service_port(name=OWNER[proto], port=53, **fields)
    return plan_port(port, endpoints, site)


def exposed(*endpoints, **fields):
    defaults = {"node_port": 30053, "external_ips": (EXTERNAL_IP,), "load_balancer_ips": (LB_IP,)}
    return planned(*endpoints, **(defaults | fields))


def flow(to=VIP, port=53, backend=FIRST, source=CLIENT, proto="UDP"):
    return Flow(proto, Address(source, 40000), Address(to, port), backend, b"")


def frontend(ip, port=53, proto="UDP"):
    return Frontend(ip, port, proto)


ALL = {frontend(VIP), frontend(EXTERNAL_IP), frontend(LB_IP), frontend("", 30053)}


# --- stale ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("it", "expected"),
    [
        pytest.param(flow(), False, id="its backend serves"),
        pytest.param(flow(backend=address(2)), False, id="its backend drains, which is serving"),
        pytest.param(flow(backend=address(3)), True, id="its backend serves no more"),
        pytest.param(flow(backend=address(9)), True, id="its backend is gone"),
        pytest.param(flow(backend=address(1, 9)), True, id="its backend has another port now"),
        pytest.param(flow(backend=Address(VIP, 53)), True, id="nobody translated it"),
        pytest.param(flow(EXTERNAL_IP, backend=address(9)), True, id="external IP"),
        pytest.param(flow(LB_IP, backend=address(9)), True, id="load balancer IP"),
        pytest.param(flow(NODE, 30053, address(9)), True, id="node port"),
        pytest.param(flow(NODE, 30053), False, id="node port, its backend serves"),
        pytest.param(flow("8.8.8.8", 30053, ELSEWHERE), True, id="node port of others"),
        pytest.param(flow(VIP, 30053, address(9)), True, id="node port at the cluster IP"),
        pytest.param(flow(port=54, backend=address(9)), False, id="another port of the address"),
        pytest.param(flow("10.96.0.2", backend=address(9)), False, id="another address"),
        pytest.param(flow(backend=address(9), proto="TCP"), False, id="TCP ends by itself"),
        pytest.param(flow(backend=address(9), proto="SCTP"), False, id="another protocol"),
    ],
)  # fmt: skip
def test_a_flow_is_stale_when_its_backend_does_not_serve_its_frontend(it, expected):
    services = lookup([exposed(endpoint(1), draining(2), endpoint(3, ready=False, serving=False))])
    assert stale(it, services) is expected


def test_sctp_flows_can_be_stale():
    services = lookup([planned(endpoint(1), proto="SCTP")])
    assert stale(flow(backend=address(9), proto="SCTP"), services)


@pytest.mark.parametrize(
    "port",
    [
        pytest.param(planned(), id="no endpoints"),
        pytest.param(planned(endpoint(1, ready=False, serving=False)), id="none that serves"),
        pytest.param(planned(endpoint(1), proto="TCP"), id="TCP"),
    ],
)
def test_flows_of_these_are_left_alone(port):
    assert lookup([port]) == {}


def test_policy_and_topology_make_nothing_stale():
    services = lookup([exposed(remote(2), endpoint(1), internal_local=True, external_local=True)])
    assert not stale(flow(backend=address(2)), services)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        pytest.param(None, exposed(endpoint(1)), ALL, id="start"),
        pytest.param(exposed(), exposed(endpoint(1)), ALL, id="the first endpoint"),
        pytest.param(exposed(endpoint(1), endpoint(2)), exposed(endpoint(1)), ALL, id="one less"),
        pytest.param(exposed(endpoint(1)), exposed(endpoint(2)), ALL, id="another"),
        pytest.param(exposed(endpoint(1)), exposed(endpoint(1, port=1)), ALL, id="another port"),
        pytest.param(exposed(endpoint(1)), exposed(endpoint(1), endpoint(2)), set(), id="one more"),
        pytest.param(exposed(endpoint(1)), exposed(draining(1)), set(), id="draining"),
        pytest.param(exposed(endpoint(1)), exposed(), set(), id="the last one"),
        pytest.param(exposed(endpoint(1)), None, set(), id="the Service is gone"),
        pytest.param(
            exposed(endpoint(1)), exposed(endpoint(1), affinity_seconds=9), set(), id="affinity"
        ),
        pytest.param(
            exposed(endpoint(1)), exposed(endpoint(1), external_local=True), set(), id="policy"
        ),
        pytest.param(
            planned(endpoint(1)),
            planned(endpoint(1), external_ips=(EXTERNAL_IP,)),
            {frontend(EXTERNAL_IP)},
            id="a new address",
        ),
        pytest.param(
            planned(endpoint(1), proto="TCP"), planned(endpoint(2), proto="TCP"), set(), id="TCP"
        ),
    ],
)
def test_only_frontends_that_may_have_stale_flows_are_looked_at(old, new, expected):
    assert affected(old, new) == expected


# --- broken ---------------------------------------------------------------------------------------


def cut(old, new, it, around=AROUND):
    """Whether a flow has to go when a plan replaces another, for whatever it is told of."""
    at = {flow_frontend(it), frontend("", it.destination.port, it.proto)}
    return any(breaks(it, rule, around) for rule in broken(old, new) if rule.frontend in at)


def flow_frontend(it):
    return frontend(it.destination.ip, it.destination.port, it.proto)


MIXED = (endpoint(1), remote(2))
PROTOS = pytest.mark.parametrize("proto", ["TCP", "UDP"])


@PROTOS
@pytest.mark.parametrize(
    ("source", "backend", "expected"),
    [
        pytest.param(CLIENT, address(2), True, id="strangers leave other nodes' endpoints"),
        pytest.param(CLIENT, address(1), False, id="and keep this node's"),
        pytest.param(POD, address(2), False, id="pods may go on"),
        pytest.param(NODE, address(2), False, id="so may the node"),
        pytest.param(CLIENT, address(9), False, id="an endpoint that went before stays untouched"),
    ],
)
@pytest.mark.parametrize(
    ("to", "port"), [(EXTERNAL_IP, 53), (LB_IP, 53), (NODE, 30053)], ids=["external", "lb", "node"]
)
def test_external_policy_local_ends_flows_to_other_nodes(
    proto, source, backend, expected, to, port
):
    old, new = exposed(*MIXED, proto=proto), exposed(*MIXED, proto=proto, external_local=True)
    assert cut(old, new, flow(to, port, backend, source, proto)) is expected


@PROTOS
def test_external_policy_local_leaves_the_cluster_ip_alone(proto):
    old, new = exposed(*MIXED, proto=proto), exposed(*MIXED, proto=proto, external_local=True)
    assert not cut(old, new, flow(backend=address(2), source=POD, proto=proto))


@PROTOS
def test_external_policy_local_without_local_endpoints_ends_strangers_flows(proto):
    old = exposed(remote(2), proto=proto)
    new = exposed(remote(2), proto=proto, external_local=True)
    assert cut(old, new, flow(LB_IP, backend=address(2), proto=proto))
    assert not cut(old, new, flow(LB_IP, backend=address(2), source=POD, proto=proto))


def test_a_stranger_may_be_a_pod_where_pods_are_not_known_by_address():
    old, new = exposed(*MIXED), exposed(*MIXED, external_local=True)
    assert not cut(old, new, flow(LB_IP, backend=address(2)), Surroundings())


def test_where_no_pods_are_detected_all_but_the_node_are_strangers():
    site = Site(HERE, detects_pods=False)
    old, new = exposed(*MIXED, site=site), exposed(*MIXED, site=site, external_local=True)
    assert cut(old, new, flow(LB_IP, backend=address(2)), Surroundings())


@PROTOS
def test_internal_policy_local_ends_flows_to_other_nodes(proto):
    old, new = exposed(*MIXED, proto=proto), exposed(*MIXED, proto=proto, internal_local=True)
    assert cut(old, new, flow(backend=address(2), source=POD, proto=proto))
    assert not cut(old, new, flow(backend=address(1), source=POD, proto=proto))


@PROTOS
def test_internal_policy_local_without_local_endpoints_ends_every_flow(proto):
    old, new = planned(remote(2), proto=proto), planned(remote(2), proto=proto, internal_local=True)
    assert cut(old, new, flow(backend=address(2), source=POD, proto=proto))


@PROTOS
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param(CLIENT, True, id="outside the new range"),
        pytest.param("203.0.113.99", False, id="inside it"),
    ],
)
def test_new_source_ranges_end_the_flows_of_others(proto, source, expected):
    old = exposed(endpoint(1), proto=proto)
    new = exposed(endpoint(1), proto=proto, source_ranges=("203.0.113.0/24",))
    assert cut(old, new, flow(LB_IP, source=source, proto=proto)) is expected
    assert not cut(old, new, flow(EXTERNAL_IP, source=source, proto=proto))
    assert not cut(old, new, flow(NODE, 30053, source=source, proto=proto))


@PROTOS
@pytest.mark.parametrize("fields", [{"node_port": 30054}, {"node_port": 0}], ids=["moved", "gone"])
def test_a_node_port_given_up_ends_its_flows(proto, fields):
    old, new = exposed(endpoint(1), proto=proto), exposed(endpoint(1), proto=proto, **fields)
    assert cut(old, new, flow(NODE, 30053, proto=proto))
    assert not cut(old, new, flow("8.8.8.8", 30053, ELSEWHERE, proto=proto))
    assert not cut(old, new, flow(proto=proto))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(None, exposed(*MIXED, external_local=True), id="a restart"),
        pytest.param(exposed(*MIXED), None, id="the Service is gone"),
        pytest.param(exposed(*MIXED), exposed(*MIXED), id="nothing"),
        pytest.param(exposed(*MIXED), exposed(), id="no endpoints"),
        pytest.param(exposed(*MIXED), exposed(endpoint(1)), id="an endpoint is gone"),
        pytest.param(exposed(*MIXED), exposed(endpoint(1), draining(2)), id="an endpoint drains"),
        pytest.param(exposed(*MIXED), exposed(*MIXED, affinity_seconds=9), id="affinity"),
        pytest.param(
            exposed(*MIXED), exposed(*MIXED, weights=(("ip", "10.244.1.2", 0),)), id="weight"
        ),
        pytest.param(
            exposed(*MIXED),
            exposed(endpoint(1, nodes=["here"]), remote(2, nodes=["elsewhere"])),
            id="topology",
        ),
        pytest.param(exposed(*MIXED, external_local=True), exposed(*MIXED), id="policy Cluster"),
        pytest.param(
            exposed(*MIXED, source_ranges=("203.0.113.0/24",)), exposed(*MIXED), id="no ranges"
        ),
        pytest.param(
            exposed(*MIXED, external_local=True),
            exposed(remote(2), external_local=True),
            id="policy was Local before",
        ),
        pytest.param(
            exposed(*MIXED), exposed(*MIXED, external_ips=()), id="an external IP is given up"
        ),
    ],
)
def test_these_changes_break_nothing(old, new):
    assert broken(old, new) == ()


# --- reviews --------------------------------------------------------------------------------------


def test_the_first_review_is_of_every_owner_and_breaks_nothing():
    pending = Pending(ends_forbidden=True)
    port = exposed(endpoint(1))
    review = pending.take({port.owner: port})
    assert review == Review(dict.fromkeys(ALL, port.serving), {})


def test_a_review_is_of_the_owners_noted_since_the_last():
    pending = Pending(ends_forbidden=False)
    old, new = exposed(*MIXED), exposed(endpoint(1))
    assert pending.take({old.owner: old})
    assert not pending.take({new.owner: new})
    pending.note({new.owner})
    assert pending.take({new.owner: new}).frontends == ALL
    assert not pending.take({new.owner: new})


def test_what_is_not_in_force_yet_is_reviewed_later():
    pending = Pending(ends_forbidden=False)
    old, new = exposed(*MIXED), exposed(endpoint(1))
    pending.take({old.owner: old})
    pending.note({new.owner})
    assert not pending.take({new.owner: new}, {new.owner})
    assert pending.take({new.owner: new}).frontends == ALL


@PROTOS
def test_what_new_rules_forbid_goes_on_unless_its_end_is_asked_for(proto):
    pending = Pending(ends_forbidden=False)
    old = exposed(*MIXED, proto=proto)
    new = exposed(
        *MIXED,
        proto=proto,
        external_local=True,
        internal_local=True,
        source_ranges=("203.0.113.0/24",),
        node_port=0,
    )
    pending.take({old.owner: old})
    pending.note({new.owner})
    assert not pending.take({new.owner: new})


def test_a_review_compares_with_the_last_plan_reviewed_whatever_came_between():
    pending = Pending(ends_forbidden=True)
    old, new = exposed(*MIXED, proto="TCP"), exposed(*MIXED, proto="TCP", external_local=True)
    pending.take({old.owner: old})
    pending.note({old.owner})
    pending.note({new.owner})
    review = pending.take({new.owner: new})
    assert review.frontends == {
        frontend(EXTERNAL_IP, proto="TCP"),
        frontend(LB_IP, proto="TCP"),
        frontend("", 30053, "TCP"),
    }


def test_an_owner_that_went_and_came_back_is_new():
    pending = Pending(ends_forbidden=False)
    port = exposed(endpoint(1))
    pending.take({port.owner: port})
    pending.note({port.owner})
    assert not pending.take({})
    pending.note({port.owner})
    assert pending.take({port.owner: port}).frontends == ALL


def test_the_condemned_are_the_stale_and_the_broken():
    tcp = Tightened(frontend(LB_IP, proto="TCP"), (ip_network("203.0.113.0/24"),))
    review = Review(lookup([exposed(endpoint(1))]), {tcp.frontend: (tcp,)})
    gone = flow(backend=address(9))
    barred = flow(LB_IP, proto="TCP")
    fine = [flow(), flow(LB_IP), flow(LB_IP, source="203.0.113.1", proto="TCP")]
    assert list(condemned([gone, barred, *fine], review, AROUND)) == [gone, barred]
