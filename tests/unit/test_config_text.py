import pytest

from pyproxy.config.text import (
    address_problem,
    did_you_mean,
    duration_text,
    is_ip,
    parse_cidr,
    parse_duration,
    with_port,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        pytest.param("0", 0.0, id="zero needs no unit"),
        pytest.param("0s", 0.0, id="zero"),
        pytest.param("-0s", 0.0, id="minus zero is zero"),
        pytest.param("30s", 30.0, id="seconds"),
        pytest.param("1h30m", 5400.0, id="two units"),
        pytest.param("1h0m0s", 3600.0, id="as Go prints it"),
        pytest.param("1.5h", 5400.0, id="fraction"),
        pytest.param(".5s", 0.5, id="fraction without a whole"),
        pytest.param("1.s", 1.0, id="point without a fraction"),
        pytest.param("100ms", 0.1, id="milliseconds"),
        pytest.param("1us1\N{MICRO SIGN}s1\N{GREEK SMALL LETTER MU}s", 3e-6, id="three micros"),
        pytest.param("7ns", 7e-9, id="nanoseconds"),
        pytest.param("+2m", 120.0, id="plus"),
        pytest.param("-1m30s", -90.0, id="minus is for the whole"),
    ],
)
def test_a_duration_means_seconds(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "30", "s", "1d", "1h30", " 1s", "1s ", "--1s", "1h-3m", "1,5s", "1..5s", "1e3s", "٣s"],
)
def test_what_go_does_not_read_is_not_a_duration(text):
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration(text)


def test_a_duration_ends_at_292_years():
    assert parse_duration("2562047h") == 2562047 * 3600.0
    with pytest.raises(ValueError, match="longer than a duration can be"):
        parse_duration("2562048h")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (30.0, "30s"),
        (60.0, "1m0s"),
        (3600.0, "1h0m0s"),
        (86400.0, "24h0m0s"),
        (5430.5, "1h30m30.5s"),
        (0.1, "100ms"),
        (0.0015, "1.5ms"),
        (0.0000015, "1.5\N{MICRO SIGN}s"),
        (7e-9, "7ns"),
        (-1.5, "-1.5s"),
        (1.000000001, "1.000000001s"),
    ],
)
def test_a_duration_is_printed_as_go_does(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("10.20.30.40/8", "10.0.0.0/8"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("fd00::1/64", "fd00::/64"),
        ("::/0", "::/0"),
    ],
)
def test_a_cidr_is_its_network(text, network):
    assert str(parse_cidr(text)) == network


@pytest.mark.parametrize(
    "text",
    ["", "0", "10.20.30.40", "::1", "10.0.0.0/33", "10.0.0.0/255.0.0.0", "fe80::1%eth0/64", "a/8"],
)
def test_what_is_not_a_cidr_is_none(text):
    assert parse_cidr(text) is None


@pytest.mark.parametrize(
    ("text", "answer"), [("127.0.0.1", True), ("::", True), ("", False), ("fe80::1%lo", False)]
)
def test_an_ip_has_no_zone(text, answer):
    assert is_ip(text) is answer


@pytest.mark.parametrize(
    ("address", "completed"),
    [
        pytest.param("127.0.0.1", "127.0.0.1:80", id="bare IPv4"),
        pytest.param("::1", "[::1]:80", id="bare IPv6"),
        pytest.param("127.0.0.1:9", "127.0.0.1:9", id="has one"),
        pytest.param("[::1]:9", "[::1]:9", id="IPv6 has one"),
        pytest.param("host", "host", id="not an IP"),
        pytest.param("", "", id="nothing"),
    ],
)
def test_a_bare_ip_gets_the_port(address, completed):
    assert with_port(address, 80) == completed


@pytest.mark.parametrize("address", ["0.0.0.0:1", "127.0.0.1:65535", "[::]:10256"])
def test_a_complete_address_has_no_problem(address):
    assert address_problem(address) is None


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("", '"" is not IP:port'),
        ("127.0.0.1", '"127.0.0.1" is not IP:port'),
        ("::1", '"::1" is not IP:port'),
        ("::1:80", '"::1:80" is not IP:port'),
        ("localhost:80", '"localhost" is not an IP address'),
        (":80", '"" is not an IP address'),
        ("1.2.3.4:", '"" is not a port between 1 and 65535'),
        ("1.2.3.4:http", '"http" is not a port between 1 and 65535'),
        ("1.2.3.4:0", '"0" is not a port between 1 and 65535'),
        ("1.2.3.4:65536", '"65536" is not a port between 1 and 65535'),
    ],
)
def test_an_address_problem_names_the_part(address, problem):
    assert address_problem(address) == problem


@pytest.mark.parametrize(
    ("name", "hint"),
    [("IPTable", " (did you mean iptables?)"), ("ipv", " (did you mean ipvs?)"), ("q", "")],
)
def test_the_nearest_name_is_suggested(name, hint):
    assert did_you_mean(name, ("iptables", "ipvs")) == hint
