"""A start without the API server, and its return."""

import asyncio
import contextlib
import resource
import shutil
import threading

import pytest

from pyproxy import remembered
from pyproxy.metrics import Metrics
from pyproxy.model import KINDS, Node, Remove, Replace, Upsert
from pyproxy.remembered import RememberedFeed, Times
from tests.builders import service
from tests.fakes.feed import FakeFeed

ORIGIN = "Node here of http://api"
SAVED_AT = 1000.0
HERE, WEB, API = Node("here"), service("web"), service("api")
QUICK = Times(patience=0.05, delay=0.01, hurry=0.0)
SLOW = Times(patience=0.05, delay=1000.0, hurry=0.0)
LISTS = {
    **{kind: Replace(kind, ()) for kind in KINDS},
    "Service": Replace("Service", (WEB,)),
    "Node": Replace("Node", (HERE,)),
}


def known(kind):
    """Return what the file says of a kind."""
    return Replace(kind, LISTS[kind].objects, SAVED_AT)


@contextlib.asynccontextmanager
async def followed(folder, *changes, origin=ORIGIN, times=QUICK):
    """Follow a feed that says these changes; what it passes on is in ``told``."""
    inner = FakeFeed(*changes)
    metrics = Metrics("userspace", (4,))
    feed = RememberedFeed(inner, folder, origin, metrics, lambda: SAVED_AT)
    feed.times = times
    inner.told, inner.metrics = [], metrics
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(feed.follow(inner.told.append))
        yield inner
        task.cancel()
        await feed.aclose()


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.005)


def stale_kinds(metrics):
    _, text = metrics.exposition("text/plain")
    lines = [line for line in text.decode().splitlines() if line.startswith("pyproxy_state_stale{")]
    return {line.split('"')[1] for line in lines if line.endswith(" 1.0")}


async def test_a_start_without_the_server_goes_by_what_it_said_before(tmp_path):
    async with followed(tmp_path, *LISTS.values()):
        await until((tmp_path / "state").exists)
    async with followed(tmp_path) as feed:
        await until(lambda: len(feed.told) == len(KINDS))
        assert feed.told == [known(kind) for kind in KINDS]
        assert stale_kinds(feed.metrics) == set(KINDS)
        fresh = Replace("Service", (API,))
        feed.tell(fresh)
        await feed.taken_in()
        assert feed.told[-1] == fresh
        assert stale_kinds(feed.metrics) == set(KINDS) - {"Service"}


async def test_what_the_server_says_in_time_is_not_replaced(tmp_path):
    async with followed(tmp_path, *LISTS.values()):
        await until((tmp_path / "state").exists)
    fresh = Replace("Service", (API,))
    async with followed(tmp_path, fresh) as feed:
        await until(lambda: len(feed.told) == len(KINDS))
        assert feed.told == [fresh, *(known(kind) for kind in KINDS if kind != "Service")]


async def test_the_file_of_another_cluster_is_not_used(tmp_path, caplog):
    async with followed(tmp_path, *LISTS.values()):
        await until((tmp_path / "state").exists)
    async with followed(tmp_path, origin="Node there of http://api") as feed:
        await until(lambda: "no earlier state is of use" in caplog.text)
        assert feed.told == []


async def test_a_half_known_cluster_is_not_written(tmp_path):
    async with followed(tmp_path, LISTS["Service"]) as feed:
        await feed.taken_in()
        await asyncio.sleep(5 * QUICK.delay)
        assert not (tmp_path / "state").exists()


async def test_a_start_that_is_stopped_early_leaves_the_file_as_it_was(tmp_path):
    async with followed(tmp_path, *LISTS.values()):
        await until((tmp_path / "state").exists)
    before = (tmp_path / "state").read_bytes()
    gating = [LISTS[kind] for kind in KINDS if kind != "ServiceCIDR"]
    async with followed(tmp_path, *gating, Upsert("Service", API)) as feed:
        await feed.taken_in()
    assert (tmp_path / "state").read_bytes() == before


async def test_the_last_change_before_the_end_is_kept(tmp_path):
    async with followed(tmp_path, *LISTS.values()) as feed:
        await until((tmp_path / "state").exists)
        feed.tell(Upsert("Service", API))
        await feed.taken_in()
    async with followed(tmp_path) as feed:
        await until(lambda: len(feed.told) == len(KINDS))
        assert feed.told[0] == Replace("Service", (WEB, API), SAVED_AT)


