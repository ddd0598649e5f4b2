"""A process that runs out of file descriptors goes on, and does later what it could not do."""

import asyncio
import os
import resource
import tracemalloc  # noqa: F401 - pytest imports it when it has something to tell
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyproxy import host as hosts
from pyproxy.host import Host
from pyproxy.proxier import _nfaudit
from pyproxy.proxier._flavour import programs_of, tables_with
from pyproxy.proxier._iptables import IptablesError
from pyproxy.proxier._nfaudit import Audit
from tests.netns.standin import printed

NEW = "192.0.2.77"


@contextmanager
def no_descriptor_left():
    """Have this process open no file more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    hog = []
    with suppress(OSError):
        while True:
            hog.append(os.dup(0))
    try:
        yield
    finally:
        for descriptor in hog:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@asynccontextmanager
async def going_on(job):
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(job)
        yield
        task.cancel()


async def until(holds):
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.02)


def warned(caplog, message):
    return [record.message for record in caplog.records].count(message)


@pytest.fixture(autouse=True)
def _soon_again(monkeypatch):
    monkeypatch.setattr(hosts, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(_nfaudit, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(_nfaudit, "AUDIT_SECONDS", 0.05)


@pytest.fixture
async def later():
    """A command that needs no descriptor of ours any more: it waits for a word."""
    script = f"read word; ip addr add {NEW}/32 dev lo"
    child = await asyncio.create_subprocess_exec(
        "sh", "-c", script, stdin=asyncio.subprocess.PIPE
    )  # fmt: skip
    yield child
    await child.communicate()
    printed("ip", "addr", "del", f"{NEW}/32", "dev", "lo")


# An event loop that could not be made, which pyroute2 wants, complains when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_change_of_interfaces_is_seen_later(later, caplog):
    host = Host()
    async with going_on(host.follow()):
        await until(lambda: host.snapshot.addresses)
        with no_descriptor_left():
            later.stdin.write(b"\n")
            await until(lambda: warned(caplog, "interfaces cannot be read"))
            await asyncio.sleep(0.5)
            assert NEW not in host.snapshot.ips(4)
        await until(lambda: NEW in host.snapshot.ips(4))
    assert warned(caplog, "interfaces cannot be read") == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_interfaces_are_read_later_from_the_start(caplog):
    caplog.set_level("INFO")
    host = Host()
    async with asyncio.TaskGroup() as tasks:
        with no_descriptor_left():
            following = tasks.create_task(host.follow())
            reading = tasks.create_task(host.read_at_last())
            await until(lambda: warned(caplog, "interfaces cannot be read"))
            await asyncio.sleep(0.5)
            assert host.snapshot.addresses == frozenset()
        await reading
        following.cancel()
    assert "192.0.2.11" in host.snapshot.ips(4)
    assert warned(caplog, "interfaces cannot be read") == 1
    assert warned(caplog, "interfaces are read again") == 1


async def test_rules_are_audited_later(caplog):
    asked = []
    settled = asyncio.Event()
    settled.set()
    target = SimpleNamespace(settled=settled, generation=-1, read_seconds=0.0)
    env = SimpleNamespace(resync=lambda: asked.append(True))
    audit = Audit(env, lambda: None, "pyproxy")
    with no_descriptor_left():
        async with going_on(audit.run(target)):
            await until(lambda: warned(caplog, "rules are not audited"))
            await asyncio.sleep(0.5)
    assert asked == []
    async with going_on(audit.run(target)):
        await until(lambda: asked)
    assert warned(caplog, "rules are not audited") == 1


async def test_a_program_that_cannot_be_started_is_an_error_of_iptables():
    tables = tables_with(programs_of(4)["nft"])
    with no_descriptor_left(), pytest.raises(IptablesError, match="Too many open files"):
        await tables.save()
    await tables.save()
