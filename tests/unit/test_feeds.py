import asyncio

import pytest

from pyproxy.config import ClientConnection, Config
from pyproxy.config.flags import Options
from pyproxy.feeds import KubeFeed, feed_from
from pyproxy.metrics import Metrics
from tests.fakes.apiserver import FakeApiServer


@pytest.mark.jumping
async def test_an_error_that_comes_again_and_again_is_logged_once_in_a_while(caplog):
    feed = KubeFeed(api=None, node="here")
    for _ in range(240):
        feed._tell("Service: cannot ask http://api")
        await asyncio.sleep(0.5)
    feed._tell("Node: cannot ask http://api")
    problems = [record.problem for record in caplog.records]
    assert problems == ["Service: cannot ask http://api"] * 2 + ["Node: cannot ask http://api"]


async def test_requests_beyond_the_burst_of_the_settings_wait_for_their_turn():
    clock = asyncio.get_running_loop().time
    config = Config(client_connection=ClientConnection(qps=50.0, burst=2))
    async with FakeApiServer() as server:
        options = Options(master=server.url)
        feed = await feed_from(options, config, "here", Metrics("userspace", (4,)))
        began_at = clock()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                event = feed.record("Starting", "", warning=False, action="", service=None)
                tasks.create_task(event)
        took = clock() - began_at
        await feed.aclose()
    assert len(server.events) == 4
    assert took >= 0.04
