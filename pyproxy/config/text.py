"""How single settings are spelled: durations, CIDRs, addresses with a port, near misses."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from fractions import Fraction
from ipaddress import ip_address, ip_network
from typing import Final

from pyproxy.model import Network

_NANOSECONDS: Final = {
    "ns": 1,
    "us": 10**3,
    "\N{MICRO SIGN}s": 10**3,  # what Go prints
    "\N{GREEK SMALL LETTER MU}s": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_DURATION_TERM: Final = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([^0-9.]+)")
_CIDR: Final = re.compile(r"[0-9a-fA-F:.]+/[0-9]{1,3}")
_INT32: Final = range(-(2**31), 2**31)


class ConfigError(Exception):
    """The settings cannot be used; the message is one line that names the field or flag."""


def parse_duration(text: str) -> float:
    """Return the seconds that a duration of Go means: ``1h30m``, ``1.5s``, ``0``, ``-100ms``.

    Raises ValueError with the reason.
    """
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if digits == "0":
        return 0.0
    terms = _DURATION_TERM.findall(digits)
    known = all(unit in _NANOSECONDS for _, unit in terms)
    if not terms or not known or "".join(n + unit for n, unit in terms) != digits:
        raise ValueError(f'expected a duration such as 30s or 1h30m, got "{text}"')
    nanoseconds = int(sum(Fraction(number) * _NANOSECONDS[unit] for number, unit in terms))
    if nanoseconds >= 2**63:
        raise ValueError(f'"{text}" is longer than a duration can be')
    return sign * nanoseconds / 10**9 or 0.0  # never -0.0


def duration_text(seconds: float) -> str:
    """Print seconds as Go does: ``0s``, ``100ms``, ``1.5s``, ``1h0m0s``."""
    nanoseconds = round(Fraction(seconds) * 10**9)
    sign, rest = ("-", -nanoseconds) if nanoseconds < 0 else ("", nanoseconds)
    if rest == 0:
        return "0s"
    for unit, size, limit in (("ns", 1, 10**3), ("µs", 10**3, 10**6), ("ms", 10**6, 10**9)):
        if rest < limit:
            return f"{sign}{_decimal(rest, size)}{unit}"
    minutes, rest = divmod(rest, _NANOSECONDS["m"])
    hours, minutes = divmod(minutes, 60)
    head = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{sign}{head}{_decimal(rest, _NANOSECONDS['s'])}s"


def _decimal(count: int, size: int) -> str:
    whole, rest = divmod(count, size)
    fraction = f"{rest:0{len(str(size)) - 1}d}".rstrip("0") if rest else ""
    return f"{whole}.{fraction}" if fraction else str(whole)


def parse_cidr(text: str) -> Network | None:
    """Return the network of ``address/bits``, with the host bits cleared, or None."""
    if not _CIDR.fullmatch(text):
        return None
    try:
        return ip_network(text, strict=False)
    except ValueError:
        return None


def is_ip(text: str) -> bool:
    """Say whether this is an address; one with a zone (``fe80::1%eth0``) is not."""
    try:
        ip_address(text)
    except ValueError:
        return False
    return "%" not in text


def split_address(text: str) -> tuple[str, str] | None:
    """Return the host and the port of ``1.2.3.4:80`` or ``[::1]:80``, both unchecked, or None."""
    host, colon, port = text.rpartition(":")
    if not colon:
        return None
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1], port
    return None if ":" in host else (host, port)


def with_port(address: str, port: int) -> str:
    """Append the port to a bare IP; whatever else the text is, it stays as it is."""
    if not is_ip(address):
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def address_problem(address: str) -> str | None:
    """Say what keeps a text from being ``IP:port``."""
    parts = split_address(address)
    if parts is None:
        return f'"{address}" is not IP:port'
    host, port = parts
    if not is_ip(host):
        return f'"{host}" is not an IP address'
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        return f'"{port}" is not a port between 1 and 65535'
    return None


def int32(number: int) -> int:
    """Return the number unless the fields of the API, 32 bits wide, cannot hold it."""
    if number not in _INT32:
        raise ValueError(f"{number} does not fit into 32 bits")
    return number


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Return `` (did you mean X?)`` for the nearest known name, or nothing."""
    by_lower = {k.lower(): k for k in known}
    near = get_close_matches(name.lower(), by_lower, n=1)
    return f" (did you mean {prefix}{by_lower[near[0]]}?)" if near else ""
