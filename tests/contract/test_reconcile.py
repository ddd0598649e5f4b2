from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyproxy.cache import Cache
from pyproxy.model import PortPlan, Remove, Upsert
from pyproxy.plan import Plan, Planner, plan_port
from pyproxy.proxier import modes
from pyproxy.reconcile import Reconciler, Verified
from pyproxy.rules import iptables, ipvs, listeners, nftables
from tests.builders import SITE, endpoint, endpoint_slice, owner, service, service_port
from tests.conftest import JumpingLoop, LoopClock
from tests.fakes.target import FakeTarget

pytestmark = pytest.mark.jumping
WEB, API = owner("web"), owner("api")


def compile_owner(port, _before=None):
    return {route.frontend: route for route in port.routes}


class Mode:
    """A mode that stumbles over some owners."""

    def __init__(self):
        self.stumbles_over = set()

    def compile_owner(self, port, before):
        if port.owner in self.stumbles_over:
            raise KeyError("no mode is without mistakes")
        return compile_owner(port, before)


class Node:
    """A cluster, a planner and a reconciler on a fake target."""

    def __init__(self, target):
        self.cache = Cache(4)
        self.planner = Planner()
        self.target = target
        self.mode = Mode()
        self.reconciler = Reconciler("fake", 4, self.mode.compile_owner, target, LoopClock())

    async def change(self, *changes):
        pending = set()
        for change in changes:
            pending |= self.cache.apply(change)
        changed = self.planner.update(pending, self.cache, SITE)
        return await self.reconciler.sync(self.planner.plan, changed)

    def wanted(self):
        plans = self.planner.plan.ports.values()
        return {key: value for plan in plans for key, value in compile_owner(plan).items()}


def put(*objects):
    return [Upsert(type(obj).__name__, obj) for obj in objects]


@pytest.fixture
def node():
    return Node(FakeTarget())


def size(report):
    return report.added, report.changed, report.removed


async def test_the_first_sync_is_full_and_the_next_ones_write_what_changed(node):
    report = await node.change(*put(service("web"), service("api", "10.96.0.2")))
    assert (report.full, size(report)) == (True, (2, 0, 0))
    report = await node.change(*put(endpoint_slice("s", endpoint(1))))
    assert (report.full, report.owners, size(report)) == (False, 1, (0, 1, 0))
    report = await node.change(Remove("Service", API.service_name))
    assert size(report) == (0, 0, 1)
    assert node.target.holds == node.wanted()


async def test_a_restart_with_nothing_changed_changes_nothing(node):
    await node.change(*put(service("web")))
    again = Node(FakeTarget(node.target.holds))
    report = await again.change(*put(service("web")))
    assert (report.full, size(report)) == (True, (0, 0, 0))


async def test_a_restart_removes_what_went_while_nobody_looked(node):
    await node.change(*put(service("web"), service("api", "10.96.0.2")))
    again = Node(FakeTarget(node.target.holds))
    report = await again.change(*put(service("web", "10.96.0.9")))
    assert size(report) == (1, 0, 2)
    assert again.target.holds == again.wanted()


async def test_after_a_failure_the_next_sync_looks_at_everything(node):
    await node.change(*put(service("web")))
    node.target.fail_next = 1
    report = await node.change(*put(service("api", "10.96.0.2"), service("c", "10.96.0.3")))
    assert report.error == "the kernel said no"
    report = await node.change()
    assert (report.full, report.error) == (True, None)
    assert node.target.holds == node.wanted()


async def test_what_is_refused_does_not_stop_the_rest_and_is_tried_again(node):
    (web,) = [r.frontend for r in service_routes("web")]
    node.target.refuses = {web}
    report = await node.change(*put(service("web"), service("api", "10.96.0.2")))
    assert report.error is None
    assert report.unserved == (f"{web} is not to be had",)
    assert len(node.target.holds) == 1
    assert (await node.change()).unserved == (f"{web} is not to be had",)
    node.target.refuses = set()
    report = await node.change()
    assert (report.unserved, size(report)) == ((), (1, 0, 0))
    assert node.target.holds == node.wanted()


