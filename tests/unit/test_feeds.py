import asyncio

import pytest

from pyproxy.feeds import KubeFeed


@pytest.mark.jumping
async def test_an_error_that_comes_again_and_again_is_logged_once_in_a_while(caplog):
    feed = KubeFeed(api=None, node="here")
    for _ in range(240):
        feed._tell("Service: cannot ask http://api")
        await asyncio.sleep(0.5)
    feed._tell("Node: cannot ask http://api")
    problems = [record.problem for record in caplog.records]
    assert problems == ["Service: cannot ask http://api"] * 2 + ["Node: cannot ask http://api"]
