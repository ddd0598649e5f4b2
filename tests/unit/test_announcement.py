"""The Node says how far its Services are programmed: rarely, and whatever the server thinks."""

import asyncio
import json
import logging
from itertools import pairwise

import pytest

from pyproxy.announcement import ANNOTATION, CALM, keep_announcing, text_of

pytestmark = pytest.mark.jumping
PERIOD = 30.0


class Lane:
    """How far a family is written."""

    def __init__(self, services, slices):
        self._written = {"Service": services, "EndpointSlice": slices}

    def written(self, kind):
        return self._written[kind]


class Server:
    """Takes annotations in, or has a reason not to."""

    def __init__(self):
        self.problem = None
        self.asked = []

    async def announce(self, annotations):
        self.asked.append((asyncio.get_running_loop().time(), annotations[ANNOTATION]))
        return self.problem


async def running(server, current, seconds):
    job = asyncio.ensure_future(keep_announcing(current, server.announce, PERIOD, lambda: 0.5))  # noqa: TID251 - it never ends
    await asyncio.sleep(seconds)
    job.cancel()
    await asyncio.gather(job, return_exceptions=True)


async def test_what_both_families_have_written_counts():
    text = text_of("nftables", [Lane(7, 20), Lane(9, 18)])
    assert json.loads(text) == {"mode": "nftables", "services": "7", "endpointSlices": "18"}


async def test_a_change_is_told_at_the_next_turn_and_once():
    server, loop = Server(), asyncio.get_running_loop()
    await running(server, lambda: "old" if loop.time() < 200 else "new", 1000)
    (first_at, first), (second_at, second) = server.asked
    assert (first, second) == ("old", "new")
    assert 0 <= first_at <= PERIOD
    assert 200 <= second_at <= 200 + PERIOD


async def test_changes_that_follow_each_other_are_told_no_more_often_than_allowed():
    server, loop = Server(), asyncio.get_running_loop()
    await running(server, lambda: str(loop.time()), 1000)
    times = [at for at, _ in server.asked]
    assert [round(b - a, 3) for a, b in pairwise(times)] == [PERIOD] * (len(times) - 1)


async def test_a_refusal_is_told_once_and_tried_again_rarely(caplog):
    server, loop = Server(), asyncio.get_running_loop()
    server.problem = "403 forbidden"
    loop.call_at(1000, setattr, server, "problem", None)
    with caplog.at_level(logging.INFO):
        await running(server, lambda: "now", 2000)
    assert caplog.messages == [
        "the Node cannot tell what is programmed", "the Node tells again what is programmed",
    ]  # fmt: skip
    assert len(server.asked) <= 2 + 1000 / (PERIOD * CALM)
