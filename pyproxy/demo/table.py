"""The demo's results as text for a person, and as JSON for a program. No I/O."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pyproxy.demo.expect import Case, Check, Reply, Update

WIDTH = 108
BAR_CELLS = 4
EIGHTHS = " ▏▎▍▌▋▊▉█"
GREEN, RED, BOLD = "32", "31", "1"


class Look(NamedTuple):
    """What the terminal can show."""

    colour: bool = False
    blocks: bool = True

    def paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour else text

    @property
    def good(self) -> str:
        return self.paint("✓" if self.blocks else "+", GREEN)

    @property
    def bad(self) -> str:
        return self.paint("✗" if self.blocks else "!", RED)


class Row(NamedTuple):
    """A case, what came back, and the verdict."""

    case: Case
    replies: tuple[Reply, ...]
    check: Check


HEAD = ("service", "address", "from", "result", "pods see")


def table(rows: Sequence[Row], pods: Sequence[str], look: Look) -> list[str]:
    """Return the lines of the table, each pod with a column; a repeated cell is left empty."""
    cells = [_cells(row) for row in rows]
    widths = [max(len(line[column]) for line in [HEAD, *cells]) for column in range(len(HEAD))]
    numbers = "".join(f"{pod.rpartition('-')[2]:<{BAR_CELLS + 1}}" for pod in pods)
    lines = [look.paint("  " + _line(HEAD, numbers, widths), BOLD)]
    above: tuple[str, ...] = ("",) * len(HEAD)
    for row, line in zip(rows, cells, strict=True):
        mark = look.bad if row.check.complaints else look.good
        shown = _without_repetition(line, above)
        lines.append(f"{mark} {_line(shown, bars(row.replies, pods, look), widths)}")
        above = line
    return lines


def _line(cells: Sequence[str], bars: str, widths: Sequence[int]) -> str:
    *front, last = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{'  '.join(front)}  {bars} {last}".rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    asked, origin = row.case.asked, row.case.origin
    return (asked.service, str(asked.address), origin.name, _result(row), _seen(row))


def _without_repetition(line: tuple[str, ...], above: tuple[str, ...]) -> tuple[str, ...]:
    service, address, *rest = line
    if service != above[0]:
        return line
    return ("", "" if address == above[1] else address, *rest)


def _result(row: Row) -> str:
    counts = Counter(reply.result for reply in row.replies)
    return ", ".join(f"{count} {result}" for result, count in counts.items())


def _seen(row: Row) -> str:
    """Name the address that pods saw; the node's are one to a reader, whichever it was."""
    seen = sorted({reply.client for reply in row.replies if reply.client})
    if not seen:
        return "-"
    if row.case.seen == "the node's" and not row.check.complaints:
        return "the node"
    return seen[0] if len(seen) == 1 else f"{len(seen)} addresses"


def bars(replies: Iterable[Reply], pods: Sequence[str], look: Look) -> str:
    """Return a bar for each pod, as long as its share; the longest fills its column."""
    counts = Counter(reply.pod for reply in replies if reply.pod)
    most = max(counts.values(), default=1)
    return "".join(f"{bar(counts[pod], most, look):<{BAR_CELLS + 1}}" for pod in pods)


def bar(count: int, most: int, look: Look) -> str:
    if not count:
        return "·" if look.blocks else "."
    if not look.blocks:
        return "#" * max(1, round(BAR_CELLS * count / most))
    full, eighths = divmod(max(1, round(BAR_CELLS * 8 * count / most)), 8)
    return EIGHTHS[-1] * full + EIGHTHS[eighths].strip()


def update_lines(update: Update, look: Look) -> list[str]:
    mark = look.bad if update.failures else look.good
    return [
        f"{mark} {update.requests} requests in {update.seconds:.1f} s,"
        f" {len(update.failures)} failed"
    ]


def paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


def closing(checks: Sequence[Check], look: Look) -> list[str]:
    """Return the last lines: that all is well, or everything that is not."""
    wrong = [check for check in checks if check.complaints]
    if not wrong:
        return [look.paint(f"all {len(checks)} checks passed", GREEN)]
    lines = [look.paint(f"{len(wrong)} of {len(checks)} checks failed:", RED)]
    for check in wrong:
        lines += [f"{look.bad} {check.name}", *(f"    {text}" for text in check.complaints)]
    return lines


def as_json(
    mode: str, rows: Iterable[Row], update: Update, checks: Sequence[Check]
) -> Mapping[str, Any]:
    return {
        "mode": mode,
        "ok": not any(check.complaints for check in checks),
        "rows": [_row_json(row) for row in rows],
        "rolling_update": update._asdict(),
        "checks": [check._asdict() for check in checks],
    }


def _row_json(row: Row) -> Mapping[str, Any]:
    asked = row.case.asked
    return {
        "service": asked.service,
        "kind": asked.kind,
        "address": str(asked.address),
        "from": row.case.origin.name,
        "results": Counter(reply.result for reply in row.replies),
        "answered_by": Counter(reply.pod for reply in row.replies if reply.pod),
        "clients_seen": sorted({reply.client for reply in row.replies if reply.client}),
        "complaints": row.check.complaints,
    }