def service_routes(name):
    node = Node(FakeTarget())
    node.planner.update(node.cache.apply(*put(service(name))), node.cache, SITE)
    return [route for plan in node.planner.plan.ports.values() for route in plan.routes]


async def test_an_owner_that_cannot_be_compiled_keeps_what_it_has_and_stops_nobody(node):
    await node.change(*put(service("web")))
    before = dict(node.target.holds)
    node.mode.stumbles_over = {WEB, API}
    report = await node.change(
        *put(
            endpoint_slice("s", endpoint(1)), service("api", "10.96.0.2"), service("c", "10.96.0.3")
        )
    )
    assert report.error is None
    assert set(report.failed) == set(report.refused) == {WEB, API}
    mistake = "KeyError: 'no mode is without mistakes' (contract/test_reconcile.py:"
    assert report.failed[WEB].startswith(mistake)
    assert report.refused[WEB] == (f"{WEB}: {report.failed[WEB]}",)
    (new,) = (route.frontend for route in node.planner.plan.ports[owner("c")].routes)
    assert node.target.holds == before | {new: node.wanted()[new]}


async def test_an_owner_whose_entries_the_target_stumbles_over_is_found_and_stops_nobody(node):
    await node.change(*put(service("web"), service("api", "10.96.0.2")))
    before = dict(node.target.holds)
    node.target.stumbles_over = {route.frontend for route in service_routes("web")}
    with pytest.raises(KeyError, match="no target is without mistakes"):
        await node.change(*put(endpoint_slice("s", endpoint(1)), service("c", "10.96.0.3")))
    assert node.target.holds == before, "nobody knows yet whose mistake it is"
    report = await node.change()
    assert (report.error, set(report.failed), report.full) == (None, {WEB}, True)
    (new,) = (route.frontend for route in node.planner.plan.ports[owner("c")].routes)
    assert node.target.holds == before | {new: node.wanted()[new]}
    report = await node.change(*put(service("d", "10.96.0.4")))
    assert (report.error, set(report.failed), report.added) == (None, {WEB}, 1)
    node.target.stumbles_over = set()
    report = await node.change()
    assert (report.failed, report.changed) == ({}, 1)
    assert node.target.holds == node.wanted()
    node.target.rehearsed.clear()
    await node.change(*put(service("e", "10.96.0.5")))
    assert node.target.rehearsed == []


async def test_nothing_is_rehearsed_while_all_is_well(node):
    await node.change(*put(service("web"), service("api", "10.96.0.2")))
    node.mode.stumbles_over = {API}  # of compiling, another mistake
    await node.change(*put(endpoint_slice("s", endpoint(1)), service("c", "10.96.0.3")))
    await node.change()
    assert node.target.rehearsed == []


COMPILERS = {
    "userspace": listeners.compile_owner,
    "iptables": partial(iptables.compile_owner, iptables.Ruleset(4)),
    "nftables": partial(nftables.compile_owner, nftables.Ruleset(4)),
    "ipvs": partial(ipvs.compile_owner, ipvs.Ruleset(nftables.Ruleset(4), ("192.0.2.11",))),
}


@pytest.mark.parametrize("mode", modes())
async def test_in_every_mode_a_port_that_cannot_be_compiled_stops_nobody(mode):
    target = FakeTarget()
    reconciler = Reconciler(mode, 4, COMPILERS[mode], target, LoopClock())
    plan = Plan()
    plan.put(WEB, plan_port(service_port(name=WEB), [endpoint(1)], SITE))
    await reconciler.sync(plan, {WEB})
    before = dict(target.holds)
    api = service_port(name=API, cluster_ip="10.96.0.2")
    plan.put(WEB, PortPlan(WEB, ("no route",), frozenset()))
    plan.put(API, plan_port(api, [endpoint(2)], SITE))
    report = await reconciler.sync(plan, {WEB, API})
    assert (report.error, set(report.failed)) == (None, {WEB})
    assert before.items() < target.holds.items()
    assert await reconciler.verify({WEB, API}) == Verified(len(target.holds))


