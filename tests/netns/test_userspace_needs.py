"""Which addresses mode userspace has led here, when something goes wrong on the way."""

import asyncio
import errno
from contextlib import asynccontextmanager
from ipaddress import ip_network

import pytest

from pyproxy.proxier import _usertarget
from pyproxy.proxier._openings import Openings
from pyproxy.proxier._vips import Needs, Vips
from tests.netns import node as node_module
from tests.netns.node import proxied
from tests.netns.standin import printed
from tests.netns.test_userspace import Backend

OUTSIDE = "203.0.113.7"
SHORT = OSError(errno.ENOBUFS, "No buffer space available")


@pytest.fixture
async def node():
    async with proxied(4) as node:
        yield node


async def led():
    """Return the addresses that have a route of ours."""
    words = ["ip", "-4", "route", "show", "table", "all", "proto", "98"]
    routes = (await asyncio.to_thread(printed, *words)).splitlines()
    return {route.split()[1] for route in routes}


@asynccontextmanager
async def own_address(ip):
    await asyncio.to_thread(printed, "ip", "addr", "add", f"{ip}/32", "dev", "lo")
    try:
        yield
    finally:
        await asyncio.to_thread(printed, "ip", "addr", "del", f"{ip}/32", "dev", "lo")


def failing(*_args, **_rest):
    raise SHORT


async def test_a_full_sync_finds_out_anew_who_needs_what(node):
    await node.service("web", 1, external_ips=(OUTSIDE,))
    node.frontends._needs = Needs()
    node.lane.resync()
    assert (await node.observer.next()).error is None
    assert await led() == {node.vip(1), OUTSIDE}
    assert node.frontends._needs.of.keys() == node.frontends._local


async def test_new_addresses_of_the_node_count_although_the_capture_fails(node, monkeypatch):
    await node.service("web", 1, external_ips=(OUTSIDE,))
    assert await led() == {node.vip(1), OUTSIDE}
    async with own_address(OUTSIDE):
        with monkeypatch.context() as patch:
            patch.setattr(node.frontends._fronts.capture, "commit", failing)
            with pytest.raises(OSError, match="No buffer space"):
                await node.host.read()
        await node.service("other", 2)
        assert await led() == {node.vip(1), node.vip(2)}


async def test_what_can_no_more_be_guarded_is_led_here_no_more(monkeypatch, caplog):
    monkeypatch.setattr(node_module, "CAPTURE", "listeners")
    ranges = (ip_network("198.18.0.0/15"),)
    async with proxied(4) as node, Backend(4, "a") as a:
        balancer = {"load_balancer_ips": (OUTSIDE,), "source_ranges": ranges}
        await node.service("web", 1, type="LoadBalancer", **balancer)
        await node.endpoints("web", a.address)
        assert await led() == {node.vip(1), OUTSIDE}
        with monkeypatch.context() as patch:
            patch.setattr(Openings, "protect", failing)
            await node.host.read()
        assert "not served" in caplog.text
        await node.service("other", 2)
        assert OUTSIDE not in await led()


@pytest.mark.parametrize("verb", ["add", "remove"])
async def test_a_route_that_netlink_has_no_room_for_is_an_error_of_the_sync(
    verb, node, monkeypatch
):
    await node.service("web", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Vips, verb, failing)
        report = await node.service("web", 2)
        assert report.error == "cannot lead packets to Services: No buffer space available"
    node.lane.resync()
    async with asyncio.timeout(10):
        while (await node.observer.next()).error is not None:
            pass
    assert await led() == {node.vip(2)}


async def test_a_route_that_is_no_more_in_use_goes_later_where_it_cannot_now(monkeypatch):
    monkeypatch.setattr(_usertarget, "LEAVING_SECONDS", 0.05)
    async with proxied(4) as node, Backend(4, "a") as a:
        await node.service("web", 1)
        await node.endpoints("web", a.address)
        _reader, writer = await node.connect(node.vip(1))
        await asyncio.sleep(0.05)  # in the backlog it is not ours yet
        await node.service("web", 2)
        assert await led() == {node.vip(1), node.vip(2)}
        with monkeypatch.context() as patch:
            patch.setattr(Vips, "remove", failing)
            writer.close()
            report = await node.observer.next()
            assert report.error == "cannot lead packets to Services: No buffer space available"
        async with asyncio.timeout(10):
            while await led() != {node.vip(2)}:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.05)
