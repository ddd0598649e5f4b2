from itertools import product

import pytest

from pyproxy.model import WeightRule
from pyproxy.topology import endpoint_sets, weight_of
from tests.builders import HERE, draining, endpoint, remote, service_port


def chosen(endpoints):
    return [int(e.address.ip.rsplit(".", 1)[1]) for e in endpoints]


@pytest.mark.parametrize(
    ("ready", "serving", "terminating"), list(product((True, False), repeat=3))
)
def test_conditions_decide_whether_an_endpoint_is_used(ready, serving, terminating):
    subject = endpoint(1, ready=ready, serving=serving, terminating=terminating)
    alone = endpoint_sets(service_port(), [subject], HERE)
    beside = endpoint_sets(service_port(), [subject, endpoint(2)], HERE)
    fallback = serving and terminating
    assert chosen(alone.cluster) == ([1] if ready or fallback else [])
    assert chosen(beside.cluster) == ([1, 2] if ready else [2])


A, B, ELSEWHERE = ("zone-a",), ("zone-b",), ("elsewhere",)
HERE_NODE = ("here",)


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        pytest.param([endpoint(1), endpoint(2)], [1, 2], id="no hints"),
        pytest.param([endpoint(1, zones=A), endpoint(2, zones=B)], [1], id="hinted for our zone"),
        pytest.param(
            [endpoint(1, zones=A), endpoint(2)], [1, 2], id="one without a hint switches them off"
        ),
        pytest.param([endpoint(1, zones=B), endpoint(2, zones=B)], [1, 2], id="none for our zone"),
        pytest.param(
            [endpoint(1, zones=A), endpoint(2, ready=False)],
            [1],
            id="one not ready switches nothing off",
        ),
        pytest.param(
            [endpoint(1, zones=A, ready=False), endpoint(2, zones=B)],
            [2],
            id="one not ready switches nothing on",
        ),
        pytest.param([endpoint(1, zones=A + B)], [1], id="several zones"),
        pytest.param(
            [endpoint(1, nodes=HERE_NODE), endpoint(2, nodes=ELSEWHERE)], [1], id="same node"
        ),
        pytest.param(
            [
                endpoint(1, nodes=ELSEWHERE, zones=A),
                endpoint(2, nodes=ELSEWHERE, zones=B),
            ],
            [1],
            id="no node hint for us: zone hints count",
        ),
        pytest.param(
            [endpoint(1, nodes=HERE_NODE), endpoint(2, zones=A)],
            [1, 2],
            id="neither kind on all",
        ),
        pytest.param([draining(1, zones=B), draining(2)], [1, 2], id="draining ones ignore hints"),
    ],
)
def test_hints_choose_among_ready_endpoints(endpoints, expected):
    assert chosen(endpoint_sets(service_port(), endpoints, HERE).cluster) == expected


def test_a_node_without_a_zone_matches_no_zone_hint():
    endpoints = [endpoint(1, zones=("",)), endpoint(2, zones=B)]
    place = HERE.__class__("here", "")
    assert chosen(endpoint_sets(service_port(), endpoints, place).cluster) == [1, 2]


def test_an_endpoint_without_a_node_is_local_to_none():
    port = service_port(internal_local=True)
    assert endpoint_sets(port, [endpoint(1, node="")], HERE).local == ()


@pytest.mark.parametrize(
    ("port", "endpoints", "cluster", "local", "anywhere"),
    [
        pytest.param({}, [remote(1)], [1], [], True, id="cluster policy needs no local set"),
        pytest.param(
            {"internal_local": True}, [remote(1)], [], [], True, id="internal only, all remote"
        ),
        pytest.param(
            {"internal_local": True, "node_port": 30080},
            [remote(1)],
            [1],
            [],
            True,
            id="internal local, but exposed",
        ),
        pytest.param(
            {"external_local": True}, [endpoint(1), remote(2)], [1, 2], [], True, id="not exposed"
        ),
        pytest.param(
            {"external_local": True, "node_port": 30080},
            [endpoint(1, zones=B), remote(2, zones=A)],
            [2],
            [1],
            True,
            id="the local set ignores hints",
        ),
        pytest.param(
            {"external_local": True, "node_port": 30080},
            [draining(1), remote(2)],
            [2],
            [1],
            True,
            id="each set falls back by itself",
        ),
        pytest.param(
            {"internal_local": True, "external_local": True, "node_port": 30080},
            [remote(1, ready=False, terminating=True)],
            [1],
            [],
            True,
            id="only a remote draining one",
        ),
        pytest.param(
            {"internal_local": True},
            [remote(1, ready=False)],
            [],
            [],
            False,
            id="not ready is nowhere",
        ),
        pytest.param({}, [], [], [], False, id="no endpoints"),
    ],
)
def test_policies_choose_the_sets(port, endpoints, cluster, local, anywhere):
    sets = endpoint_sets(service_port(**port), endpoints, HERE)
    assert (chosen(sets.cluster), chosen(sets.local), sets.anywhere) == (cluster, local, anywhere)


@pytest.mark.parametrize(
    ("rules", "weight"),
    [
        pytest.param([], 1, id="default"),
        pytest.param([("ip", "10.244.1.1", 5)], 5, id="by address"),
        pytest.param([("pod", "web-canary-*", 3)], 3, id="by pod name"),
        pytest.param([("node", "here", 4)], 4, id="by node"),
        pytest.param([("zone", "zone-a", 6)], 6, id="by zone"),
        pytest.param([("node", "there", 4), ("zone", "zone-a", 6)], 6, id="the first that matches"),
        pytest.param([("zone", "zone-a", 6), ("ip", "10.244.1.1", 5)], 6, id="in order"),
        pytest.param([("pod", "web-stable-*", 3)], 1, id="none matches"),
    ],
)
def test_the_first_matching_rule_gives_the_weight(rules, weight):
    subject = endpoint(1, zone="zone-a", pod="web-canary-x7")
    assert weight_of(subject, tuple(WeightRule(*rule) for rule in rules)) == weight


def test_an_endpoint_of_weight_zero_takes_nothing_and_hides_nobody():
    port = service_port(weights=[("ip", "10.244.1.1", 0)])
    endpoints = [endpoint(1, zones=A), endpoint(2, zones=B)]
    assert chosen(endpoint_sets(port, endpoints, HERE).cluster) == [2]


def test_weight_zero_everywhere_leaves_nothing_to_serve():
    port = service_port(weights=[("node", "here", 0)])
    assert endpoint_sets(port, [endpoint(1)], HERE).anywhere is False
