"""What goes where: rows, rates, and the table of ``pyproxy top``."""

import pytest

from pyproxy.commands.top import short, text_of
from pyproxy.counters import Counts, Where
from pyproxy.traffic import CountRow, TrafficCounts, asked_rows, busiest, rates, wants_endpoints
from pyproxy.view import QueryError
from tests.builders import address, owner

WEB, DNS = owner("web", "http"), owner("dns", proto="UDP", namespace="kube-system")
TRAFFIC = {
    Where(WEB): Counts(5),
    Where(WEB, address(2)): Counts(3),
    Where(WEB, address(1)): Counts(2),
    Where(DNS): Counts(1),
}


def row(name, connections, **rest):
    return CountRow("default", name, "", "TCP", connections=connections, **rest)


def answer(at, *rows, problems=()):
    return TrafficCounts("nftables", at, rows, problems)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, [("web", "", 5), ("dns", "", 1)]),
        ({"namespace": "kube-system"}, [("dns", "", 1)]),
        ({"service": "default/web"}, [("web", "", 5)]),
        ({"by": "endpoint"}, [("web", str(address(1)), 2), ("web", str(address(2)), 3)]),
    ],
)
def test_rows_are_those_that_were_asked_for_by_name(query, expected):
    rows = asked_rows(TRAFFIC, query)
    assert [(r.service, r.endpoint, r.connections) for r in rows] == expected


def test_a_question_for_anything_else_is_named():
    with pytest.raises(QueryError, match="by: pod is not service or endpoint"):
        wants_endpoints({"by": "pod"})


def test_rates_are_what_came_in_a_second():
    before = answer(10.0, row("a", 100, bytes_in=0), row("gone", 1))
    now = answer(14.0, row("a", 120, bytes_in=4000), row("new", 8))
    found = rates(before, now)
    assert found.seconds == 4.0
    assert [r.per_second for r in found.items] == [
        {"connections": 5.0, "bytes_in": 1000.0},
        {"connections": 2.0},
    ]


def test_a_count_that_began_anew_has_no_negative_rate():
    found = rates(answer(0.0, row("a", 100)), answer(2.0, row("a", 10)))
    assert found.items[0].per_second == {"connections": 5.0}


def test_the_quickest_come_first_and_then_the_largest():
    before = answer(0.0, row("big", 900), row("quick", 0), row("small", 1))
    now = answer(1.0, row("small", 1), row("big", 900), row("quick", 5))
    names = [r.counts.service for r in busiest(rates(before, now).items, "connections")]
    assert names == ["quick", "big", "small"]


def test_the_table_has_the_columns_that_the_mode_can_tell():
    before = answer(0.0, row("a", 0), row("b", 0))
    now = answer(2.0, row("a", 3000, rejected=0), row("b", 1))
    assert text_of(rates(before, now), "connections", 1) == (
        "SERVICE        CONNS  CONNS/s  REJECTS/s\ndefault/a/TCP  3k     1.5k     0\nand 1 more\n"
    )


def test_what_is_not_counted_is_told():
    text = text_of(rates(None, answer(0.0, problems=("no counters",))), "connections", 9)
    assert text == "nothing is counted\nnot counted: no counters\n"


def test_the_table_fits_a_terminal_with_everything_in_it():
    full = row(
        "a-name-as-long-as-they-come-" * 2, 10**9, rejected=10**7, dropped=10**7,
        packets_in=10**12, packets_out=10**12, bytes_in=10**15, bytes_out=10**15,
    )  # fmt: skip
    text = text_of(rates(answer(0.0), answer(1.0, full)), "bytes_in", 9)
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (0.5, "0.5"), (12, "12"), (99.44, "99.4"), (999, "999"), (1000, "1k"),
     (1240, "1.2k"), (999_999, "1M"), (5.5e9, "5.5G"), (2e18, "2000P"), (None, "")],
)  # fmt: skip
def test_numbers_are_short(value, expected):
    assert short(value) == expected
