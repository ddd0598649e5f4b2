import asyncio
from contextlib import asynccontextmanager

import pytest

from pyproxy.runner import Pace, Runner

pytestmark = pytest.mark.jumping


@asynccontextmanager
async def running(pace, outcomes=()):
    """A runner, and the times of its syncs; ``outcomes`` says which of them fail."""
    loop = asyncio.get_running_loop()
    synced_at, full_at, results = [], [], iter(outcomes)

    async def sync(full):
        synced_at.append(round(loop.time(), 3))
        if full:
            full_at.append(round(loop.time(), 3))
        return next(results, True)

    runner = Runner(pace, sync, loop.time)
    runner.full_at = full_at
    task = loop.create_task(runner.run())
    yield runner, synced_at
    task.cancel()


async def test_the_first_request_is_served_at_once_and_a_burst_is_one_sync():
    async with running(Pace(1.0, 5.0, 10.0)) as (runner, synced_at):
        runner.request()
        await asyncio.sleep(0.1)
        runner.request()
        runner.request()
        await asyncio.sleep(25.0)
    assert synced_at == [0.0, 1.0, 10.0, 20.0]


async def test_requests_wait_for_the_shortest_interval():
    async with running(Pace(1.0, 5.0, 100.0)) as (runner, synced_at):
        for pause in (0.5, 0.499, 5.0):
            runner.request()
            await asyncio.sleep(pause)
    assert synced_at == [0.0, 1.0]


async def test_without_a_shortest_interval_every_request_is_served():
    async with running(Pace(0.0, 5.0, 100.0)) as (runner, synced_at):
        for _ in range(3):
            runner.request()
            await asyncio.sleep(0.01)
    assert synced_at == [0.0, 0.01, 0.02]


async def test_a_failure_is_retried():
    async with running(Pace(1.0, 5.0, 100.0), [False, True]) as (runner, synced_at):
        runner.request()
        await asyncio.sleep(30.0)
    assert synced_at == [0.0, 5.0]


async def test_a_success_in_between_cancels_the_retry():
    async with running(Pace(1.0, 5.0, 100.0), [False, True]) as (runner, synced_at):
        runner.request()
        await asyncio.sleep(2.0)
        runner.request()
        await asyncio.sleep(30.0)
    assert synced_at == [0.0, 2.0]


async def test_a_retry_is_never_early():
    async with running(Pace(3.0, 1.0, 100.0), [False, True]) as (runner, synced_at):
        runner.request()
        await asyncio.sleep(30.0)
    assert synced_at == [0.0, 3.0]


async def test_once_each_longest_interval_the_sync_is_full():
    async with running(Pace(1.0, 5.0, 10.0)) as (runner, synced_at):
        runner.request()
        await asyncio.sleep(4.0)
        runner.request()
        await asyncio.sleep(27.0)
    assert synced_at == [0.0, 4.0, 10.0, 20.0, 30.0]
    assert runner.full_at == [10.0, 20.0, 30.0]
