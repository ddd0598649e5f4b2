from ipaddress import ip_network

import pytest
from msgspec import structs

from pyproxy.cache import Cache
from pyproxy.model import Address, Forward, Frontend, HealthPort, ObjectName, Remove, Upsert
from pyproxy.plan import Planner, plan_port
from tests.builders import (
    SITE,
    VIP,
    draining,
    endpoint,
    endpoint_slice,
    numbers,
    owner,
    remote,
    service,
    service_port,
)

LB = {"load_balancer_ips": ("198.18.0.1",)}
NO_DETECTOR = structs.replace(SITE, detects_pods=False)


def route_of(plan, kind):
    (route,) = [route for route in plan.routes if route.kind == kind]
    return route


def verdicts(port, endpoints, kind="LoadBalancer", site=SITE):
    route = route_of(plan_port(service_port(**port), endpoints, site), kind)
    return [numbers(a) for a in (route.from_pod, route.from_node, route.from_outside)]


@pytest.mark.parametrize("kind", ["ClusterIP", "ExternalIP", "LoadBalancer", "NodePort"])
@pytest.mark.parametrize(
    "endpoints",
    [
        pytest.param([], id="none"),
        pytest.param([endpoint(1, ready=False)], id="not ready"),
        pytest.param([endpoint(1, ready=False, serving=False, terminating=True)], id="gone"),
    ],
)
@pytest.mark.parametrize("local", [False, True])
def test_without_a_usable_endpoint_anywhere_everybody_is_refused(kind, endpoints, local):
    port = {
        **LB,
        "external_ips": ("198.18.0.2",),
        "node_port": 30080,
        "internal_local": local,
        "external_local": local,
    }
    assert verdicts(port, endpoints, kind) == ["reject"] * 3


LOCAL_AND_REMOTE = [endpoint(1), remote(2)]


@pytest.mark.parametrize(
    ("port", "kind", "endpoints", "expected"),
    [
        pytest.param({}, "ClusterIP", LOCAL_AND_REMOTE, [[1, 2]] * 3, id="cluster IP"),
        pytest.param(
            {"internal_local": True}, "ClusterIP", LOCAL_AND_REMOTE, [[1]] * 3, id="internal local"
        ),
        pytest.param(
            {"internal_local": True}, "ClusterIP", [remote(2)], ["drop"] * 3, id="and none here"
        ),
        pytest.param(LB, "LoadBalancer", LOCAL_AND_REMOTE, [[1, 2]] * 3, id="external cluster"),
        pytest.param(
            {**LB, "external_local": True},
            "LoadBalancer",
            LOCAL_AND_REMOTE,
            [[1, 2], [1, 2], [1]],
            id="external local: insiders use all",
        ),
        pytest.param(
            {**LB, "external_local": True},
            "LoadBalancer",
            [remote(2)],
            [[2], [2], "drop"],
            id="external local, none here",
        ),
        pytest.param(
            {**LB, "external_local": True},
            "LoadBalancer",
            [draining(1), remote(2)],
            [[2], [2], [1]],
            id="a draining endpoint here keeps the outside",
        ),
        pytest.param(
            {**LB, "external_local": True},
            "ClusterIP",
            LOCAL_AND_REMOTE,
            [[1, 2]] * 3,
            id="the external policy is not the cluster IP's",
        ),
        pytest.param(
            {**LB, "internal_local": True},
            "LoadBalancer",
            [remote(2)],
            [[2]] * 3,
            id="the internal policy is not the others'",
        ),
        pytest.param(
            {**LB, "balancer_traffic": "pass-through"},
            "LoadBalancer",
            LOCAL_AND_REMOTE,
            ["pass", "pass", [1, 2]],
            id="insiders go by the load balancer",
        ),
        pytest.param(
            {**LB, "balancer_traffic": "pass-through"},
            "LoadBalancer",
            [],
            ["pass", "pass", "reject"],
            id="also where nobody is there to serve",
        ),
        pytest.param(
            {**LB, "balancer_traffic": "local-else-pass-through"},
            "LoadBalancer",
            LOCAL_AND_REMOTE,
            [[1], [1], [1, 2]],
            id="insiders keep to this node",
        ),
        pytest.param(
            {**LB, "balancer_traffic": "local-else-pass-through"},
            "LoadBalancer",
            [remote(2)],
            ["pass", "pass", [2]],
            id="or go by the load balancer",
        ),
        pytest.param(
            {**LB, "node_port": 30080, "balancer_traffic": "pass-through"},
            "NodePort",
            LOCAL_AND_REMOTE,
            [[1, 2]] * 3,
            id="a node port is not the load balancer's",
        ),
        pytest.param(
            {"node_port": 30080, "internal_local": True, "external_local": True},
            "NodePort",
            LOCAL_AND_REMOTE,
            [[1, 2], [1, 2], [1]],
            id="both local",
        ),
    ],
)
def test_policies_and_origins_decide_who_is_reached(port, kind, endpoints, expected):
    assert verdicts(port, endpoints, kind) == expected


