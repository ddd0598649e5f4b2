"""The socket that commands ask: whose it is, what it answers, and that the proxy can do without."""

import asyncio
import http.client
import json
import os
import socket
import stat
from contextlib import asynccontextmanager, suppress

import pytest

from pyproxy import control
from pyproxy.cache import Cache
from pyproxy.commands import CommandError
from pyproxy.commands._ask import Daemon, NoDaemonError
from pyproxy.control import About, Control
from pyproxy.listing import Services
from pyproxy.model import Endpoint, Replace
from pyproxy.plan import Planner
from pyproxy.questions import QUESTIONS, SHEETS
from pyproxy.rules.listeners import Surroundings
from pyproxy.view import FamilyView, View
from tests.builders import SITE, address, endpoint_slice, service

PATIENCE_SECONDS = 20  # a limit for a test that fails, not a wait


def view(node="here"):
    cache, planner = Cache(4), Planner()
    cache.apply(Replace("Service", (service(resource_version="7"),)))
    cache.apply(Replace("EndpointSlice", (endpoint_slice("web-1", Endpoint(address(1))),)))
    planner.update(cache.owners(), cache, SITE)
    return View(node, "nftables", (FamilyView(4, cache, planner.plan, SITE, Surroundings()),))


@asynccontextmanager
async def serving(path, node="here", live=None):
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(PATIENCE_SECONDS):
        served = Control(str(path), lambda: view(node), 1700000000.0, live or {})
        task = tasks.create_task(served.run())
        yield task
        task.cancel()


async def asked(path, question="about", kind=About, **query):
    return await asyncio.to_thread(Daemon(str(path)).ask, question, kind, query)


async def answering(path, node="here"):
    """Wait until this node answers."""
    while True:
        with suppress(NoDaemonError):
            if (about := await asked(path)).node == node:
                return about
        await asyncio.sleep(0.01)


async def told_of(caplog):
    """Wait for the first line of the log."""
    while True:
        if caplog.records:
            return caplog.records[0]
        await asyncio.sleep(0.01)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "AGAIN_SECONDS", 0.02)
    return tmp_path / "run" / "pyproxy.sock"


def raw(path, target):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        connection = http.client.HTTPConnection("pyproxy")
        connection.sock = sock
        connection.request("GET", target)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


async def test_it_tells_who_it_is_and_what_it_serves_to_its_owner_alone(path):
    async with serving(path):
        about = await answering(path)
        assert (about.node, about.mode, about.pid) == ("here", "nftables", os.getpid())
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        found = await asked(path, "services", Services, service="default/web")
        assert [item.resource_version for item in found.items] == ["7"]
    assert not path.exists()


@pytest.mark.parametrize(
    ("target", "status", "error"),
    [
        pytest.param("/v1/services?service=web", 400, "web is not NAMESPACE/NAME", id="nonsense"),
        pytest.param("/v1/services?service=a/b", 404, "Service a/b: there is none", id="not there"),
        pytest.param("/v1/nothing", 404, "there is /v1/ and one of about, services", id="no path"),
        pytest.param("/v2/services", 404, "/v2/services: there is", id="no version"),
    ],
)
async def test_what_cannot_be_answered_is_a_complaint_in_json(path, target, status, error):
    async with serving(path):
        await answering(path)
        code, complaint = await asyncio.to_thread(raw, path, target)
    assert code == status
    assert error in complaint["error"]


async def test_a_command_repeats_the_complaint(path):
    async with serving(path):
        await answering(path)
        with pytest.raises(CommandError, match="Service a/b: there is none that here knows of"):
            await asked(path, "services", Services, service="a/b")


async def test_a_command_without_a_daemon_says_where_it_looked(path):
    with pytest.raises(NoDaemonError, match=f"no pyproxy answers at {path}: No such file"):
        await asked(path)


async def test_what_was_left_there_is_replaced(path):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    async with serving(path):
        assert (await answering(path)).node == "here"


@pytest.mark.parametrize("before", [None, 0o644], ids=["new", "of an earlier version"])
async def test_nobody_else_can_lock_it(path, before):
    lock = path.with_name(f"{path.name}.lock")
    if before is not None:
        path.parent.mkdir(mode=0o700)
        lock.touch(before)
    async with serving(path):
        await answering(path)
        modes = [stat.S_IMODE(each.stat().st_mode) for each in (path.parent, lock)]
        assert modes == [0o700, 0o600]


async def test_a_link_in_place_of_the_lock_is_not_followed(path, tmp_path, caplog):
    path.parent.mkdir()
    (elsewhere := tmp_path / "elsewhere").write_text("of somebody")
    path.with_name(f"{path.name}.lock").symlink_to(elsewhere)
    async with serving(path):
        await told_of(caplog)
    assert elsewhere.read_text() == "of somebody"


async def test_a_second_one_goes_without_says_so_once_and_takes_over_in_the_end(path, caplog):
    async with serving(path, "first") as first:
        await answering(path, "first")
        async with serving(path, "second"):
            await asyncio.sleep(0.1)
            assert (await asked(path)).node == "first"
            told = [r for r in caplog.records if r.message == "commands find no socket"]
            assert [r.reason for r in told] == ["another pyproxy answers there"]
            first.cancel()
            await answering(path, "second")


async def test_a_path_that_cannot_be_made_is_a_warning_and_not_the_end(tmp_path, caplog):
    (tmp_path / "file").touch()
    async with serving(tmp_path / "file" / "pyproxy.sock") as task:
        assert (await told_of(caplog)).levelname == "WARNING"
        assert not task.done()


async def test_a_file_of_somebody_is_left_alone(path, caplog):
    path.parent.mkdir()
    path.write_text("precious")
    async with serving(path):
        assert (await told_of(caplog)).reason == "Address already in use"
    assert path.read_text() == "precious"


@pytest.mark.parametrize("name", SHEETS)
async def test_a_sheet_made_in_steps_says_what_one_made_at_once_does(path, name, monkeypatch):
    monkeypatch.setattr(control, "PASS_SECONDS", 0.0)
    whole = QUESTIONS[name](view(), {})
    async with serving(path):
        await answering(path)
        assert await asked(path, name, type(whole)) == whole
        assert (await asked(path, name, type(whole), namespace="elsewhere")).items == ()