@pytest.mark.parametrize("trouble", ["none", "distrust", "lost write"])
async def test_whatever_it_has_is_kept_and_written_again_until_it_can_be_compiled(node, trouble):
    await node.change(*put(service("web"), service("api", "10.96.0.2")))
    before = dict(node.target.holds)
    node.mode.stumbles_over = {WEB}
    if trouble == "distrust":
        node.target.holds = {}
        node.reconciler.distrust()
    if trouble == "lost write":
        node.target.fail_next = 1
        await node.change(*put(service("c", "10.96.0.3")), Remove("Service", API.service_name))
    report = await node.change(*put(endpoint_slice("s", endpoint(1))))
    assert (set(report.failed), report.full) == ({WEB}, trouble != "none")
    assert before.items() - node.target.holds.items() <= {
        (frontend, route) for frontend, route in before.items() if frontend.ip == "10.96.0.2"
    }
    node.mode.stumbles_over = set()
    report = await node.change()
    assert (report.failed, report.refused, report.changed) == ({}, {}, 1)
    assert node.target.holds == node.wanted()


async def test_one_that_cannot_be_compiled_goes_when_its_service_does(node):
    await node.change(*put(service("web"), service("api", "10.96.0.2")))
    node.mode.stumbles_over = {WEB}
    assert WEB in (await node.change(*put(endpoint_slice("s", endpoint(1))))).failed
    report = await node.change(Remove("Service", WEB.service_name))
    assert (report.failed, size(report)) == ({}, (0, 0, 1))
    assert node.target.holds == node.wanted()


async def test_one_that_cannot_be_compiled_gives_up_what_another_wants_now(node):
    await node.change(*put(service("web", "10.96.0.1", external_ips=("198.18.0.1",))))
    node.mode.stumbles_over = {WEB}
    await node.change(*put(service("web", "10.96.0.1")))
    assert {frontend.ip for frontend in node.target.holds} == {"10.96.0.1", "198.18.0.1"}
    await node.change(
        *put(service("api", "10.96.0.2", external_ips=("198.18.0.1",))),
        *put(endpoint_slice("a", endpoint(1), of="api")),
    )
    api = {route.frontend: route for route in node.planner.plan.ports[API].routes}
    assert api.items() <= node.target.holds.items()
    node.reconciler.distrust()
    assert size(await node.change()) == (0, 0, 0)


async def test_distrust_repairs_what_somebody_else_did(node):
    await node.change(*put(service("web"), service("api", "10.96.0.2")))
    node.target.holds.popitem()
    assert not (await node.change()).full
    node.reconciler.distrust()
    report = await node.change()
    assert (report.full, size(report)) == (True, (1, 0, 0))
    assert node.target.holds == node.wanted()


async def test_distrust_during_a_sync_is_for_the_next_one(node):
    await node.change(*put(service("web")))
    apply = node.target.apply

    async def apply_and_doubt(delta):
        node.reconciler.distrust()
        return await apply(delta)

    node.target.apply = apply_and_doubt
    assert not (await node.change(*put(service("api", "10.96.0.2")))).full
    node.target.apply = apply
    assert (await node.change()).full
    assert not (await node.change()).full


async def test_a_frontend_that_changes_hands_is_changed_and_not_torn_down(node):
    shared = {"external_ips": ("198.18.0.1",)}
    await node.change(*put(service("web", "10.96.0.1", **shared)))
    report = await node.change(
        Remove("Service", WEB.service_name), *put(service("api", "10.96.0.2", **shared))
    )
    assert size(report) == (1, 0, 1), "both refuse: nothing to do for the shared frontend"
    assert node.target.holds == node.wanted()


