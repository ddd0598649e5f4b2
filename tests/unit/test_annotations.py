import pytest

from pyproxy.kube.annotations import (
    AnnotationError,
    parse_balancer_traffic,
    parse_elb_pass_through,
    parse_scheduler,
    parse_trigger_time,
    parse_weights,
)
from pyproxy.model import BALANCER_TRAFFIC, SCHEDULERS, WeightRule

VOID = "; the whole annotation is ignored"


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        pytest.param("", (), id="empty"),
        pytest.param("  ", (), id="blank"),
        pytest.param("pod/web-*=3", (WeightRule("pod", "web-*", 3),), id="a glob of pods"),
        pytest.param(
            "ip/10.1.002.3=0, node/a=1 ,zone/z-1=65535",
            (
                WeightRule("ip", "10.1.2.3", 0),
                WeightRule("node", "a", 1),
                WeightRule("zone", "z-1", 65535),
            ),
            id="all others, with blanks, from the least weight to the greatest",
        ),
        pytest.param("ip/FD00::00a=7", (WeightRule("ip", "fd00::a", 7),), id="IPv6"),
        pytest.param("pod/a=b=7", (WeightRule("pod", "a=b", 7),), id="the last = separates"),
    ],
)
def test_weights_are_rules_in_order(text, rules):
    assert parse_weights(text) == rules


@pytest.mark.parametrize(
    ("text", "part", "expected"),
    [
        pytest.param("pod/a=1,pod/b", "pod/b", "SELECTOR", id="no weight"),
        pytest.param("pod/a=65536", "pod/a=65536", "SELECTOR", id="too heavy"),
        pytest.param("pod/a=-1", "pod/a=-1", "SELECTOR", id="negative"),
        pytest.param("pod/a=1.5", "pod/a=1.5", "SELECTOR", id="not whole"),
        pytest.param("pods/a=1", "pods/a=1", "SELECTOR", id="unknown selector"),
        pytest.param("pod/=1", "pod/=1", "SELECTOR", id="selects nothing"),
        pytest.param("pod/a=1,", "", "SELECTOR", id="a part is missing"),
        pytest.param("ip/10.0.0=1", "ip/10.0.0=1", "ip/ADDRESS", id="not an address"),
        pytest.param(
            "ip/10.0.0." + "9" * 5000 + "=1",
            "ip/10.0.0." + "9" * 50 + "...",
            "ip/ADDRESS",
            id="beyond all reason",
        ),
    ],
)
def test_one_wrong_part_voids_all_weights(text, part, expected):
    with pytest.raises(AnnotationError) as caught:
        parse_weights(text)
    assert str(caught.value).startswith(
        f'annotation pyproxy.io/weights: "{part}" is not {expected}'
    )
    assert str(caught.value).endswith(VOID)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_can_be_asked_for(name):
    assert parse_scheduler(f" {name} ") == name


def test_no_scheduler_is_the_modes_own():
    assert parse_scheduler("") is None


def test_an_unknown_scheduler_is_named_with_the_known_ones():
    with pytest.raises(AnnotationError) as caught:
        parse_scheduler("fastest")
    assert str(caught.value) == (
        'annotation pyproxy.io/scheduler: "fastest" is not one of rr, wrr, random, lc, wlc, '
        "sh, dh, mh, sed, nq; it is ignored"
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        pytest.param("1970-01-01T00:00:00Z", 0.0, id="the epoch"),
        pytest.param("2026-11-20T23:55:41Z", 1795218941.0, id="no fraction"),
        pytest.param("2026-11-20T23:55:41.123456789Z", 1795218941.123456, id="nanoseconds"),
        pytest.param("2026-11-20T23:55:41.5Z", 1795218941.5, id="tenths"),
        pytest.param("2026-11-21T01:55:41+02:00", 1795218941.0, id="another zone"),
        pytest.param("2026-11-20t23:55:41z", 1795218941.0, id="lower case, as the RFC allows"),
    ],
)
def test_a_trigger_time_is_unix_seconds(text, seconds):
    assert parse_trigger_time(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("yesterday", id="a word"),
        pytest.param("2026-11-20", id="a day"),
        pytest.param("2026-11-20T23:55:41", id="no zone"),
        pytest.param("2026-13-20T23:55:41Z", id="a thirteenth month"),
        pytest.param("2026-11-20T25:55:41Z", id="a twenty-fifth hour"),
    ],
)
def test_other_text_is_no_trigger_time(text):
    with pytest.raises(AnnotationError, match=r"last-change-trigger-time: .* is not an RFC 3339"):
        parse_trigger_time(text)


@pytest.mark.parametrize("name", BALANCER_TRAFFIC)
def test_load_balancer_traffic_has_three_words(name):
    assert parse_balancer_traffic(f" {name} ") == name


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("true", "pass-through"),
        ("onlyLocal", "local-else-pass-through"),
        ("false", None),
        ("", None),
    ],
)
def test_what_a_cloud_calls_pass_through(text, meaning):
    assert parse_elb_pass_through(text) == meaning


@pytest.mark.parametrize("parse", [parse_balancer_traffic, parse_elb_pass_through])
def test_other_words_for_load_balancer_traffic_are_named(parse):
    with pytest.raises(AnnotationError, match='"maybe" is not'):
        parse("maybe")