def test_without_a_detector_pods_are_planned_like_strangers():
    port = {**LB, "external_local": True}
    assert verdicts(port, [endpoint(1), remote(2)], site=NO_DETECTOR) == [[1], [1, 2], [1]]
    assert verdicts(port, [remote(2)], site=NO_DETECTOR) == ["drop", [2], "drop"]


MASQUERADE_ALL = structs.replace(SITE, masquerade_all=True)
ALL_OFF_DETECTOR = structs.replace(NO_DETECTOR, masquerade_all=True)


@pytest.mark.parametrize(
    ("kind", "external_local", "site", "expected"),
    [
        pytest.param("ClusterIP", False, SITE, (False, True, True), id="cluster IP"),
        pytest.param("ClusterIP", False, NO_DETECTOR, (False,) * 3, id="cluster IP, no detector"),
        pytest.param("ClusterIP", False, MASQUERADE_ALL, (True,) * 3, id="masquerade all"),
        pytest.param("ClusterIP", False, ALL_OFF_DETECTOR, (True,) * 3, id="all, no detector"),
        pytest.param("LoadBalancer", False, SITE, (True,) * 3, id="external, cluster"),
        pytest.param("NodePort", False, NO_DETECTOR, (True,) * 3, id="external, no detector"),
        pytest.param("LoadBalancer", True, SITE, (False, True, False), id="external, local"),
        pytest.param("NodePort", True, NO_DETECTOR, (False, True, False), id="local, no detector"),
        pytest.param("NodePort", True, MASQUERADE_ALL, (False, True, False), id="local, all"),
    ],
)
def test_masquerading_depends_on_origin_and_policy(kind, external_local, site, expected):
    port = service_port(**LB, node_port=30080, external_local=external_local)
    route = route_of(plan_port(port, [endpoint(1)], site), kind)
    actions = (route.from_pod, route.from_node, route.from_outside)
    assert all(isinstance(action, Forward) for action in actions)
    assert tuple(action.masquerade for action in actions) == expected


def test_source_ranges_guard_load_balancer_addresses_only():
    port = service_port(
        **LB, external_ips=("198.18.0.2",), node_port=30080, source_ranges=["203.0.113.0/24"]
    )
    plan = plan_port(port, [endpoint(1)], SITE)
    assert {route.kind: route.allowed_sources for route in plan.routes} == {
        "ClusterIP": None,
        "ExternalIP": None,
        "LoadBalancer": (ip_network("203.0.113.0/24"),),
        "NodePort": None,
    }


def test_a_node_inside_a_range_may_also_come_from_the_address_itself():
    port = service_port(**LB, source_ranges=["192.0.2.0/24"])
    route = route_of(plan_port(port, [endpoint(1)], SITE), "LoadBalancer")
    assert route.allowed_sources == (ip_network("192.0.2.0/24"), ip_network("198.18.0.1/32"))


def test_an_address_of_two_kinds_has_one_route():
    port = service_port(load_balancer_ips=("198.18.0.1",), external_ips=("198.18.0.1",))
    plan = plan_port(port, [endpoint(1)], SITE)
    assert [(r.frontend.ip, r.kind) for r in plan.routes] == [
        ("10.96.0.1", "ClusterIP"),
        ("198.18.0.1", "ExternalIP"),
    ]


def test_the_health_port_counts_ready_endpoints_of_this_node():
    port = service_port(**LB, external_local=True, health_check_node_port=32000)
    endpoints = [endpoint(1), endpoint(2), remote(3), draining(4)]
    plan = plan_port(port, endpoints, SITE)
    assert plan.health == HealthPort(32000, frozenset({"10.244.1.1", "10.244.1.2"}))


def test_udp_flows_may_stay_with_any_serving_endpoint():
    port = service_port(name=owner(proto="UDP"))
    endpoints = [endpoint(1), draining(2), remote(3), endpoint(4, serving=False, ready=False)]
    plan = plan_port(port, endpoints, SITE)
    assert plan.serving == {Address(f"10.244.1.{n}", 8080) for n in (1, 2, 3)}


@pytest.mark.parametrize(
    ("endpoints", "flags"),
    [
        pytest.param([endpoint(1)], (False, False), id="local"),
        pytest.param([remote(1)], (True, True), id="elsewhere only"),
        pytest.param([], (False, False), id="nowhere"),
    ],
)
def test_a_local_policy_without_local_endpoints_is_noted(endpoints, flags):
    port = service_port(internal_local=True, external_local=True, node_port=30080)
    plan = plan_port(port, endpoints, SITE)
    assert (plan.no_local_internal, plan.no_local_external) == flags


