"""Which flavour of iptables a host uses, and what a program's complaint means."""

import pytest

from pyproxy.proxier._iptables import first_line, preferred

RULE = "\n-A INPUT -j ACCEPT"
HINT = "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n"


@pytest.mark.parametrize(
    ("nft", "legacy", "plain", "flavour"),
    [
        pytest.param("", "", "nft", "nft", id="the one in PATH"),
        pytest.param("", "", "legacy", "legacy", id="the one in PATH, the other way round"),
        pytest.param(RULE, "", "legacy", "nft", id="the one with rules"),
        pytest.param(RULE, RULE * 2, "nft", "legacy", id="the one with more rules"),
        pytest.param(HINT, RULE * 2, "legacy", "nft", id="kubelet's"),
        pytest.param(HINT, HINT + RULE, "nft", "legacy", id="two hints are none"),
    ],
)
def test_the_flavour_is_that_of_the_host(nft, legacy, plain, flavour):
    assert preferred({"nft": nft, "legacy": legacy}, plain) == flavour


def test_without_programs_there_is_no_flavour():
    assert preferred({}, None) is None


def test_two_flavours_with_rules_are_warned_of(caplog):
    preferred({"nft": RULE, "legacy": RULE}, "nft")
    assert "both flavours" in caplog.text


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
