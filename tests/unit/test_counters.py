"""Counts that only grow, whatever happens to the entries that count."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyproxy.counters import NOTHING, Counts, Entry, Reading, Tally, Where, growth, merged, total
from tests.builders import address, owner

WEB, DNS = owner("web"), owner("dns")
ONE, TWO = address(1), address(2)


def n(connections):
    return Counts(connections=connections)


def reading(*entries, owners=((WEB, ("front",)),)):
    return Reading(tuple(entries), owners)


def front(count, **rest):
    return Entry("front", None, n(count), **rest)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (n(3), n(5), n(2)),
        (n(5), n(5), n(0)),
        (n(5), n(2), n(2)),
        (NOTHING, n(4), n(4)),
        (n(4), NOTHING, NOTHING),
        (Counts(9, bytes_in=10), Counts(9, bytes_in=5), Counts(9, bytes_in=5)),
    ],
)
def test_growth_is_all_of_it_where_an_entry_began_anew(before, now, expected):
    assert growth(before, now) == expected


def test_what_nobody_can_tell_has_no_sum():
    assert total([n(1), Counts(bytes_in=5), n(2)]) == Counts(3, bytes_in=5)
    assert total([]) == NOTHING


def test_families_are_counted_together():
    four, six = {Where(WEB): n(1), Where(WEB, ONE): n(1)}, {Where(WEB): n(2), Where(DNS): n(3)}
    assert merged([four, six]) == {Where(WEB): n(3), Where(WEB, ONE): n(1), Where(DNS): n(3)}


def test_frontends_of_an_owner_are_added_up():
    tally = Tally()
    owners = ((WEB, ("front", "other")),)
    first = reading(front(1), Entry("other", None, n(2)), owners=owners)
    assert tally.take(first, by_endpoint=False) == {Where(WEB): n(3)}
    again = reading(front(4), Entry("other", None, n(2)), owners=owners)
    assert tally.take(again, by_endpoint=False) == {Where(WEB): n(6)}


def test_an_entry_that_ended_and_its_successor_both_count():
    tally = Tally()
    tally.take(reading(front(5)), by_endpoint=False)
    both = reading(front(8, ended=True), front(9))
    assert tally.take(both, by_endpoint=False) == {Where(WEB): n(17)}


def test_an_entry_that_ended_unread_loses_only_what_nobody_read():
    tally = Tally()
    tally.take(reading(front(5)), by_endpoint=False)
    found = reading(Entry("front", None, NOTHING, ended=True), front(7))
    assert tally.take(found, by_endpoint=False) == {Where(WEB): n(12)}


def test_entries_of_nobody_and_owners_that_are_gone_are_not_there():
    tally = Tally()
    tally.take(reading(front(5)), by_endpoint=True)
    gone = reading(front(5), owners=((DNS, ("port",)),))
    assert tally.take(gone, by_endpoint=True) == {}
    assert tally.take(reading(front(6)), by_endpoint=True) == {Where(WEB): n(6)}


def test_endpoints_that_are_gone_are_forgotten_and_the_service_keeps_their_share():
    tally = Tally()
    at_one, at_two = Entry("front", ONE, n(2)), Entry("front", TWO, n(3))
    tally.take(reading(front(5), at_one, at_two), by_endpoint=True)
    found = tally.take(reading(front(6), at_two._replace(counts=n(4))), by_endpoint=True)
    assert found == {Where(WEB): n(6), Where(WEB, TWO): n(4)}


def test_a_reading_without_endpoints_does_not_forget_them():
    tally = Tally()
    at_one = Entry("front", ONE, n(2))
    tally.take(reading(front(2), at_one), by_endpoint=True)
    assert tally.take(reading(front(3)), by_endpoint=False) == {Where(WEB): n(3)}
    again = tally.take(reading(front(3), at_one), by_endpoint=True)
    assert again == {Where(WEB): n(3), Where(WEB, ONE): n(2)}


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans())))
def test_no_connection_is_lost_or_counted_twice(steps):
    """Between any two readings some connections come, and the entry may be written anew."""
    tally, made, held = Tally(), 0, 0
    for count, renewed in steps:
        ended = []
        if renewed:
            ended, held = [front(held, ended=True)], 0
        made, held = made + count, held + count
        assert tally.take(reading(*ended, front(held)), by_endpoint=False) == {Where(WEB): n(made)}