class Cluster:
    """A cache and a planner that is told of every change."""

    def __init__(self):
        self.cache = Cache(4)
        self.planner = Planner()

    def change(self, change):
        owners = self.cache.apply(change)
        return self.planner.update(owners, self.cache, SITE)

    def owner_of(self, frontend):
        plans = self.planner.plan.ports.values()
        return [p.owner.service for p in plans for r in p.routes if r.frontend == frontend]


def test_a_contested_frontend_belongs_to_the_first_name_and_passes_on():
    cluster = Cluster()
    contested = Frontend("198.18.0.9", 80, "TCP")
    for name, ip in (("b", "10.96.0.2"), ("a", "10.96.0.1"), ("c", "10.96.0.3")):
        shared = service(name, ip, external_ips=("198.18.0.9",))
        cluster.change(Upsert("Service", shared))
    assert cluster.owner_of(contested) == ["a"]
    assert sorted(o.service for o in cluster.planner.plan.conflicts) == ["b", "c"]

    changed = cluster.change(Remove("Service", ObjectName("default", "a")))
    assert cluster.owner_of(contested) == ["b"]
    assert {o.service for o in changed} == {"a", "b"}
    assert sorted(o.service for o in cluster.planner.plan.conflicts) == ["c"]


def test_an_update_that_changes_no_duty_is_no_change():
    cluster = Cluster()
    cluster.change(Upsert("Service", service()))
    cluster.change(Upsert("EndpointSlice", endpoint_slice("s", endpoint(1), endpoint(2))))
    reordered = endpoint_slice("s", endpoint(2), endpoint(1))
    assert cluster.change(Upsert("EndpointSlice", reordered)) == set()


UNPLANNABLE = {"weights": ("no rule",)}


@pytest.mark.parametrize(
    ("earlier", "kept"),
    [
        pytest.param([], set(), id="new: nothing"),
        pytest.param([service("a")], {VIP}, id="changed: as it was"),
        pytest.param([service("a", external_ips=("198.18.0.9",))], {VIP, "198.18.0.9"}, id="all"),
    ],
)
def test_an_owner_that_cannot_be_planned_keeps_its_plan_and_stops_nobody(earlier, kept):
    cluster = Cluster()
    cluster.change(Upsert("EndpointSlice", endpoint_slice("s", endpoint(1), of="a")))
    for known in earlier:
        cluster.change(Upsert("Service", known))
    before = dict(cluster.planner.plan.ports)
    changes = [
        Upsert("Service", service("a", **UNPLANNABLE)),
        Upsert("Service", service("b", "10.96.0.2")),
    ]
    owners = {owner for change in changes for owner in cluster.cache.apply(change)}
    changed = cluster.planner.update(owners, cluster.cache, SITE)
    plan = cluster.planner.plan
    assert {o.service for o in changed} == {"b"}
    assert {r.frontend.ip for o, p in before.items() for r in plan.ports[o].routes} == kept
    assert {o: plan.ports[o] for o in before} == before
    ((failed, why),) = plan.failed.items()
    assert failed == owner("a")
    assert why.startswith("AttributeError: 'str' object has no attribute")
    assert "pyproxy/" in why

    cluster.cache.apply(Upsert("Service", service("a")))
    assert {o.service for o in cluster.planner.update((), cluster.cache, SITE)} <= {"a"}
    assert not plan.failed
    assert cluster.owner_of(Frontend(VIP, 80, "TCP")) == ["a"]


def test_an_owner_that_cannot_be_planned_goes_when_its_service_does():
    cluster = Cluster()
    cluster.change(Upsert("EndpointSlice", endpoint_slice("s", endpoint(1), of="a")))
    cluster.change(Upsert("Service", service("a", **UNPLANNABLE)))
    assert cluster.planner.plan.failed
    cluster.change(Remove("Service", ObjectName("default", "a")))
    assert not cluster.planner.plan.failed
    assert not cluster.planner.plan.ports


def test_the_ports_of_a_service_share_one_health_port():
    cluster = Cluster()
    exposed = service(
        ports=(("http", "TCP", 80), ("admin", "TCP", 81)),
        type="LoadBalancer",
        external_local=True,
        health_check_node_port=32000,
    )
    cluster.change(Upsert("Service", exposed))
    cluster.change(Upsert("EndpointSlice", endpoint_slice("s", endpoint(1), port="http")))
    cluster.change(Upsert("EndpointSlice", endpoint_slice("t", endpoint(2), port="admin")))
    local = HealthPort(32000, frozenset({"10.244.1.1", "10.244.1.2"}))
    assert cluster.planner.plan.health_ports() == {exposed.name: local}
