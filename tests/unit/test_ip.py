from ipaddress import ip_network

import pytest

from pyproxy.ip import canonical_ip, parse_network


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        pytest.param("10.96.0.1", "10.96.0.1", id="already canonical"),
        pytest.param("255.255.255.255", "255.255.255.255", id="highest"),
        pytest.param("0.0.0.0", "0.0.0.0", id="lowest"),
        pytest.param("172.30.0.041", "172.30.0.41", id="E08: a leading zero is decimal"),
        pytest.param("10.180.00.001", "10.180.0.1", id="E08: several leading zeros"),
        pytest.param("192.168.099.022", "192.168.99.22", id="E08: digits that are not octal"),
        pytest.param("1.2.3.0000000004", "1.2.3.4", id="any number of leading zeros"),
        pytest.param("1.2.3." + "0" * 5000 + "4", "1.2.3.4", id="zeros beyond all reason"),
        pytest.param("256.1.1.1", None, id="an octet too large"),
        pytest.param("1.2.3." + "4" * 5000, None, id="an octet that Python would not read"),
        pytest.param("1.2.3", None, id="three octets"),
        pytest.param("1.2.3.4.5", None, id="five octets"),
        pytest.param("1.2.3.4 ", None, id="trailing blank"),
        pytest.param("1.2.3.4\n", None, id="trailing newline"),
        pytest.param("1.2.3.-4", None, id="a sign"),
        pytest.param("1.2.3.", None, id="an empty octet"),
        pytest.param("1.2.3.\N{ARABIC-INDIC DIGIT FOUR}", None, id="digits that are not ASCII"),
        pytest.param("", None, id="empty"),
        pytest.param("example.com", None, id="a name"),
        pytest.param("FD00:10:96:0::00A", "fd00:10:96::a", id="IPv6 is compressed, lower case"),
        pytest.param("::1", "::1", id="IPv6 loopback"),
        pytest.param("::ffff:10.0.0.1", "10.0.0.1", id="IPv4 inside IPv6 is IPv4"),
        pytest.param("fe80::1%eth0", None, id="a zone"),
        pytest.param("fd00::1::2", None, id="IPv6 that is none"),
        pytest.param("[::1]", None, id="brackets"),
    ],
)
def test_an_address_has_one_spelling(text, canonical):
    assert canonical_ip(text) == canonical


@pytest.mark.parametrize(
    ("text", "network"),
    [
        pytest.param("203.0.113.0/24", ip_network("203.0.113.0/24"), id="plain"),
        pytest.param("203.0.113.000/025", ip_network("203.0.113.0/25"), id="E08: leading zeros"),
        pytest.param(" 10.0.0.0/8\t", ip_network("10.0.0.0/8"), id="E07: blanks around"),
        pytest.param("10.1.2.3/8", ip_network("10.0.0.0/8"), id="host bits are cleared"),
        pytest.param("0.0.0.0/0", ip_network("0.0.0.0/0"), id="everything"),
        pytest.param("FD00::1/8", ip_network("fd00::/8"), id="IPv6"),
        pytest.param("10.0.0.0", None, id="no length"),
        pytest.param("10.0.0.0/", None, id="empty length"),
        pytest.param("10.0.0.0/33", None, id="too long"),
        pytest.param("10.0.0.0/" + "8" * 5000, None, id="a length that Python would not read"),
        pytest.param("10.0.0.0/-1", None, id="negative"),
        pytest.param("10.0.0.0/255.0.0.0", None, id="a mask"),
        pytest.param("10.0.0.0/8/8", None, id="two lengths"),
        pytest.param("fd00::/129", None, id="too long for IPv6"),
        pytest.param("", None, id="empty"),
    ],
)
def test_a_range_is_read_leniently(text, network):
    assert parse_network(text) == network
