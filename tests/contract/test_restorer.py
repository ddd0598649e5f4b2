"""A restore program that stays; a shell plays it, and does as it is told."""

import os
import signal

import pytest

from pyproxy.proxier._restorer import Failure, Restorer

PROGRAM = """
while read -r line; do case $line in
    '#'*) echo "$line" ;;
    'show '*) echo "Flushing chain"; echo $$ >>"${line#show }" ;;
    fail) echo "line 5 failed" >&2; exit 2 ;;
esac; done
"""
SILENT = "while read -r line; do :; done"


def playing(script):
    return Restorer(["sh", "-c", script])


@pytest.fixture
async def restorer():
    restorer = playing(PROGRAM)
    yield restorer
    await restorer.aclose()


def pids(path):
    return [int(line) for line in path.read_text().splitlines()]


async def test_one_program_carries_out_one_change_after_another(restorer, tmp_path):
    for _ in range(3):
        assert await restorer.carry_out([f"show {tmp_path}/pids"], 5) is None
    assert len(set(pids(tmp_path / "pids"))) == 1


async def test_a_failure_tells_where_its_lines_began_and_ends_the_program(restorer, tmp_path):
    show = f"show {tmp_path}/pids"
    assert await restorer.carry_out([show, "*nat"], 5) is None
    assert await restorer.carry_out(["*nat", "fail"], 5) == Failure(2, "line 5 failed\n", 3)
    assert await restorer.carry_out([show, "fail"], 5) == Failure(2, "line 5 failed\n", 0)
    one, other = pids(tmp_path / "pids")
    assert one != other


async def test_a_program_that_was_killed_is_started_again(restorer, tmp_path):
    show = f"show {tmp_path}/pids"
    await restorer.carry_out([show], 5)
    [pid] = pids(tmp_path / "pids")
    os.kill(pid, signal.SIGKILL)
    found = [await restorer.carry_out([show], 5) for _ in range(2)]
    assert found[-1] is None


async def test_a_program_that_prints_no_comments_is_not_relied_on(monkeypatch):
    monkeypatch.setattr("pyproxy.proxier._restorer.ANSWER_SECONDS", 0.1)
    silent = playing(SILENT)
    assert not await silent.is_there()
    assert silent.is_silent


async def test_a_program_that_prints_them_is_there(restorer):
    assert await restorer.is_there()


async def test_there_may_be_no_such_program():
    with pytest.raises(FileNotFoundError):
        await Restorer(["no-such-program"]).is_there()