async def told_after_a_crash(folder, copy):
    """What a start goes by that finds the folder as it is now."""
    shutil.copytree(folder, copy)
    async with followed(copy) as feed:
        await until(lambda: len(feed.told) == len(KINDS))
        return feed.told[0]


async def test_a_change_is_in_the_file_before_anybody_hears_of_it(tmp_path):
    async with followed(tmp_path / "a", *LISTS.values(), times=SLOW) as feed:
        await until((tmp_path / "a" / "state").exists)
        await asyncio.sleep(0.05)  # until it is open again
        feed.tell(Upsert("Service", API), Remove("Service", WEB.name))
        await feed.taken_in()
        assert await told_after_a_crash(tmp_path / "a", tmp_path / "b") == Replace(
            "Service", (API,), SAVED_AT
        )


@contextlib.contextmanager
def room_for(size):
    """Let files grow up to this: a write beyond it is cut short, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 5])
async def test_a_file_that_cannot_be_continued_is_removed(tmp_path, caplog, room):
    file = tmp_path / "state"
    async with followed(tmp_path, *LISTS.values(), times=SLOW) as feed:
        await until(file.exists)
        await asyncio.sleep(0.05)  # until it is open again
        with room_for(file.stat().st_size + room):
            feed.tell(Upsert("Service", API))
            await feed.taken_in()
        assert (file.exists(), "cannot save" in caplog.text) == (False, True)
    assert (await told_after_a_crash(tmp_path, tmp_path / "b")).objects == (WEB, API)


async def test_an_older_file_that_cannot_be_replaced_is_removed(tmp_path, caplog):
    file = tmp_path / "state"
    async with followed(tmp_path, *LISTS.values()):
        await until(file.exists)
    with room_for(10):
        async with followed(tmp_path, *LISTS.values()):
            await until(lambda: "cannot save" in caplog.text)
            assert not file.exists()


async def test_a_file_that_is_continued_outlives_a_new_one_that_cannot_be(tmp_path, caplog):
    async with followed(tmp_path / "a", *LISTS.values()) as feed:
        await until((tmp_path / "a" / "state").exists)
        await asyncio.sleep(0.05)  # until it is open again
        (tmp_path / "a" / "state.new").mkdir()
        feed.tell(Upsert("Service", API))
        await until(lambda: "cannot save" in caplog.text)
        feed.tell(Remove("Service", WEB.name))
        await feed.taken_in()
        assert (await told_after_a_crash(tmp_path / "a", tmp_path / "b")).objects == (API,)


async def test_who_stops_while_it_writes_writes_the_last_word_last(tmp_path, monkeypatch):
    begun, overtaken = threading.Event(), threading.Event()
    really = remembered.replace_file

    def slow_at_first(path, data):
        if not begun.is_set():
            begun.set()
            overtaken.wait(0.3)
            really(path, data)
        else:
            really(path, data)
            overtaken.set()

    monkeypatch.setattr(remembered, "replace_file", slow_at_first)
    async with followed(tmp_path / "a", *LISTS.values()) as feed:
        await until(begun.is_set)
        feed.tell(Upsert("Service", API))
        await feed.taken_in()
    await asyncio.to_thread(overtaken.wait, 1)
    await asyncio.sleep(0.05)  # for who was overtaken, if anybody was
    assert (await told_after_a_crash(tmp_path / "a", tmp_path / "b")).objects == (WEB, API)


async def test_a_list_makes_a_new_file_at_once(tmp_path):
    file = tmp_path / "a" / "state"
    async with followed(tmp_path / "a", *LISTS.values(), times=SLOW) as feed:
        await until(file.exists)
        before = file.stat().st_ino
        feed.tell(Replace("Service", (API,)), Upsert("Service", WEB))
        await until(lambda: file.stat().st_ino != before)
        assert await told_after_a_crash(tmp_path / "a", tmp_path / "b") == Replace(
            "Service", (API, WEB), SAVED_AT
        )


async def test_a_folder_that_cannot_be_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    async with followed(tmp_path / "file" / "sub", *LISTS.values()):
        await until(lambda: "cannot save" in caplog.text)
