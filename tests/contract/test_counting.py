"""Counters are read when somebody asks, once for all who ask at a time."""

import asyncio

import pytest

from pyproxy import counting as module
from pyproxy.counters import Counts, Entry, Reading, Where
from pyproxy.counting import Counting
from pyproxy.reconcile import ApplyError
from pyproxy.service_metrics import ServiceMetrics
from tests.builders import address, owner

WEB, ONE = owner("web"), address(1)


class Carrier:
    """Counts as it is told."""

    def __init__(self):
        self.count = 0
        self.asked = []
        self.busy = 0  # how many times a sync comes in between
        self.error = None

    async def counters(self, *, by_endpoint):
        self.asked.append(by_endpoint)
        await asyncio.sleep(0)
        if self.error:
            raise ApplyError(self.error)
        if self.busy:
            self.busy -= 1
            return None
        whole = [Entry("front", None, Counts(self.count))]
        each = [Entry("front", ONE, Counts(self.count))] if by_endpoint else []
        return Reading(whole + each, ((WEB, ("front",)),))


@pytest.fixture
def carriers():
    return {4: Carrier(), 6: Carrier()}


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)


async def test_families_are_added_up(carriers):
    carriers[4].count, carriers[6].count = 2, 3
    found = await Counting(carriers).traffic(by_endpoint=False)
    assert found == {Where(WEB): Counts(5)}


async def test_who_asks_at_once_is_answered_by_one_reading(carriers):
    counting = Counting(carriers)
    found = await asyncio.gather(*(counting.traffic(by_endpoint=True) for _ in range(4)))
    assert carriers[4].asked == [True]
    assert len(set(map(str, found))) == 1


async def test_a_fresh_reading_without_endpoints_does_not_answer_for_them(carriers):
    counting = Counting(carriers)
    await counting.traffic(by_endpoint=False)
    assert Where(WEB, ONE) in await counting.traffic(by_endpoint=True)
    assert carriers[4].asked == [False, True]


async def test_a_sync_in_between_makes_it_read_again(carriers):
    carriers[4].busy = 3
    counting = Counting(carriers)
    assert await counting.traffic(by_endpoint=False) == {Where(WEB): Counts(0)}
    assert carriers[4].asked == [False] * 4
    assert counting.problems == ()


async def test_what_cannot_be_read_is_named_and_the_rest_counts(carriers):
    carriers[4].error, carriers[6].count = "the kernel said no", 7
    counting = Counting(carriers)
    assert await counting.traffic(by_endpoint=False) == {Where(WEB): Counts(7)}
    assert counting.problems == ("the kernel said no",)


async def test_syncs_without_end_are_a_problem_and_no_error(carriers):
    carriers[4].busy = 1000
    counting = Counting(carriers)
    await counting.traffic(by_endpoint=False)
    assert counting.problems == ("syncs follow each other too fast to read counters",)


async def test_metrics_get_what_there_is_and_trouble_is_told_once(carriers, caplog):
    carriers[4].error, carriers[6].count = "the kernel said no", 7
    counting, metrics = Counting(carriers), ServiceMetrics()
    for _ in range(2):
        await counting.publish(metrics, by_endpoint=False)
    samples = [s for family in metrics.collect() for s in family.samples]
    assert [(s.name, s.value) for s in samples] == [("pyproxy_service_connections_total", 7)]
    assert len(caplog.records) == 1
