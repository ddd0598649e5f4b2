"""What holds for any input: deltas, turns, caches, plans."""

from ipaddress import ip_network
from itertools import pairwise, product

from hypothesis import given
from hypothesis import strategies as st

from pyproxy.balancer import LONGEST_TURN, turn_of
from pyproxy.cache import Cache
from pyproxy.delta import diff, merge, patch
from pyproxy.model import (
    PROTOS,
    Address,
    Backend,
    Drop,
    Endpoint,
    Forward,
    Frontend,
    ObjectName,
    Pool,
    Remove,
    Replace,
    Route,
    Upsert,
)
from pyproxy.plan import Planner, plan_port
from pyproxy.rules.guard import guard
from pyproxy.rules.listeners import Surroundings, action_for, action_for_all
from tests.builders import SITE, address, endpoint_slice, service, service_port
from tests.trace.cbpf import verdict

mappings = st.dictionaries(st.integers(0, 8), st.integers(0, 3))
names = st.sampled_from(["a", "b", "c"])


@given(mappings, mappings)
def test_patch_inverts_diff(old, new):
    assert patch(old, diff(old, new)) == new
    assert bool(diff(old, new)) == (old != new)


@given(st.dictionaries(names, mappings), st.dictionaries(names, mappings))
def test_merged_deltas_of_owners_are_the_delta_of_the_whole(before, after):
    def united(states):  # owners never hold the same key: the first takes it
        whole, by_owner = {}, {}
        for owner in sorted(states):
            by_owner[owner] = {k: v for k, v in states[owner].items() if k not in whole}
            whole |= by_owner[owner]
        return whole, by_owner

    old, old_by_owner = united(before)
    new, new_by_owner = united(after)
    owners = old_by_owner.keys() | new_by_owner.keys()
    parts = [diff(old_by_owner.get(o, {}), new_by_owner.get(o, {})) for o in owners]
    assert merge(parts) == diff(old, new)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_a_full_turn_gives_every_backend_exactly_its_share(weights):
    backends = tuple(Backend(address(n), weight) for n, weight in enumerate(weights))
    turn = turn_of(Pool(backends))
    assert len(turn) <= LONGEST_TURN
    for backend in backends:
        assert turn.count(backend.address) * sum(weights) == backend.weight * len(turn)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_a_backend_comes_at_even_distances(weights):
    backends = tuple(Backend(address(n), weight) for n, weight in enumerate(weights))
    turn = turn_of(Pool(backends))
    for backend in backends:
        at = [n for n, found in enumerate(turn) if found == backend.address]
        distances = [later - n for n, later in pairwise([*at, at[0] + len(turn)])]
        for distance in distances:
            assert abs(distance - len(turn) / len(at)) <= len(set(weights))


ips = st.just("") | st.ip_addresses().map(str)


@given(st.builds(Frontend, ips, st.integers(1, 65535), st.sampled_from(PROTOS)))
def test_a_frontend_is_read_as_it_is_printed(frontend):
    assert Frontend.parse(str(frontend)) == frontend


flags = st.booleans()
hints = st.frozensets(st.sampled_from(["zone-a", "zone-b"]), max_size=2)
endpoints = st.builds(
    Endpoint,
    address=st.builds(address, st.integers(1, 6), st.sampled_from([8080, 9090])),
    ready=flags,
    serving=flags,
    terminating=flags,
    node=st.sampled_from(["", "here", "elsewhere"]),
    zone_hints=hints,
    node_hints=st.frozensets(st.sampled_from(["here", "elsewhere"]), max_size=1),
)
services = st.builds(
    lambda name, ip, external_ips, node_port, **rest: service(
        name,
        f"10.96.0.{ip}",
        external_ips=external_ips,
        ports=(("", "TCP", 80, node_port),),
        **rest,
    ),
    name=names,
    ip=st.integers(1, 3),
    external_ips=st.sampled_from([(), ("198.18.0.1",), ("198.18.0.1", "198.18.0.2")]),
    node_port=st.sampled_from([0, 30080]),
    type=st.sampled_from(["ClusterIP", "NodePort", "ExternalName"]),
    internal_local=flags,
    external_local=flags,
)
slices = st.builds(
    lambda name, of, found: endpoint_slice(name, *found, of=of),
    st.sampled_from(["s", "t", "u"]),
    names,
    st.lists(endpoints, max_size=4),
)
changes = st.one_of(
    services.map(lambda s: Upsert("Service", s)),
    slices.map(lambda s: Upsert("EndpointSlice", s)),
    names.map(lambda n: Remove("Service", ObjectName("default", n))),
    st.sampled_from(["s", "t", "u"]).map(
        lambda n: Remove("EndpointSlice", ObjectName("default", n))
    ),
    st.lists(services, max_size=3, unique_by=lambda s: s.name).map(
        lambda found: Replace("Service", tuple(found))
    ),
)


