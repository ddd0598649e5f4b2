"""Watching many sockets with one epoll, which all families of a process share."""

import asyncio
import os
import socket
from contextlib import suppress
from selectors import EVENT_READ
from types import SimpleNamespace

import pytest

from pyproxy.proxier import _poller
from pyproxy.proxier._poller import EDGE, IN, Inside, Poller, RelayLoop
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
    own = int(
        not isinstance(asyncio.get_running_loop(), RelayLoop)
    )  # file, where the loop has none
    first, second = Poller.of_loop(), Poller.of_loop()
    assert first is second
    assert open_files() == files + own
    first.close()
    assert await heard(second) == IN
    second.close()
    assert open_files() == files
    again = Poller.of_loop()
    assert await heard(again) == IN
    again.close()


class Busy:
    """Two sockets that answer each other for ever, and leave the loop no pause."""

    def __init__(self, poller):
        self.turns = 0
        self.socks = socket.socketpair()
        for sock in self.socks:
            poller.add(sock.fileno(), IN | EDGE, self)
        self.socks[0].send(b"x")

    def ready(self, _events):
        self.turns += 1
        for sock in self.socks:
            with suppress(BlockingIOError):
                sock.send(sock.recv(1, socket.MSG_DONTWAIT))


@pytest.fixture
async def poller():
    shared = Poller.of_loop()
    yield shared
    shared.close()


async def test_busy_sockets_keep_nobody_from_their_turn(poller):
    """Timers, callbacks, threads, subprocesses and the loop's own sockets are not starved."""
    busy = Busy(poller)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(5):
        began = loop.time()
        await asyncio.sleep(0.05)
        assert 0.04 < loop.time() - began < 1
        await asyncio.to_thread(socket.getaddrinfo, "127.0.0.1", 80)
        server = await asyncio.start_server(lambda _r, writer: writer.close(), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        assert await reader.read() == b""
        writer.close()
        server.close()
        process = await asyncio.create_subprocess_exec("true")
        assert await process.wait() == 0
    turns = busy.turns
    await asyncio.sleep(0.01)
    assert busy.turns > turns
    for sock in busy.socks:
        poller.close_sockets(sock)


async def test_a_watcher_that_fails_keeps_no_event_from_others(poller):
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, told_: told.append(told_))

    class Failing:
        def ready(self, _events):
            raise ZeroDivisionError

    pairs = [socket.socketpair() for _ in range(3)]
    watchers = [Failing(), Heard(), Failing()]
    for (near, far), watcher in zip(pairs, watchers, strict=True):
        far.send(b"x")
        poller.add(near.fileno(), IN | EDGE, watcher)
    async with asyncio.timeout(2):
        assert await watchers[1].events.get() == IN
        await asyncio.sleep(0.01)
    assert [type(found["exception"]) for found in told] == [ZeroDivisionError] * 2
    for near, far in pairs:
        poller.close_sockets(near)
        far.close()


async def test_what_a_watcher_asks_of_the_loop_is_done_before_the_next_event(poller):
    """Also where the loop was to wait for long: a callback, and a timer that ends earlier."""
    loop = asyncio.get_running_loop()
    done = asyncio.Queue()

    class Asking:
        def ready(self, _events):
            loop.call_later(0.01, done.put_nowait, "timer")
            loop.call_soon(done.put_nowait, "callback")

    late = loop.call_later(60, done.put_nowait, "too late")
    near, far = socket.socketpair()
    poller.add(near.fileno(), IN | EDGE, Asking())
    far.send(b"x")
    async with asyncio.timeout(2):
        assert [await done.get(), await done.get()] == ["callback", "timer"]
    late.cancel()
    poller.close_sockets(near)
    far.close()


