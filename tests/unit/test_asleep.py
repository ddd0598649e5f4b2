"""Frontends of a worker are bytes until somebody comes to them."""

import pytest

from pyproxy.model import Backend, Drop, Forward, Frontend, Pool, Route
from pyproxy.proxier._asleep import Asleep
from pyproxy.rules.listener_bytes import packed_owner
from pyproxy.rules.listeners import Listener
from tests.builders import address, owner

WEB, API = owner("web"), owner("api")
ONE, TWO = Frontend("10.96.0.1", 80, "TCP"), Frontend("10.96.0.2", 80, "TCP")


class FakePlane:
    """A data plane that remembers what it serves. It is its own frontends."""

    def __init__(self):
        self.served = {}
        self.fronts = self

    def of(self, owner):
        return {f: li for f, li in self.served.items() if li.owner == owner}

    def holds(self, frontend):
        return frontend in self.served

    def serve(self, _owner, listeners):
        self.served |= listeners
        return {}

    def close(self, frontends):
        for frontend in list(frontends):
            del self.served[frontend]


def listener(owner, frontend, *numbers):
    action = Forward(Pool(tuple(Backend(address(n)) for n in numbers)))
    return Listener(owner, Route(frontend, "ClusterIP", action, action, Drop()))


def packed(owner, *frontends, backend=1):
    return packed_owner(owner, [listener(owner, f, backend) for f in frontends])


@pytest.fixture
def plane():
    return FakePlane()


@pytest.fixture
def asleep(plane):
    return Asleep(plane)


def test_one_client_wakes_all_frontends_of_an_owner_and_no_others(plane, asleep):
    asleep.update(packed(WEB, ONE, TWO))
    asleep.update(packed(API, Frontend("10.96.0.3", 80, "TCP")))
    assert plane.served == {}
    assert asleep.wake(ONE)
    assert plane.served == {f: listener(WEB, f, 1) for f in (ONE, TWO)}
    assert not asleep.wake(ONE), "it is here"


def test_what_is_asleep_wakes_as_it_is_by_then(plane, asleep):
    asleep.update(packed(WEB, ONE, TWO))
    asleep.update(packed(WEB, TWO, backend=2))
    assert not asleep.wake(ONE)
    assert asleep.wake(TWO)
    assert plane.served == {TWO: listener(WEB, TWO, 2)}


def test_what_is_awake_is_changed_and_closed_at_once(plane, asleep):
    asleep.update(packed(WEB, ONE))
    asleep.wake(ONE)
    asleep.update(packed(WEB, TWO, backend=2))
    assert plane.served == {TWO: listener(WEB, TWO, 2)}
    asleep.update(packed(WEB))
    assert plane.served == {}


@pytest.mark.parametrize("first_is_awake", [False, True])
@pytest.mark.parametrize("second_is_awake", [False, True])
@pytest.mark.parametrize("taken_before_given", [False, True])
def test_a_frontend_may_pass_to_another_owner(
    plane, asleep, first_is_awake, second_is_awake, taken_before_given
):
    asleep.update(packed(WEB, ONE))
    asleep.update(packed(API, TWO))
    if first_is_awake:
        asleep.wake(ONE)
    if second_is_awake:
        asleep.wake(TWO)
    updates = [packed(WEB), packed(API, ONE, TWO)]
    for update in reversed(updates) if taken_before_given else updates:
        asleep.update(update)
    asleep.wake(ONE)
    assert plane.served == {f: listener(API, f, 1) for f in (ONE, TWO)}
