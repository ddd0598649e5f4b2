"""Reading a parsed document: a field of the type it should have, or an error with its path.

The rules are those that the API server holds every object to. Where the rest of pyproxy relies on
one (a name that fits into a rule's comment, a port that fits into 16 bits), it is enforced here.
"""

import json
import re
from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from pyproxy.ip import canonical_ip

Document = Mapping[str, object]

_LABEL: Final = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_is_label = re.compile(_LABEL).fullmatch
_is_subdomain = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*").fullmatch
_is_label_value = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?").fullmatch
_is_number = re.compile(r"-?[0-9]{1,18}", re.ASCII).fullmatch


class FieldError(Exception):
    """A field holds what the API server would refuse; the text begins with the field's path."""


def brief(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."


class Field(Struct, frozen=True):
    """A value in a document and the way to it. What is absent or null is None."""

    value: object
    path: str = ""

    def __getitem__(self, key: str) -> "Field":
        return Field(self.mapping().get(key), f"{self.path}.{key}" if self.path else key)

    def wrong(self, reason: str) -> FieldError:
        """Return the error: the path, and what is wrong there."""
        return FieldError(f"{self.path}: {reason}" if self.path else reason)

    def shown(self) -> str:
        """Print the value, short, for an error."""
        if isinstance(self.value, Mapping | list):
            return "an object" if isinstance(self.value, Mapping) else "a list"
        if not isinstance(self.value, str):
            return brief(str(self.value))
        # A line break, or what moves a terminal's cursor, is not repeated as it is.
        return brief(f'"{self.value}"' if self.value.isprintable() else json.dumps(self.value))

    def word(self) -> str:
        """Print the value, short, where it is the name of something."""
        is_plain = isinstance(self.value, str) and self.value.isprintable()
        return brief(str(self.value)) if is_plain else self.shown()

    def mapping(self) -> Document:
        if self.value is None:
            return {}
        if not isinstance(self.value, Mapping):
            raise self.wrong(f"{self.shown()} is not an object")
        return self.value

    def items(self) -> tuple["Field", ...]:
        if self.value is None:
            return ()
        if not isinstance(self.value, list):
            raise self.wrong(f"{self.shown()} is not a list")
        return tuple(Field(value, f"{self.path}[{i}]") for i, value in enumerate(self.value))

    def text(self, default: str = "") -> str:
        if self.value is None:
            return default
        if not isinstance(self.value, str):
            raise self.wrong(f"{self.shown()} is not a string (quote it)")
        return self.value

    def is_true(self, *, default: bool = False) -> bool:
        if self.value is None:
            return default
        if not isinstance(self.value, bool):
            raise self.wrong(f"{self.shown()} is neither true nor false")
        return self.value

    def number(self) -> int | None:
        """Return a whole number; one in quotes counts, as it does in ``decode``."""
        if isinstance(self.value, str) and _is_number(self.value):
            return int(self.value)
        if self.value is None or (isinstance(self.value, int) and not isinstance(self.value, bool)):
            return self.value
        raise self.wrong(f"{self.shown()} is not a number")

    def port(self) -> int | None:
        """Return a port; 0, by which the API means that there is none, is None."""
        number = self.number()
        if number is not None and not 0 <= number <= 65535:
            raise self.wrong(f"{self.shown()} is not a port")
        return number or None

    def one_of(self, words: tuple[str, ...], default: str) -> str:
        text = self.text() or default
        if text not in words:
            raise self.wrong(f"{self.shown()} is not one of {', '.join(words)}")
        return text

    def ip(self) -> str:
        """Return an address in its canonical form."""
        ip = canonical_ip(self.text())
        if ip is None:
            raise self.wrong(f"{self.shown()} is not an IP address")
        return ip

    def labels(self) -> Mapping[str, str]:
        return {key: self[key].label_value() for key in self.mapping()}

    def label_value(self) -> str:
        if not _is_label_value(self.text()):
            raise self.wrong(f"{self.shown()} is not the value of a label")
        return self.text()

    def label(self, default: str = "") -> str:
        """Return a name of up to 63 lower-case letters, digits and hyphens."""
        text = self.text(default)
        if not _is_label(text):
            raise self.wrong("it is missing" if not text else f"{self.shown()} is not a name")
        return text

    def subdomain(self) -> str:
        """Return a name that may have dots, as most objects' names may."""
        text = self.text()
        if not _is_subdomain(text):
            raise self.wrong("it is missing" if not text else f"{self.shown()} is not a name")
        return text
