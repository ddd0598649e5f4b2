"""Tables for a terminal: aligned, and never wider than so many columns."""

from collections.abc import Iterable, Sequence
from datetime import datetime

WIDTH = 100
GAP = "  "
SHORTEST = 8  # cells are not shortened below that
NOTHING = "-"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], width: int = WIDTH) -> str:
    """Return a table; where it is too wide, its widest columns lose the middle of their texts."""
    cells = [tuple(head), *(tuple(cell or NOTHING for cell in row) for row in rows)]
    widths = fitting([max(map(len, column)) for column in zip(*cells, strict=True)], width)
    return "".join(f"{line(row, widths)}\n" for row in cells)


def line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (f"{shortened(cell, size):<{size}}" for cell, size in zip(row, widths, strict=True))
    return GAP.join(cells).rstrip()


def fitting(widths: Sequence[int], width: int) -> list[int]:
    """Return the widths with the widest made narrower, until they fit or none can be."""
    fitted = list(widths)
    room = width - len(GAP) * (len(fitted) - 1)
    while sum(fitted) > room:
        widest = max(range(len(fitted)), key=fitted.__getitem__)
        if fitted[widest] <= SHORTEST:
            break
        fitted[widest] -= 1
    return fitted


def shortened(text: str, width: int) -> str:
    """Return a text that fits: how names begin and end tells them apart."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def age(since: str | None, now: datetime) -> str:
    """Return how long ago an RFC 3339 moment was, as kubectl would: ``5s``, ``3m``, ``2h``."""
    if since is None:
        return ""
    seconds = max(0, int((now - datetime.fromisoformat(since)).total_seconds()))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
