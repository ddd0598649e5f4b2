"""In every mode the written state gives backends the shares that their weights ask for."""

from collections import Counter
from math import gcd

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyproxy.balancer import BY_CONNECTIONS, SLOTS_EACH, turn_of
from pyproxy.model import Address, Backend, Forward, Frontend, Pool, PortPlan, Route
from pyproxy.rules import iptables, ipvs, nftables, socketlb
from pyproxy.rules.listeners import Listener
from pyproxy.rules.shares import shares
from tests.builders import owner

FRONTEND = Frontend("10.96.0.1", 80, "TCP")
LONGEST = {"nftables": 256, "userspace": 1024}  # what docs/modes.md says


def of_groups(weight):
    """Weights of up to 400 backends, few of them different: as people give them."""
    groups = st.lists(st.tuples(weight, st.integers(1, 100)), min_size=1, max_size=4)
    return groups.map(lambda found: [weight for weight, size in found for _ in range(size)])


weights = (
    st.lists(st.integers(1, 65535), min_size=1, max_size=60)
    | of_groups(st.integers(1, 8))
    | of_groups(st.integers(1, 65535))
)
schedulers = st.sampled_from([None, "wrr", "random", *sorted(BY_CONNECTIONS)])


def planned(weights, scheduler):
    backends = [
        Backend(Address(f"10.1.{n // 250}.{n % 250}", 80), weight)
        for n, weight in enumerate(weights)
    ]
    action = Forward(Pool(tuple(backends), scheduler))
    return PortPlan(owner(), (Route(FRONTEND, "ClusterIP", action, action, action),))


def in_nftables(plan, pool):
    items = nftables.compile_owner(nftables.Ruleset(4), plan, {})
    slots = Counter(data for item, data in items.items() if item.container == "endpoints")
    return [slots[nftables.endpoint_data(b.address)] / slots.total() for b in pool.backends]


def in_iptables(plan, pool):
    """What a rule matches of those that came so far, by its chance or as one of so many."""
    left, found = 1.0, Counter()
    for match, address in iptables.picks(pool, plan.owner):
        words = match.split()
        part = 1 / int(words[words.index("--every") + 1]) if "--every" in words else 1.0
        part = float(words[-1]) if "--probability" in words else part
        found[address] += left * part
        left -= left * part
    return [found[b.address] for b in pool.backends]


def in_ipvs(plan, pool):
    items = ipvs.compile_owner(ipvs.Ruleset(nftables.Ruleset(4), ()), plan, {})
    assert items[FRONTEND].scheduler in ("rr", "wrr")
    given = [items[ipvs.Destination(FRONTEND, b.address)] for b in pool.backends]
    return [weight / sum(given) for weight in given]


def in_sockets(plan, pool):
    turn = Counter(turn_of(pool))
    listener = Listener(plan.owner, plan.routes[0], frozenset())
    if (held := socketlb.content(FRONTEND, listener, None, 0)) is not None:
        slots = Counter(held.slots.values())
        assert slots == {socketlb.packed_address(a): count for a, count in turn.items()}
    return [turn[b.address] / turn.total() for b in pool.backends]


STATES = {
    "nftables": in_nftables,
    "iptables": in_iptables,
    "ipvs": in_ipvs,
    "userspace": in_sockets,
}


@pytest.mark.parametrize("mode", STATES)
@given(weights, schedulers)
def test_the_state_has_the_shares_asked_for_and_they_are_told(mode, weights, scheduler):
    if scheduler in BY_CONNECTIONS and mode in ("ipvs", "userspace"):
        scheduler = None  # these count connections
    plan = planned(weights, scheduler)
    (route,) = plan.routes
    pool = route.from_node.pool
    found = STATES[mode](plan, pool)
    assert shares(mode, route, pool) == pytest.approx(found, abs=1e-6)
    asked = [weight / sum(weights) for weight in weights]
    longest = max(LONGEST.get(mode, 0), SLOTS_EACH * len(weights))
    if mode in LONGEST and sum(weights) // gcd(*weights) > longest:
        for wanted, has in zip(asked, found, strict=True):
            assert wanted * (1 - 1 / SLOTS_EACH) - 1 / longest <= has <= wanted + 1 / longest
    else:
        assert found == pytest.approx(asked, abs=1e-6)
