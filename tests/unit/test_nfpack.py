import struct

import pytest

from pyproxy.proxier._nfexpr import register
from pyproxy.proxier._nfform import normal_form, plain_attributes
from pyproxy.proxier._nfpack import (
    CHUNK,
    delete_elements,
    delete_table,
    new_chain,
    new_elements,
    new_rule,
    new_set,
    new_table,
    rule_form,
    set_form,
)
from pyproxy.proxier._nfread import answers, described, elements_in
from pyproxy.rules.nft import (
    Chain,
    Counter,
    Element,
    MatchSet,
    Pick,
    PickVerdict,
    Rule,
    Set,
    Table,
    Verdict,
    VerdictMap,
    packed_key,
    packed_slot,
)
from tests.nft_ruleset import ruleset

TABLE = Table(4, "pyproxy")
FRONTEND = packed_key(("ipv4_addr", "inet_proto", "inet_service"), ("10.96.0.1", "TCP", 80))


def bodies(requests):
    return [answer.payload[4:] for request in requests for answer in answers(request)]


def elements_of(requests):
    return [e for body in bodies(requests) for e in elements_in(dict(plain_attributes(body))[3])]


def endpoint(slot, data=b"\x0a\x00\x00\x01\x00\x50\x00\x00"):
    return Element(FRONTEND + packed_slot(slot), data=data)


@pytest.mark.parametrize(
    "elements",
    [
        pytest.param([], id="none"),
        pytest.param([endpoint(1), endpoint(2)], id="all alike"),
        pytest.param([endpoint(1), Element(FRONTEND, data=b"12345678")], id="keys of two lengths"),
        pytest.param([endpoint(1), endpoint(2, b"1234")], id="data of two lengths"),
        pytest.param([Element(b"\x00\x50", data=b"123")], id="lengths that need filling"),
        pytest.param([Element(b"1234"), Element(b"5678")], id="keys only"),
        pytest.param([Element(b"1234", b"4321", comment="range")], id="an interval"),
        pytest.param([endpoint(1), Element(b"1234", data=b"5", comment="é")], id="a comment"),
        pytest.param(
            [Element(b"1234", data=Verdict("goto", "pick-1")), Element(b"5", data=Verdict("drop"))],
            id="verdicts",
        ),
        pytest.param([endpoint(1), Element(b"1234", data=Verdict("jump", "x"))], id="mixed"),
    ],
)
def test_elements_are_read_as_they_were_packed(elements):
    assert elements_of(new_elements(TABLE, "x", elements)) == elements
    assert elements_of(delete_elements(TABLE, "x", elements)) == elements


@pytest.mark.parametrize("comment", ["", "default/web"], ids=["alike", "with comments"])
def test_many_elements_are_several_messages_none_too_long(comment):
    elements = [Element(FRONTEND + packed_slot(i), comment=comment) for i in range(10_000)]
    requests = new_elements(TABLE, "x", elements)
    lists = [dict(plain_attributes(body))[3] for body in bodies(requests)]
    assert len(requests) > 1
    assert all(CHUNK - 100 < len(some) <= CHUNK for some in lists[:-1])
    assert elements_of(requests) == elements


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (new_table(TABLE), "new table ip pyproxy"),
        (delete_table(Table(6, "x")), "delete table ip6 x"),
        (new_chain(TABLE, Chain("pick-1")), "new chain pick-1 of ip pyproxy"),
        (new_rule(TABLE, Rule("pick-1", (Counter(),))), "new rule pick-1 of ip pyproxy"),
        (new_set(TABLE, Set("ips", ("ipv4_addr",))), "new set ips of ip pyproxy"),
        (
            delete_elements(TABLE, "ips", [Element(b"1234")])[0],
            "delete elements of set ips of ip pyproxy",
        ),
    ],
)
def test_a_request_can_be_named(request_, words):
    assert described(request_) == words


@pytest.mark.parametrize(
    ("word", "number"), [(0, 1), (1, 9), (3, 11), (4, 2), (5, 13), (8, 3), (12, 4)]
)
def test_registers_have_the_numbers_the_kernel_dumps(word, number):
    assert register(word) == number


@pytest.mark.parametrize("family", [4, 6])
def test_the_form_of_a_rule_is_that_of_its_request(family):
    rules = ruleset(family)
    for rule in rules.rules:
        *_, body = bodies([new_rule(rules.table, rule)])
        sent = normal_form(dict(plain_attributes(body))[4])
        assert sent == rule_form(rules.table, rule).expressions


@pytest.mark.parametrize("family", [4, 6])
def test_rules_that_differ_have_different_forms(family):
    rules = ruleset(family)
    forms = {rule_form(rules.table, rule) for rule in rules.rules}
    assert len(forms) == len(set(rules.rules))


@pytest.mark.parametrize("family", [4, 6])
def test_sets_that_differ_have_different_forms(family):
    rules = ruleset(family)
    alike = {(s.key, s.data, s.flags, s.timeout_seconds, s.size) for s in rules.sets}
    assert len({set_form(rules.table, a_set) for a_set in rules.sets}) == len(alike)


def test_a_verdict_map_and_a_set_of_the_same_name_differ():
    forms = [
        rule_form(TABLE, Rule("x", (statement,))).expressions
        for statement in (MatchSet(("daddr",), "y"), VerdictMap(("daddr",), "y"))
    ]
    assert forms[0] != forms[1]


def test_maps_of_one_transaction_have_numbers_of_their_own():
    rule = Rule("x", (PickVerdict(Pick("random", 1), (Verdict("drop"),)),))
    numbers = [
        struct.unpack(">I", dict(plain_attributes(bodies([new_rule(TABLE, rule)])[0]))[10])
        for _ in range(3)
    ]
    assert len(set(numbers)) == 3


def test_an_interval_of_one_field_is_refused():
    with pytest.raises(AssertionError, match="one field"):
        new_set(TABLE, Set("x", ("ipv4_addr",), flags=("interval",)))
