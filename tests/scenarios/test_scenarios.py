"""Scenario files: what they say is what is, and no lost write changes the end."""

import pytest

from pyproxy.cache import Cache
from pyproxy.model import Upsert
from pyproxy.plan import Planner, Site
from pyproxy.reconcile import Reconciler
from pyproxy.render import COMPILERS, scenes
from pyproxy.topology import Place
from tests.conftest import LoopClock
from tests.fakes.target import FakeTarget
from tests.manifest_builders import rules_text
from tests.scenarios.scenario import FILES, NODE_IPS, outcome, read, rewrite

files = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
modes = pytest.mark.parametrize("mode", COMPILERS)


@files
def test_a_scenario_ends_as_it_says(path, request):
    scenario = read(path)
    found = outcome(scenario)
    if request.config.getoption("rewrite", False):
        rewrite(path, found)
    else:
        assert found == scenario.then, f"{scenario.title}: make scenarios shows the difference"


@files
def test_the_order_of_objects_does_not_matter(path):
    scenario = read(path)
    backwards = {kind: objects[::-1] for kind, objects in scenario.objects.items()}
    text = rules_text("nftables", scenario.objects, scenario.settings)
    assert rules_text("nftables", backwards, scenario.settings) == text


@files
@modes
@pytest.mark.jumping
async def test_a_write_that_fails_changes_nothing_in_the_end(path, mode):
    scenario = read(path)
    for scene in scenes(mode, scenario.objects, scenario.settings):
        undisturbed, writes = await played(scenario, mode, scene, fails_at=None)
        for number in range(writes):
            assert await played(scenario, mode, scene, fails_at=number) == (undisturbed, writes)


async def played(scenario, mode, scene, *, fails_at):
    """Apply the objects one after another, with that write failing and then a sync more.

    Return what the target holds, and how many writes there were to lose.
    """
    family, target = scene.family, FakeTarget()
    cache, planner = Cache(family), Planner()
    compile_owner = COMPILERS[mode](scene)
    reconciler = Reconciler(mode, family, compile_owner, target, LoopClock())
    site = Site(Place(scene.node.name, scene.node.zone), NODE_IPS[family == 6])
    changes = [
        Upsert(kind, obj)
        for kind in ("Service", "EndpointSlice")
        for obj in scenario.objects[kind]
    ]  # fmt: skip
    for number, change in enumerate(changes):
        changed = planner.update(cache.apply(change), cache, site)
        if number == fails_at:
            target.fail_next = 1
        report = await reconciler.sync(planner.plan, changed)
        if report.error is not None:
            report = await reconciler.sync(planner.plan, set())
        assert report.error is None
        target.fail_next = 0  # where nothing was to be written
    return target.holds, len(changes)
