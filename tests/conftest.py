"""Event loops of tests: both for what has sockets, and one whose clock jumps for what waits."""

import asyncio
import os
import selectors
from pathlib import Path

import pytest
import uvloop
from hypothesis import HealthCheck, settings

from pyproxy.proxier import _socketlb_site
from pyproxy.proxier._poller import RelayLoop

settings.register_profile(
    "default",
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("default")


class Deadlock(Exception):
    """All tasks wait, and nothing will ever wake them."""


class JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for the next timer, moves the clock to it."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def select(self, timeout=None):
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            raise Deadlock("every task waits for ever")
        self.now += timeout
        return []


class JumpingLoop(asyncio.SelectorEventLoop):
    """A loop on which an hour costs nothing. It has no sockets and no threads."""

    def __init__(self):
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)

    def time(self):
        return self._jumping.now


def pytest_configure(config):
    config.addinivalue_line("markers", "jumping: run on the loop whose clock jumps")
    config.addinivalue_line("markers", "root: needs root, or a user namespace")


def pytest_asyncio_loop_factories(config, item):
    """Run each asynchronous test on both real loops, or on the jumping one if it says so."""
    if item.get_closest_marker("jumping"):
        return {"jumping": JumpingLoop}
    return {"asyncio": RelayLoop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def _never_the_whole_machine(monkeypatch):
    """Let no test attach programs to the root cgroup: they see every process of the machine."""
    monkeypatch.setattr(_socketlb_site, "HOST_ONLY", Path("/nowhere"))


@pytest.fixture
def clock():
    return LoopClock()


class LoopClock:
    """The running loop's time, as both kinds of time."""

    def monotonic(self):
        return asyncio.get_running_loop().time()

    def unix(self):
        return 1_700_000_000.0 + self.monotonic()
