"""Addresses and ranges in canonical form, read as leniently as kube-proxy reads them.

Manifests of old clusters hold addresses such as ``172.30.0.041``. They mean decimal numbers there,
so leading zeros are dropped; the kernel's own parsers would take them for octal.
"""

import re
from functools import lru_cache
from ipaddress import IPv6Address, ip_network

from pyproxy.model import Network

_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_is_plain_ipv4 = re.compile(rf"(?:{_OCTET}\.){{3}}{_OCTET}", re.ASCII).fullmatch
# As many leading zeros as anybody likes. Python refuses to read a number of 5,000 digits.
_significant = re.compile(r"0*(\d{1,3})", re.ASCII).fullmatch


def canonical_ip(text: str) -> str | None:
    """Return the one spelling of an address, or None for what is not an address.

    An IPv4 address inside IPv6 (``::ffff:10.0.0.1``) is that IPv4 address. A zone (``%eth0``)
    has no meaning for a Service: None.
    """
    # 0.3 us; everything else is rare, or IPv6, and 10 us when it is new.
    return text if _is_plain_ipv4(text) else _canonical_unusual_ip(text)


def parse_network(text: str) -> Network | None:
    """Return the range that ``text`` means, host bits cleared, or None if it is not a range."""
    ip_text, _, prefix_text = text.strip().partition("/")
    ip, prefix = canonical_ip(ip_text), _significant(prefix_text)
    return _network(ip, int(prefix[1])) if ip is not None and prefix is not None else None


def is_loopback(ip: str) -> bool:
    """Say whether an address in canonical form is the node's for itself."""
    return ip.startswith("127.") or ip == "::1"


# IPv6 endpoints come again with each update of their slice.
@lru_cache(maxsize=8192)
def _canonical_unusual_ip(text: str) -> str | None:
    if ":" in text:
        return _canonical_ipv6(text)
    octets = [octet and int(octet[1]) for octet in map(_significant, text.split("."))]
    numbers = [number for number in octets if number is not None and number <= 255]
    return ".".join(map(str, numbers)) if len(octets) == len(numbers) == 4 else None


def _canonical_ipv6(text: str) -> str | None:
    try:
        address = IPv6Address(text)
    except ValueError:
        return None
    if address.scope_id is not None:
        return None
    return str(address.ipv4_mapped or address)


@lru_cache(maxsize=1024)
def _network(ip: str, prefix_length: int) -> Network | None:
    try:
        return ip_network((ip, prefix_length), strict=False)
    except ValueError:
        return None
