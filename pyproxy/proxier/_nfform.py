"""The expressions of nf_tables rules in a form in which they can be compared. No I/O."""

from collections.abc import Iterator

from pyproxy.proxier._netlink import attributes

NESTED = 0x8000
_VOLATILE = {"lookup": {4}, "counter": {1, 2}}  # a number of the transaction; what was counted
_MEANT = {"lookup": {3}}  # zero is the register of the verdict, absent is no register at all

Form = tuple[tuple[str, tuple[tuple[int, bytes], ...]], ...]


def normal_form(expressions: bytes) -> Form:
    """Return what is the same for the expressions of a rule and for the kernel's dump of them.

    The kernel adds attributes that are zero unless asked for, such as the flags of a lookup, and
    has an order of its own. So attributes are sorted, and those that are zero are left out. The
    name of an anonymous map is empty: compare its elements.
    """
    return tuple(_normal_expression(body) for _, body in attributes(expressions, 0))


def _normal_expression(body: bytes) -> tuple[str, tuple[tuple[int, bytes], ...]]:
    parts = dict(plain_attributes(body))
    name = parts[1].rstrip(b"\0").decode()
    kept = sorted(
        (kind, b"" if is_anonymous(name, kind, value) else value)
        for kind, value in plain_attributes(parts.get(2, b""))
        if kind not in _VOLATILE.get(name, ()) and (any(value) or kind in _MEANT.get(name, ()))
    )
    return name, tuple(kept)


def is_anonymous(expression: str, kind: int, value: bytes) -> bool:
    """Say whether this attribute is the name of a map that exists for one rule only."""
    return expression == "lookup" and kind == 1 and value.startswith(b"__")


def plain_attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield attributes without the flag that some have for containing others."""
    for kind, value in attributes(data, 0):
        yield kind & ~NESTED, value
