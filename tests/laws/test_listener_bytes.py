"""Listeners survive being bytes, and so does what they share."""

from hypothesis import given
from hypothesis import strategies as st
from msgspec import msgpack

from pyproxy.host import LOOPBACK
from pyproxy.rules.listener_bytes import (
    PackedOwner,
    PackedSurroundings,
    actions_of,
    listeners_of,
    packed_owner,
    packed_surroundings,
    surroundings_of,
)
from pyproxy.rules.listeners import Surroundings, compile_owner
from tests.laws.test_trace import FAMILIES, clusters


def through(value, kind):
    return msgpack.decode(msgpack.encode(value), type=kind)


@FAMILIES
@given(st.data())
def test_listeners_of_any_cluster_arrive_as_they_were(family, data):
    for port in data.draw(clusters(family)).ports:
        listeners = compile_owner(port)
        packed = through(packed_owner(port.owner, listeners.values()), PackedOwner)
        assert listeners_of(packed) == listeners


@FAMILIES
@given(st.data())
def test_frontends_share_pools_as_before(family, data):
    """A picker goes through the turn of a pool, whichever frontend of the owner a client uses."""
    for port in data.draw(clusters(family)).ports:
        listeners = compile_owner(port)
        arrived = listeners_of(through(packed_owner(port.owner, listeners.values()), PackedOwner))
        assert pool_count(arrived) == pool_count(listeners)


def pool_count(listeners):
    actions = [action for li in listeners.values() for action in actions_of(li.route)]
    return len({id(action.pool) for action in actions if hasattr(action, "pool")})


def test_surroundings_arrive_as_they_were():
    around = Surroundings(frozenset({"192.0.2.1"}), (LOOPBACK[6],), (LOOPBACK[4],))
    assert surroundings_of(through(packed_surroundings(around), PackedSurroundings)) == around
