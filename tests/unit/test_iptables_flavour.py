"""Which flavour of iptables a host uses, and what a program's complaint means."""

import pytest

from pyproxy.proxier._flavour import Census, counted, preferred, united
from pyproxy.proxier._iptables import first_line

NOTHING, RULE, RULES = (Census(count, is_hinted=False) for count in range(3))
HINT, HINT_AND_RULE = (Census(count, is_hinted=True) for count in range(2))


@pytest.mark.parametrize(
    ("nft", "legacy", "plain", "flavour"),
    [
        pytest.param(NOTHING, NOTHING, "nft", "nft", id="the one in PATH"),
        pytest.param(
            NOTHING, NOTHING, "legacy", "legacy", id="the one in PATH, the other way round"
        ),
        pytest.param(RULE, NOTHING, "legacy", "nft", id="the one with rules"),
        pytest.param(RULE, RULES, "nft", "legacy", id="the one with more rules"),
        pytest.param(HINT, RULES, "legacy", "nft", id="kubelet's"),
        pytest.param(HINT, HINT_AND_RULE, "nft", "legacy", id="two hints are none"),
    ],
)
def test_the_flavour_is_that_of_the_host(nft, legacy, plain, flavour):
    assert preferred({"nft": nft, "legacy": legacy}, plain) == flavour


def test_without_programs_there_is_no_flavour():
    assert preferred({}, None) is None


def test_two_flavours_with_rules_are_warned_of(caplog):
    preferred({"nft": RULE, "legacy": RULE}, "nft")
    assert "both flavours" in caplog.text


def test_rules_are_counted_and_signs_of_kubelet_are_seen():
    tables = {"nat": {"OUTPUT": 2, "MINE": 1}, "mangle": {"KUBE-IPTABLES-HINT": 0}}
    assert counted(tables) == Census(3, is_hinted=True)
    assert counted({"nat": {"KUBE-IPTABLES-HINT": 0}}) == NOTHING
    assert united([RULES, HINT_AND_RULE]) == Census(3, is_hinted=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "it failed and did not say why", id="silence"),
        pytest.param(
            "iptables-restore v1.8.9 (legacy): unknown option\nError occurred at line: 3\nTry `x'",
            "iptables-restore v1.8.9 (legacy): unknown option",
            id="what is generally said is left out",
        ),
    ],
)
def test_the_first_line_says_what_matters(text, message):
    assert first_line(text) == message
