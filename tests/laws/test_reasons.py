"""What ``explain`` says agrees with what the plan does, for any Service port and any origin."""

from hypothesis import given
from hypothesis import strategies as st

from pyproxy.cache import Cache
from pyproxy.explain import ORIGINS, action_from, explain, subject_of
from pyproxy.model import BALANCER_TRAFFIC, Drop, Endpoint, Forward, Pass, Reject, WeightRule
from pyproxy.plan import Planner, Site, plan_port
from pyproxy.reasons import Subject, why, why_masquerade, why_not_admitted
from pyproxy.rules.listeners import Surroundings, action_for, origin_of
from pyproxy.topology import Place
from pyproxy.view import FamilyView, View
from tests.builders import address, endpoint_slice, service, service_port
from tests.laws.test_core import changes

flags = st.booleans()
zones = st.sampled_from(["", "zone-a", "zone-b"])
endpoints = st.builds(
    Endpoint,
    address=st.builds(address, st.integers(1, 6), st.sampled_from([8080, 9090])),
    ready=flags,
    serving=flags,
    terminating=flags,
    node=st.sampled_from(["", "here", "elsewhere", "third"]),
    zone=zones,
    zone_hints=st.frozensets(st.sampled_from(["zone-a", "zone-b"]), max_size=2),
    node_hints=st.frozensets(st.sampled_from(["here", "elsewhere"]), max_size=1),
)
weights = st.sampled_from(
    [(), (WeightRule("node", "here", 0),), (WeightRule("zone", "zone-a", 0),),
     (WeightRule("ip", "10.244.1.1", 3), WeightRule("node", "elsewhere", 0))]
)  # fmt: skip
ports = st.builds(
    service_port,
    internal_local=flags,
    external_local=flags,
    node_port=st.sampled_from([0, 30080]),
    external_ips=st.sampled_from([(), ("198.18.0.1",)]),
    load_balancer_ips=st.sampled_from([(), ("198.18.0.1",), ("198.18.0.2",)]),
    balancer_traffic=st.sampled_from(BALANCER_TRAFFIC),
    source_ranges=st.sampled_from([(), ("203.0.113.0/24",), ("192.0.2.0/24", "10.0.0.0/8")]),
)
sites = st.builds(
    Site,
    place=st.builds(Place, st.just("here"), zones),
    node_ip=st.sampled_from([None, "192.0.2.11"]),
    detects_pods=flags,
    masquerade_all=flags,
)
EFFECTS = {
    "endpoints": Forward,
    "no-endpoints": Reject,
    "no-local-endpoints": Drop,
    "pass-through": Pass,
}
SOURCES = {"pod": "10.244.1.1", "node": "192.0.2.11", "outside": "203.0.113.7"}


def unique(found):
    return tuple({e.address: e for e in found}.values())


@given(ports, weights, st.lists(endpoints, max_size=6).map(unique), sites)
def test_a_reason_agrees_with_the_action_of_every_route_for_every_origin(port, rules, found, site):
    fields = {f: getattr(port, f) for f in port.__struct_fields__}
    port = type(port)(**fields | {"weights": rules})
    of_it = [endpoint_slice("web-x", *found)]
    subject = Subject(service(selector="app=web"), port, found, of_it, site)
    for route in plan_port(port, found, site).routes:
        for origin in ORIGINS:
            action = action_from(route, origin)
            reason = why(subject, route.kind, origin)
            assert EFFECTS[reason.code] is type(action)
            if isinstance(action, Forward):
                masquerade = why_masquerade(subject, route.kind, origin)
                assert (masquerade is not None) == action.masquerade
                used = str(len(action.pool.backends))
                assert used in reason.text, "the number of endpoints is that of the pool"


@given(ports, st.lists(endpoints, max_size=6).map(unique), sites)
def test_who_is_not_admitted_is_whom_the_route_drops(port, found, site):
    around = Surroundings(node_ips=frozenset({"192.0.2.11"}))
    subject = service()
    for route in plan_port(port, found, site).routes:
        for source in SOURCES.values():
            stranger = why_not_admitted(subject, route.allowed_sources, source)
            fate = action_for(route, source, around)
            admitted = action_from(route, origin_of(source, around))
            passes = stranger is None or isinstance(admitted, Pass)
            assert fate == (admitted if passes else Drop())


@given(st.lists(changes, max_size=15))
def test_any_cluster_can_be_explained(history):
    cache, planner = Cache(4), Planner()
    for change in history:
        cache.apply(change)
    site = Site(Place("here", "zone-a"), node_ip="192.0.2.11")
    planner.update(cache.owners(), cache, site)
    around = Surroundings(node_ips=frozenset({"192.0.2.11"}))
    family = FamilyView(4, cache, planner.plan, site, around, frozenset({"192.0.2.11"}))
    view = View("here", "nftables", (family,))
    for name in cache.services():
        explanation = explain(view, {"service": str(name)})
        assert explanation.frontends or explanation.not_ours or not cache.ports(name) or (
            planner.plan.conflicts
        )  # fmt: skip
        for found in explanation.frontends:
            assert sorted(o for case in found.cases for o in case.origins) == sorted(ORIGINS)
    for plan in planner.plan.ports.values():
        owned = cache.services()[plan.owner.service_name]
        (port,) = [p for p in cache.ports(owned.name) if p.name == plan.owner]
        subject = subject_of(family, owned, port)
        for route in plan.routes:
            for origin, source in SOURCES.items():
                where = f"{route.frontend.ip or '192.0.2.11'}:{route.frontend.port}"
                answer = explain(view, {"from": source, "to": where})
                (one,) = answer.frontends
                assert one.frontend == str(route.frontend)
                (case,) = one.cases
                action = action_from(route, case.origins[0])
                assert case.action == type(action).__name__.lower()
                assert EFFECTS[why(subject, route.kind, origin).code]
