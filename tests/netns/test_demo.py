"""``pyproxy demo`` as a user runs it: in namespaces of its own, with the real proxy."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyproxy.demo import EXIT_INTERRUPTED, EXIT_UNAVAILABLE

pytestmark = pytest.mark.root

LIMIT_SECONDS = 60


def demo(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "pyproxy", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    with process:
        output, errors = process.communicate(timeout=LIMIT_SECONDS)
    if process.returncode == EXIT_UNAVAILABLE:
        pytest.skip(errors.strip())
    return process.returncode, output, errors


def children(pid):
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_all_is_as_it_should_be():
    code, output, errors = finished(demo("--json"))
    result = json.loads(output) if output else {"checks": []}
    wrong = [check for check in result["checks"] if check["complaints"]]
    assert (code, wrong, errors) == (0, [], "")
    assert result["rolling_update"]["failures"] == []
    assert result["rolling_update"]["requests"] > 100


def test_a_terminated_demo_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = demo()
    for line in process.stdout:
        if "rolling update" in line:
            break
    proxies = children(process.pid) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    code, _, errors = finished(process)
    assert (code, errors) == (EXIT_INTERRUPTED, "interrupted; everything is removed\n")
    assert len(proxies) == 1
    assert [pid for pid in proxies if alive(pid)] == []
    assert list(tmp_path.iterdir()) == []
