"""A lane on a fake target, on a clock that jumps."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from pyproxy.cache import Cache
from pyproxy.lane import Lane
from pyproxy.model import Upsert
from pyproxy.reconcile import Reconciler
from pyproxy.runner import Pace
from tests.builders import SITE, endpoint, endpoint_slice, owner, service
from tests.conftest import LoopClock
from tests.fakes.target import FakeTarget

pytestmark = pytest.mark.jumping
RETRY_SECONDS = 30.0


class Observer:
    def __init__(self):
        self.reports = []

    def requested(self, family):
        pass

    def synced(self, report):
        self.reports.append(report)


class Mode:
    """A mode that cannot take some Services."""

    def __init__(self):
        self.stumbles_over = set()

    def compile_owner(self, port, _before):
        if port.owner.service in self.stumbles_over:
            raise ZeroDivisionError("no mode is without mistakes")
        return {route.frontend: route for route in port.routes}


@asynccontextmanager
async def running():
    mode, target, clock = Mode(), FakeTarget(), LoopClock()
    pace = Pace(0.0, RETRY_SECONDS, 3600.0)
    lane = Lane(4, Cache(4), pace, clock, Observer(), lambda: None)
    lane.move(SITE)
    lane.start(Reconciler("fake", 4, mode.compile_owner, target, clock))
    task = asyncio.get_running_loop().create_task(lane.run())
    try:
        yield lane, mode, target
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def stumbling(_delta):
    raise ZeroDivisionError("no target is without mistakes")


def put(lane, obj):
    lane.change(Upsert(type(obj).__name__, obj))


async def test_a_service_that_cannot_be_compiled_stops_no_other_and_is_tried_again():
    async with running() as (lane, mode, target):
        mode.stumbles_over = {"api"}
        put(lane, service("web"))
        put(lane, service("api", "10.96.0.2"))
        await asyncio.sleep(1.0)
        assert lane.progress.error is None
        assert lane.progress.state(owner("web")) == "programmed"
        assert lane.progress.state(owner("api")) == "refused"
        (why,) = lane.progress.refusals(owner("api"))
        assert "default/api:" in why
        assert "ZeroDivisionError: no mode is without mistakes" in why
        assert {frontend.ip for frontend in target.holds} == {"10.96.0.1"}
        mode.stumbles_over = set()
        await asyncio.sleep(RETRY_SECONDS)
        assert lane.progress.state(owner("api")) == "programmed"
        assert {frontend.ip for frontend in target.holds} == {"10.96.0.1", "10.96.0.2"}


async def test_a_service_that_cannot_be_planned_stops_no_other_and_is_tried_again():
    async with running() as (lane, _mode, target):
        put(lane, service("api", "10.96.0.2"))
        put(lane, endpoint_slice("s", endpoint(1), of="api"))
        await asyncio.sleep(1.0)
        put(lane, service("api", "10.96.0.2", weights=("no rule",)))
        put(lane, service("web"))
        await asyncio.sleep(1.0)
        assert {frontend.ip for frontend in target.holds} == {"10.96.0.1", "10.96.0.2"}
        assert lane.progress.state(owner("api")) == "refused"
        put(lane, service("api", "10.96.0.2", external_ips=("198.18.0.1",)))
        await asyncio.sleep(1.0)
        assert lane.progress.state(owner("api")) == "programmed"
        assert len(target.holds) == 3


async def test_a_service_that_fails_does_not_make_each_sync_a_full_one():
    async with running() as (lane, mode, _target):
        reports = lane._observer.reports
        mode.stumbles_over = {"api"}
        put(lane, service("api", "10.96.0.2"))
        await asyncio.sleep(3700.0)
        assert [report.full for report in reports].count(True) == 2
        assert len(reports) > 100


async def test_a_sync_that_crashes_is_tried_again_and_loses_nothing(caplog):
    async with running() as (lane, _mode, target):
        put(lane, service("web"))
        await asyncio.sleep(1.0)
        apply = target.apply
        target.apply = stumbling
        put(lane, service("api", "10.96.0.2"))
        put(lane, service("dns", "10.96.0.3"))
        put(lane, endpoint_slice("s", endpoint(1)))
        await asyncio.sleep(1.0)
        assert lane.progress.error == "ZeroDivisionError: no target is without mistakes"
        assert "sync crashed" in caplog.text
        assert {frontend.ip for frontend in target.holds} == {"10.96.0.1"}
        target.apply = apply
        await asyncio.sleep(RETRY_SECONDS)
        assert lane.progress.error is None
        assert {frontend.ip for frontend in target.holds} == {"10.96.0.1", "10.96.0.2", "10.96.0.3"}
        (pool,) = [r.from_pod.pool for f, r in target.holds.items() if f.ip == "10.96.0.1"]
        assert [backend.address.port for backend in pool.backends] == [8080]