async def test_a_turn_that_fails_takes_no_turn_from_others(poller):
    told, done = [], asyncio.Queue()
    asyncio.get_running_loop().set_exception_handler(lambda _loop, told_: told.append(told_))

    def fail():
        raise ZeroDivisionError

    poller.again(fail)
    poller.again(lambda: done.put_nowait("turn"))
    async with asyncio.timeout(2):
        assert await done.get() == "turn"
    assert [type(found["exception"]) for found in told] == [ZeroDivisionError]


async def test_the_loop_knows_a_socket_by_itself_and_by_its_number():
    loop, called = asyncio.get_running_loop(), []
    near, far = socket.socketpair()
    with near, far:
        loop.add_reader(near, called.append, "first")
        loop.add_reader(near, called.append, "second")
        loop.add_writer(near.fileno(), called.append, "writes")
        far.send(b"x")
        await asyncio.sleep(0.01)
        assert set(called) == {"second", "writes"}
        loop.remove_writer(near)
        loop.remove_reader(near.fileno())
        called.clear()
        await asyncio.sleep(0.01)
        assert called == []


def test_what_is_closed_can_still_be_unregistered():
    near, far = socket.socketpair()
    inside = Inside()
    with far:
        key = inside.register(near, EVENT_READ)
        near.close()
        assert inside.unregister(near) == key
        assert not inside.get_map()
        with pytest.raises(KeyError):
            inside.get_key(near)
    inside.close()


def test_a_number_that_is_a_watchers_by_now_stays_watched():
    inside, watcher, events = Inside(), SimpleNamespace(), []
    watcher.ready = events.append
    old, other = socket.socketpair()
    number = old.fileno()
    inside.register(number, EVENT_READ)
    near, far = socket.socketpair()
    old.close()
    with other, near, far, socket.socket(fileno=os.dup2(near.fileno(), number)) as new:
        inside.poller.add(new.fileno(), IN | EDGE, watcher)
        inside.unregister(number)
        far.send(b"x")
        inside.poller.look()
        assert events == [IN]
    inside.close()


class Epoll:
    """Tells what a script has: after how many seconds, and how many events at once."""

    def __init__(self, script, monkeypatch):
        self.now = 0.0
        self.naps = []  # for each wait of the script, whether it was slept through
        self._script = list(script)
        self._due = self.now + self._script[0][0]
        monkeypatch.setattr(_poller, "monotonic", lambda: self.now)
        monkeypatch.setattr(_poller, "sched_yield", lambda: None)

    def poll(self, seconds, _most):
        self.now += 1e-6
        if self.now < self._due and not seconds:
            return []
        self.naps.append(self.now < self._due)
        self.now = max(self.now, self._due)
        _gap, count = self._script.pop(0)
        if self._script:
            self._due = self.now + self._script[0][0]
        return [(number, IN) for number in range(1000, 1000 + count)]

    def close(self):
        pass


SOON, LATE = 20e-6, 1e-3


@pytest.mark.parametrize(
    ("script", "naps"),
    [
        ([(SOON, 1)] * 4, [True, False, False, False]),
        ([(LATE, 1)] * 3, [True, True, True]),
        ([(SOON, 1), (SOON, 1), (LATE, 1), (LATE, 1)], [True, False, True, True]),
        ([(SOON, 2), (SOON, 2)], [True, True]),
        ([(SOON, 1), (0, 1), (SOON, 1), (SOON, 1)], [True, False, True, False]),
    ],
    ids=["one soon after the other", "seldom", "a pause", "many at once", "busy without a wait"],
)
def test_a_short_wait_is_spent_awake_where_the_last_was_short_too(script, naps, monkeypatch):
    inside = Inside()
    inside._epoll.close()
    inside._epoll = epoll = Epoll(script, monkeypatch)
    inside._has_company = True
    for _ in script:
        inside.select()
    assert epoll.naps == naps


def test_nobody_stays_awake_on_the_only_processor(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})
    inside = Inside()
    inside._epoll.close()
    inside._epoll = epoll = Epoll([(SOON, 1)] * 3, monkeypatch)
    for _ in range(3):
        inside.select()
    assert epoll.naps == [True, True, True]
