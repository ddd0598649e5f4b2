import asyncio
from contextlib import asynccontextmanager

import pytest

from pyproxy.lingering import LingeringFeed
from pyproxy.model import Node, ObjectName, Remove, Replace, Service, Upsert
from tests.fakes.feed import FakeFeed

pytestmark = pytest.mark.jumping
WEB, API = (Service(ObjectName("default", name)) for name in ("web", "api"))
GONE = Remove("Service", WEB.name)


@asynccontextmanager
async def heard():
    """A feed to tell things to, and what comes of it, with the time of each."""
    inner, told = FakeFeed(), []
    clock = asyncio.get_running_loop().time
    feed = LingeringFeed(inner, seconds=3.0)

    async def tell(*changes):
        inner.tell(*changes)
        await inner.taken_in()

    async with asyncio.TaskGroup() as tasks:
        job = tasks.create_task(feed.follow(lambda change: told.append((clock(), change))))
        yield tell, told
        job.cancel()


async def test_a_service_that_goes_is_there_for_a_while():
    async with heard() as (tell, told):
        await tell(Upsert("Service", WEB), GONE)
        await asyncio.sleep(10)
    assert told == [(0.0, Upsert("Service", WEB)), (3.0, GONE)]


async def test_one_that_comes_back_never_went():
    again = Upsert("Service", WEB)
    async with heard() as (tell, told):
        await tell(again, GONE)
        await asyncio.sleep(2)
        await tell(again)
        await asyncio.sleep(10)
    assert told == [(0.0, again), (2.0, again)]


async def test_one_that_a_list_lacks_stays_in_it_for_a_while():
    async with heard() as (tell, told):
        await tell(Replace("Service", (WEB, API)))
        await asyncio.sleep(1)
        await tell(Replace("Service", (API,)))
        await asyncio.sleep(1)
        await tell(Replace("Service", (API,)))
        await asyncio.sleep(10)
    both = Replace("Service", (API, WEB))
    assert told[1:] == [(1.0, both), (2.0, both), (4.0, GONE)]


async def test_of_all_else_is_told_at_once():
    node = Upsert("Node", Node("here"))
    gone = Remove("EndpointSlice", ObjectName("default", "web-1"))
    async with heard() as (tell, told):
        await tell(node, gone, GONE)
        await asyncio.sleep(10)
    assert told == [(0.0, node), (0.0, gone), (0.0, GONE)]
