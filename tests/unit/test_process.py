"""What the process asks of the operating system, on files of the test's own where it can be."""

import asyncio
import os
import resource

import pytest

from pyproxy import process
from pyproxy.app import Fatal
from pyproxy.process import families, identity, raise_file_limit, says, until_changed

PATIENCE_SECONDS = 10  # a limit for a test that fails, not a wait


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("mode: auto\n")
    return path


def rewrite(path):
    path.write_text("mode: userspace\n")


def replace_by_rename(path):
    other = path.with_suffix(".new")
    other.write_text("mode: auto\n")
    other.rename(path)


def chmod(path):
    path.chmod(0o600)


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("act", "is_other"),
    [
        pytest.param(rewrite, True, id="written"),
        pytest.param(replace_by_rename, True, id="replaced by a file that says the same"),
        pytest.param(chmod, False, id="made private"),
    ],
)
def test_an_identity_tells_whether_a_file_may_say_something_else(file, act, is_other):
    before = identity(file)
    act(file)
    assert (identity(file) != before) == is_other


def test_a_file_that_is_not_there_has_no_identity(tmp_path):
    assert identity(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        pytest.param(b"mode: auto\n", True, id="the same"),
        pytest.param(b"mode: ipvs\n", False, id="another"),
        pytest.param(b"\xff", False, id="not text any more"),
        pytest.param(None, True, id="gone: nothing is known"),
    ],
)
def test_a_file_says_what_it_said(file, content, answer):
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    assert says(file, "mode: auto\n") == answer


async def watched(path, act, text="mode: auto\n"):
    """Watch the file, act once it is being watched, and return why the watch ended."""

    async def watch():
        with pytest.raises(Fatal) as caught:
            await until_changed(path, text)
        return str(caught.value)

    async with asyncio.timeout(PATIENCE_SECONDS), asyncio.TaskGroup() as tasks:
        job = tasks.create_task(watch())
        await asyncio.sleep(0)
        for step in act:
            step(path)
            await asyncio.sleep(3 * process.CONFIG_POLL_SECONDS)
    return job.result()


@pytest.mark.parametrize(
    "act",
    [
        pytest.param([rewrite], id="written"),
        pytest.param([replace_by_rename], id="replaced"),
        pytest.param([remove, rewrite], id="gone for a while"),
        pytest.param([chmod, rewrite], id="made private, then written"),
    ],
)
@pytest.mark.jumping
async def test_a_configuration_file_that_changes_ends_the_process(file, act):
    assert (await watched(file, act)).startswith(f"configuration updated: {file} changed")


@pytest.mark.jumping
async def test_a_change_while_the_process_started_is_noticed(file):
    reason = await watched(file, [], text="mode: what was read before\n")
    assert reason.startswith("configuration updated")


@pytest.mark.parametrize(
    "act", [pytest.param([chmod], id="chmod"), pytest.param([remove], id="rm")]
)
@pytest.mark.jumping
async def test_a_file_that_says_nothing_new_is_watched_on(file, act):
    with pytest.raises(TimeoutError):
        await watched(file, act)


def test_the_file_limit_is_never_lowered():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        allowed = raise_file_limit()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (before[0], resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        )
    assert allowed == soft
    assert soft >= before[0]
    assert hard >= before[1]


def test_an_oom_score_that_is_refused_is_only_logged(caplog):
    caplog.set_level("INFO", "pyproxy.process")
    process.adjust_oom_score(5000)  # the kernel knows -1000 to 1000
    (record,) = caplog.records
    assert (record.getMessage(), record.wanted, record.error) == (
        "oom_score_adj stays",
        5000,
        "Invalid argument",
    )


def test_every_node_has_ipv4_and_those_with_ipv6_addresses_have_both():
    has_ipv6 = os.path.exists("/proc/net/if_inet6")
    assert families() in ({(4, 6), (4,)} if has_ipv6 else {(4,)})


def test_the_two_clocks_go_forward():
    clock = process.SystemClock()
    assert clock.monotonic() <= clock.monotonic()
    assert clock.unix() > 1_700_000_000
