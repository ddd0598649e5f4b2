"""What a flag is: a row of a table, with a kind that says how text becomes a value."""

import math
from collections.abc import Callable, Mapping
from typing import Final

from msgspec import Struct

from pyproxy.config import VModule
from pyproxy.config.text import (
    address_problem,
    did_you_mean,
    int32,
    is_ip,
    parse_cidr,
    parse_duration,
    with_port,
)

Value = str | bool | int | float | tuple[str, ...] | tuple[VModule, ...] | Mapping[str, bool]

_TRUE: Final = frozenset(("1", "t", "T", "true", "TRUE", "True"))
_FALSE: Final = frozenset(("0", "f", "F", "false", "FALSE", "False"))


class Kind(Struct, frozen=True):
    """What a flag's value is. ``parse`` raises ValueError with the reason."""

    placeholder: str
    parse: Callable[[str], Value]


class Flag(Struct, frozen=True):
    """One flag. It sets the ``setting``, a path into Config, or else the field of Options."""

    name: str
    kind: Kind
    setting: str
    help: str
    placeholder: str = ""
    default: str = ""  # where it is not that of the setting
    instead: str = ""  # what replaces a deprecated flag


class Group(Struct, frozen=True):
    """Flags that belong together in ``--help``."""

    title: str
    flags: tuple[Flag, ...]


# --- kinds of values ----------------------------------------------------------------------------


def _bool(text: str) -> bool:
    if text not in _TRUE | _FALSE:
        raise ValueError(f'expected true or false, got "{text}"')
    return text in _TRUE


def _integer(text: str) -> int:
    try:
        number = int(text, 0)
    except ValueError:
        raise ValueError(f'expected an integer, got "{text}"') from None
    return int32(number)


def _level(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f'expected a level such as 2, got "{text}"')
    return int32(int(text))


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f'expected a number, got "{text}"')
    return number


def _ip(text: str) -> str:
    if text and not is_ip(text):
        raise ValueError(f'"{text}" is not an IP address')
    return text


def _ip_port(text: str) -> str:
    if text and (problem := address_problem(with_port(text, 1))):
        raise ValueError(problem)
    return text


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def _cidrs(text: str) -> tuple[str, ...]:
    for cidr in _list(text):
        if parse_cidr(cidr) is None:
            raise ValueError(f'"{cidr}" is not a CIDR such as 10.0.0.0/8 or fd00::/64')
    return _list(text)


def _gates(text: str) -> Mapping[str, bool]:
    gates = {}
    for item in _list(text):
        name, equals, on = item.partition("=")
        if not equals:
            raise ValueError(f'expected Gate=true or Gate=false, got "{item}"')
        gates[name.strip()] = _bool(on.strip())
    return gates


def _vmodule(text: str) -> tuple[VModule, ...]:
    items = []
    for item in filter(None, _list(text)):
        pattern, _, level = item.partition("=")
        if not pattern or not level:
            raise ValueError(f'expected file=level, got "{item}"')
        items.append(VModule(pattern, _level(level)))
    return tuple(items)


def _loop(text: str) -> str:
    loops = ("auto", "uvloop", "asyncio")
    if text not in loops:
        raise ValueError(f'"{text}" is not one of {", ".join(loops)}{did_you_mean(text, loops)}')
    return text


BOOL: Final = Kind("", _bool)
STRING: Final = Kind("NAME", str)
INTEGER: Final = Kind("N", _integer)
LEVEL: Final = Kind("N", _level)
NUMBER: Final = Kind("N", _number)
DURATION: Final = Kind("DURATION", parse_duration)
IP: Final = Kind("IP", _ip)
IP_PORT: Final = Kind("IP[:PORT]", _ip_port)
LIST: Final = Kind("CIDR,...", _list)
CIDRS: Final = Kind("CIDR,...", _cidrs)
GATES: Final = Kind("GATE=BOOL,...", _gates)
VMODULE: Final = Kind("FILE=N,...", _vmodule)
LOOP: Final = Kind("LOOP", _loop)
