"""Who is told of the node's addresses, and what becomes of those that cannot be read."""

import asyncio
from errno import EAFNOSUPPORT, EMFILE, EPERM

import pytest

from pyproxy import host as hosts
from pyproxy.host import Host, HostError, Snapshot

FIRST = Snapshot(frozenset({("lo", "127.0.0.1/8")}))


@pytest.fixture
def _first(monkeypatch):
    monkeypatch.setattr(hosts, "snapshot", lambda *, with_routes: FIRST)


@pytest.mark.usefixtures("_first")
async def test_a_listener_that_fails_keeps_nothing_from_others_and_is_told_again():
    host, told, failures = Host(), [], [OSError(EPERM, "no")]

    def failing():
        told.append("failing")
        if failures:
            raise failures.pop()

    host.on_change(failing)
    host.on_change(lambda: told.append("other"))
    with pytest.raises(OSError, match="no"):
        await host.read()
    assert told == ["failing", "other"]
    assert host.snapshot == FIRST
    await host.read()
    assert told == ["failing", "other"] * 2
    await host.read()
    assert told == ["failing", "other"] * 2, "nothing is new"


def reading(monkeypatch, *outcomes):
    left = list(outcomes)

    def snapshot(*, with_routes):
        found = left.pop(0)
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(hosts, "snapshot", snapshot)
    monkeypatch.setattr(hosts, "RETRY_SECONDS", 0.001)


async def test_a_start_waits_while_descriptors_are_short(monkeypatch):
    reading(monkeypatch, OSError(EMFILE, "short"), OSError(EMFILE, "short"), FIRST)
    host = Host()
    await host.read_at_last()
    assert host.snapshot == FIRST


async def test_a_start_ends_where_interfaces_can_never_be_read(monkeypatch):
    reading(monkeypatch, OSError(EAFNOSUPPORT, "no netlink"))
    with pytest.raises(HostError, match="no netlink"):
        async with asyncio.timeout(2):
            await Host().read_at_last()
