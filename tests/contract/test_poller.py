"""Watching many sockets with one epoll, which all families of a process share."""

import asyncio
import socket

from pyproxy.proxier._poller import EDGE, IN, Poller
from tests.netns.abuse import open_files


class Heard:
    def __init__(self):
        self.events = asyncio.Queue()

    def ready(self, events):
        self.events.put_nowait(events)


async def heard(poller):
    """Return what the poller tells of a socket that is written to."""
    near, far = socket.socketpair()
    watcher = Heard()
    with near, far:
        poller.add(near.fileno(), IN | EDGE, watcher)
        far.send(b"x")
        async with asyncio.timeout(2):
            events = await watcher.events.get()
        poller.discard(near.fileno())
    return events


async def test_users_of_one_event_loop_share_a_poller_until_the_last_has_closed_it():
    files = open_files()
    first, second = Poller.of_loop(), Poller.of_loop()
    assert first is second
    assert open_files() == files + 1
    first.close()
    assert await heard(second) == IN
    second.close()
    assert open_files() == files
    again = Poller.of_loop()
    assert again is not first
    assert await heard(again) == IN
    again.close()


async def test_a_poller_of_its_own_is_not_the_one_that_others_share():
    shared, own = Poller.of_loop(), Poller()
    own.close()
    assert Poller.of_loop() is shared
    for _ in range(2):
        shared.close()
