"""While the maps of socket load balancing change, whoever connects is treated rightly."""

from hypothesis import given
from hypothesis import strategies as st

from pyproxy.model import (
    Address,
    Backend,
    Drop,
    Forward,
    Frontend,
    Pool,
    Reject,
    Route,
    ServicePortName,
)
from pyproxy.rules.listeners import Listener
from pyproxy.rules.socketlb import FRONTEND, REFUSE, SLOT, changes, content, list_key

FRONTEND_KEY = Frontend("10.96.0.1", 80, "UDP")
OWNER = ServicePortName("default", "web", "", "UDP")

backends = st.builds(
    lambda n, weight: Backend(Address(f"10.244.0.{n}", 80), weight),
    st.integers(1, 9),
    st.integers(1, 3),
)
pools = st.builds(
    lambda found, seconds: Pool(tuple(found), affinity_seconds=seconds),
    st.lists(backends, min_size=1, max_size=6, unique_by=lambda b: b.address),
    st.none() | st.just(10),
)
actions = st.builds(Forward, pools) | st.just(Reject()) | st.just(Drop())
listeners = st.builds(
    lambda pod, node, serving: Listener(
        OWNER,
        Route(FRONTEND_KEY, "ClusterIP", pod, node, Drop()),
        frozenset(b.address for b in serving),
    ),
    actions,
    actions,
    st.lists(backends, max_size=4),
)


def applied(maps, write):
    if write.value is None:
        del maps[write.table][write.key]
    else:
        maps[write.table][write.key] = write.value


def outcomes(maps, key, origin):
    """Return what a client of an origin may meet: a backend, a refusal, or the listeners."""
    value = maps["frontends"].get(key)
    if value is None:
        return {"listeners"}
    fields = FRONTEND.unpack(value)
    count, number = fields[origin], fields[2 + origin]
    if count == REFUSE:
        return {"refused"}
    slots = [SLOT.pack(at, list_key(FRONTEND_KEY, number)) for at in range(count)]
    return {maps["slots"].get(slot, "nothing") for slot in slots} or {"listeners"}


@given(st.lists(st.none() | listeners, min_size=1, max_size=5))
def test_at_every_moment_a_client_meets_what_was_or_what_will_be(stories):
    maps = {"frontends": {}, "slots": {}, "members": {}}
    held, key = None, list_key(FRONTEND_KEY, 0)
    for story in stories:
        wanted = content(FRONTEND_KEY, story, held, 0) if story is not None else None
        before = [outcomes(maps, key, origin) for origin in (0, 1)]
        writes = list(changes(held, wanted))
        moments = []
        for write in writes:
            applied(maps, write)
            moments.append([outcomes(maps, key, origin) for origin in (0, 1)])
        after = [outcomes(maps, key, origin) for origin in (0, 1)]
        for moment in moments:
            for origin in (0, 1):
                assert moment[origin] <= before[origin] | after[origin] | {"listeners"}
        held = wanted


@given(st.lists(st.none() | listeners, min_size=1, max_size=5))
def test_the_maps_contain_what_the_latest_plan_says_and_nothing_else(stories):
    maps = {"frontends": {}, "slots": {}, "members": {}}
    held = None
    for story in stories:
        wanted = content(FRONTEND_KEY, story, held, 0) if story is not None else None
        for write in changes(held, wanted):
            applied(maps, write)
        held = wanted
    expected = held.slots if held is not None else {}
    assert maps["slots"] == dict(expected)
    assert set(maps["members"]) == (held.members if held is not None else frozenset())
    assert len(maps["frontends"]) == (held is not None)
