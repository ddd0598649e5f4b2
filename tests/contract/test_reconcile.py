import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyproxy.cache import Cache
from pyproxy.model import Remove, Upsert
from pyproxy.plan import Planner
from pyproxy.reconcile import Reconciler, Verified
from tests.builders import SITE, endpoint, endpoint_slice, owner, service
from tests.conftest import JumpingLoop, LoopClock
from tests.fakes.target import FakeTarget

pytestmark = pytest.mark.jumping
WEB, API = owner("web"), owner("api")


def compile_owner(port, _before=None):
    return {route.frontend: route for route in port.routes}


class Node:
    """A cluster, a planner and a reconciler on a fake target."""

    def __init__(self, target):
        self.cache = Cache(4)
        self.planner = Planner()
        self.target = target
        self.reconciler = Reconciler("fake", 4, compile_owner, target, LoopClock())

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


@given(st.lists(st.tuples(events, st.sampled_from(["ok", "fail", "steal"])), max_size=12))
def test_increments_equal_a_rewrite_whatever_fails_in_between(history):
    async def story():
        node = Node(FakeTarget())
        for change, trouble in history:
            if trouble == "fail":
                node.target.fail_next = 1
            if trouble == "steal" and node.target.holds:
                node.target.holds.popitem()
                node.reconciler.distrust()
            await node.change(change)
        node.target.fail_next = 0
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
