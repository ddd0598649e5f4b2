"""A Service that a mode cannot pack, by a mistake of ours, is named; all others are served."""

import pytest

from tests.builders import owner
from tests.netns.node import proxied
from tests.netns.test_userspace import Backend

BAD = {
    "nftables": {"affinity_seconds": 1 << 70},  # no form has room for so many
    "iptables": {"port": 70_000},
    "userspace": {"port": -1},
}


@pytest.mark.parametrize("mode", BAD)
async def test_a_service_that_cannot_be_packed_stays_as_it_was_and_stops_nobody(mode, uplink):
    async with Backend(4, "a") as a, proxied(4, mode=mode) as node:
        await node.service("bad", 1)
        await node.endpoints("bad", a.address)
        assert await node.ask(node.vip(1)) == b"a ?"
        report = await node.service("bad", 1, **BAD[mode])
        assert (report.error, set(report.failed)) == (None, {owner("bad")})
        assert await node.ask(node.vip(1)) == b"a ?"
        await node.service("good", 2)
        await node.endpoints("good", a.address)
        assert await node.ask(node.vip(2)) == b"a ?"
        report = await node.service("bad", 1, affinity_seconds=60)
        assert report.failed == {}
        assert await node.ask(node.vip(1)) == b"a ?"
