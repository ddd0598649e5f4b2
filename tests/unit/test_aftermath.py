import asyncio
from errno import EMFILE

import pytest

from pyproxy import aftermath
from pyproxy.aftermath import Left, clean_up_after_others, outlast
from pyproxy.config import IPVS, Config

WAITING = Left("2 virtual servers wait", waits=True)
FAILED = Left("iptables: no right", waits=False)


@pytest.mark.jumping
@pytest.mark.parametrize(
    ("found", "drain_seconds", "expected"),
    [
        pytest.param([None], 900.0, [(0.0, True)], id="all is gone"),
        pytest.param([FAILED], 900.0, [(0.0, True)], id="what fails is not tried again"),
        pytest.param(
            [WAITING, WAITING, None], 900.0, [(0.0, True), (30.0, True), (60.0, True)],
            id="what is in use is looked at again",
        ),
        pytest.param(
            [WAITING, WAITING, None], 45.0, [(0.0, True), (30.0, True), (60.0, False)],
            id="and cut in the end",
        ),
    ],
)  # fmt: skip
async def test_what_others_left(found, drain_seconds, expected, monkeypatch, caplog):
    clock = asyncio.get_running_loop().time
    asked = []

    async def cleaned_up(config, *, patient=True):
        asked.append((clock(), patient))
        return found[len(asked) - 1]

    monkeypatch.setattr(aftermath, "cleaned_up_after_others", cleaned_up)
    config = Config(ipvs=IPVS(drain_timeout_seconds=drain_seconds))
    await clean_up_after_others(config, clock)
    assert asked == expected
    assert ("cannot clean up" in caplog.text) is (FAILED in found)


@pytest.mark.jumping
@pytest.mark.parametrize(
    ("counts", "ended_at", "expected"),
    [
        pytest.param([0], 0.0, [], id="nothing to wait for"),
        pytest.param(
            [3, 3, 1, 0], 3.0, ["waiting for 3 connections of virtual servers, for 45 s at most"],
            id="they end",
        ),
        pytest.param(
            [2], 45.0,
            [
                "waiting for 2 connections of virtual servers, for 45 s at most",
                "waiting for 2 connections of virtual servers, for 15 s at most",
                "2 connections of virtual servers end now, as ipvs.drainTimeout asks",
            ],
            id="they are cut in the end",
        ),
        pytest.param(
            [OSError(EMFILE, "Too many open files"), 0], 1.0,
            [
                "waiting for an unknown number (Too many open files) of connections of virtual"
                " servers, for 45 s at most",
            ],
            id="who cannot look does not know that they have ended",
        ),
    ],
)  # fmt: skip
async def test_connections_are_waited_for_and_told(counts, ended_at, expected, monkeypatch):
    clock = asyncio.get_running_loop().time
    cleaned_at, told = [], []
    rest = list(counts)

    async def held():
        count = rest.pop(0) if len(rest) > 1 else rest[0]
        if isinstance(count, OSError):
            raise count
        return count

    async def cleaned_up(config, *, patient=True):
        cleaned_at.append((clock(), patient))

    monkeypatch.setattr(aftermath, "cleaned_up_after_others", cleaned_up)
    config = Config(ipvs=IPVS(drain_timeout_seconds=45.0))
    assert await outlast(held, config, clock, told.append) is None
    assert (cleaned_at, told) == ([(ended_at, False)], expected)