names = st.sampled_from(["web", "api", "c"])
events = st.one_of(
    st.builds(
        lambda name, ip, external: put(service(name, f"10.96.0.{ip}", external_ips=external))[0],
        names,
        st.integers(1, 4),
        st.sampled_from([(), ("198.18.0.1",)]),
    ),
    st.builds(
        lambda name, number: put(endpoint_slice(name, endpoint(number), of=name))[0],
        names,
        st.integers(1, 3),
    ),
    names.map(lambda name: Remove("Service", owner(name).service_name)),
)


def isolated(ports, broken, before):
    """Return the state of each owner: who is broken keeps what nobody else wants."""
    states = {o: compile_owner(port) for o, port in ports.items() if o not in broken}
    taken = {key for state in states.values() for key in state}
    for o in broken & ports.keys():
        states[o] = {k: v for k, v in before.get(o, {}).items() if k not in taken}
    return states


troubles = st.sampled_from(["ok", "fail", "steal"])
mistakes = st.sets(names.map(owner))


@given(st.lists(st.tuples(events, troubles, mistakes), max_size=12))
def test_increments_equal_a_rewrite_whatever_and_whoever_fails_in_between(history):
    async def story():
        node, states = Node(FakeTarget()), {}
        for change, trouble, broken in history:
            if trouble == "fail":
                node.target.fail_next = 1
            if trouble == "steal" and node.target.holds:
                node.target.holds.popitem()
                node.reconciler.distrust()
            node.mode.stumbles_over = broken
            report = await node.change(change)
            assert report.failed.keys() <= broken
            if report.error is None:
                states = isolated(node.planner.plan.ports, broken, states)
                assert node.target.holds == {k: v for s in states.values() for k, v in s.items()}
        node.target.fail_next, node.mode.stumbles_over = 0, set()
        await node.change()
        assert node.target.holds == node.wanted()

    loop = JumpingLoop()
    try:
        loop.run_until_complete(story())
    finally:
        loop.close()


async def test_it_verifies_what_it_wrote_and_names_what_is_otherwise(node):
    await node.change(*put(service("web"), service("api", "10.96.0.2")))
    assert await node.reconciler.verify({WEB, API}) == Verified(2)
    (key,) = [key for key in node.target.holds if key.ip == "10.96.0.2"]
    del node.target.holds[key]
    before = dict(node.target.holds)
    found = await node.reconciler.verify({WEB, API})
    assert [(d.entry, d.held) for d in found.differences] == [(str(key), None)]
    assert await node.reconciler.verify({WEB}) == Verified(1)
    assert node.target.holds == before, "to look changes nothing"


async def test_nothing_can_be_verified_before_the_first_write_or_after_a_failed_one(node):
    assert await node.reconciler.verify({WEB}) is None
    await node.change(*put(service("web")))
    node.target.fail_next = 1
    await node.change(*put(service("api", "10.96.0.2")))
    assert await node.reconciler.verify({WEB}) is None
    await node.change()
    assert await node.reconciler.verify({WEB, API}) == Verified(2)


async def test_a_sync_that_comes_in_between_makes_a_look_worthless(node):
    await node.change(*put(service("web")))
    compare = node.target.compare

    async def compare_while_it_changes(wanted):
        found = await compare(wanted)
        await node.change(*put(service("api", "10.96.0.2")))
        return found

    node.target.compare = compare_while_it_changes
    assert await node.reconciler.verify({WEB}) is None


async def test_what_the_target_refused_is_told_by_owner_and_not_expected_of_it(node):
    report = await node.change(*put(service("web")))
    (key,) = node.target.holds
    node.target.refuses = {key}
    report = await node.change(*put(service("web", ports=(("", "TCP", 80, 30080),))))
    node.reconciler.distrust()
    node.target.holds = {}
    report = await node.change()
    assert report.refused == {WEB: (f"{key} is not to be had",)}
    assert await node.reconciler.verify({WEB}) == Verified(1)