@given(st.lists(changes, max_size=25), st.data())
def test_a_plan_with_a_memory_equals_one_made_from_nothing(history, data):
    cache, planner = Cache(4), Planner()
    pending, told = set(), {}
    for change in history:
        pending |= cache.apply(change)
        if data.draw(flags):
            for owner in planner.update(pending, cache, SITE):
                told[owner] = planner.plan.ports.get(owner)
            pending = set()
    for owner in planner.update(pending, cache, SITE):
        told[owner] = planner.plan.ports.get(owner)

    fresh = Planner()
    fresh.update(cache.owners(), cache, SITE)
    assert planner.plan.ports == fresh.plan.ports
    assert planner.plan.conflicts == fresh.plan.conflicts
    assert {o: p for o, p in told.items() if p is not None} == fresh.plan.ports
    claimed = [r.frontend for p in fresh.plan.ports.values() for r in p.routes]
    assert len(claimed) == len(set(claimed)), "a frontend has one owner"


@given(st.lists(slices, max_size=6, unique_by=lambda s: s.name), st.randoms())
def test_objects_in_any_order_give_the_same_plan(found, random):
    objects = [Upsert("EndpointSlice", s) for s in found]
    objects += [Upsert("Service", service(n, f"10.96.0.{i}")) for i, n in enumerate("abc", 1)]
    plans = []
    for _ in range(2):
        random.shuffle(objects)
        cache, planner = Cache(4), Planner()
        for change in objects:
            planner.update(cache.apply(change), cache, SITE)
        plans.append(
            {
                owner: {(r.frontend, kind(r.from_pod)) for r in plan.routes}
                for owner, plan in planner.plan.ports.items()
            }
        )
    assert plans[0] == plans[1]


def kind(action):
    return type(action).__name__


@given(st.lists(endpoints, max_size=6), flags, flags, st.sampled_from([0, 30080]))
def test_local_pools_are_local_and_no_backend_is_invented(found, internal, external, node_port):
    port = service_port(internal_local=internal, external_local=external, node_port=node_port)
    plan = plan_port(port, found, SITE)
    known = {e.address for e in found}
    for route in plan.routes:
        local = internal if route.kind == "ClusterIP" else external
        for action in (route.from_pod, route.from_node, route.from_outside):
            if isinstance(action, Forward):
                assert {b.address for b in action.pool.backends} <= known
        if local and isinstance(route.from_outside, Forward):
            assert all(b.is_local for b in route.from_outside.pool.backends)


SOURCES = {
    4: ["10.244.1.1", "10.244.2.9", "192.0.2.11", "192.0.2.50", "127.0.0.1", "203.0.113.7"],
    6: ["fd00:10:244::5", "fd00:c0de::11", "fd00:c0de::50", "::1", "2001:db8::1", "fd00:5e::1"],
}
NETWORKS = {
    4: ["10.0.0.0/8", "10.244.1.0/24", "192.0.2.0/26", "203.0.113.7/32", "0.0.0.0/1"],
    6: ["fd00::/8", "fd00:10:244::/48", "fd00:c0de::11/128", "2001:db8::/33", "fd00:5e::/127"],
}
FORWARD = Forward(Pool((Backend(Address("10.244.1.1", 8080)),)))
ORIGINS = list(product([FORWARD, Drop()], repeat=3))


@given(st.sampled_from([4, 6]), st.sampled_from(ORIGINS), st.data())
def test_a_guard_drops_exactly_what_the_route_drops(family, actions, data):
    networks = [ip_network(text) for text in NETWORKS[family]]
    subsets = st.lists(st.sampled_from(networks), min_size=1, max_size=5, unique=True)
    allowed = data.draw(st.none() | subsets.map(tuple))
    around = Surroundings(
        node_ips=frozenset(SOURCES[family][2:3]),
        pods=tuple(data.draw(subsets)) if data.draw(flags) else (),
        loopback=(ip_network("127.0.0.0/8" if family == 4 else "::1/128"),),
    )
    route = Route(Frontend("10.96.0.1", 80, "TCP"), "LoadBalancer", *actions, allowed)
    program = guard(route, around, family)
    assert program is not None
    for_all = action_for_all(route)
    for source in SOURCES[family]:
        assert for_all is None or for_all is action_for(route, source, around)
        dropped = isinstance(action_for(route, source, around), Drop)
        assert verdict(program, source) is not dropped
