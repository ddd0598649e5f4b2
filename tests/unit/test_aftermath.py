import asyncio

import pytest

from pyproxy import aftermath
from pyproxy.aftermath import Left, clean_up_after_others
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
