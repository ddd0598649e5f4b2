"""``pyproxy top``: how much goes to which Service or endpoint, as a table that is drawn again."""

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from pyproxy.commands import CommandError
from pyproxy.commands._ask import Source, as_json, parsed, parser, show
from pyproxy.commands._table import WIDTH, table
from pyproxy.config.text import parse_duration
from pyproxy.traffic import RateRow, Rates, TrafficCounts, busiest, rates

CLEAR = "\x1b[H\x1b[2J"
SHORTEST_SECONDS = 0.6  # between two readings: answers are a moment old at most
ROWS = 30
COLUMNS: Mapping[str, str] = {
    "connections": "CONNS/s",
    "packets_in": "PKTS IN/s",
    "packets_out": "PKTS OUT/s",
    "bytes_in": "B IN/s",
    "bytes_out": "B OUT/s",
    "rejected": "REJECTS/s",
    "dropped": "DROPS/s",
    "denied": "DENIED/s",
}
STEPS = ("", "k", "M", "G", "T", "P")


def main(words: Sequence[str]) -> int:
    made = parser(
        "top", "Show how much goes to which Service, the busiest first.", without_daemon=""
    )
    made.add_argument("service", nargs="?", default="", metavar="NAMESPACE/NAME")
    made.add_argument("--namespace", default="", help="only this namespace")
    made.add_argument("--by", choices=("service", "endpoint"), default="service", help="rows")
    made.add_argument("--sort", choices=COLUMNS, default="connections", metavar="COLUMN",
                      help=", ".join(COLUMNS))  # fmt: skip
    made.add_argument("--interval", default="2s", metavar="TIME", help="default: %(default)s")
    made.add_argument(
        "-n", "--count", type=int, default=0, metavar="N",
        help="tables to print, one after the other; 0 draws on until interrupted",
    )  # fmt: skip
    made.add_argument("--rows", type=int, default=ROWS, metavar="N", help="default: %(default)s")
    own, source = parsed(made, words)
    try:
        seconds = parse_duration(own.interval)
    except ValueError as error:
        raise CommandError(f"--interval: {error}") from error
    if seconds < SHORTEST_SECONDS:
        raise CommandError(f"--interval: {own.interval} is less than {SHORTEST_SECONDS:g}s")
    if own.count < 0 or own.rows < 1:
        raise CommandError("top: -n is 0 or more, and --rows 1 or more")
    query = {"by": own.by, "service": own.service, "namespace": own.namespace}
    query = {name: value for name, value in query.items() if value}
    if own.output == "json":
        asyncio.run(follow(source, query, seconds, own.count or 1, as_json))
        return 0
    draws = not own.count and sys.stdout.isatty()

    def text(found: Rates) -> str:
        return (CLEAR if draws else "") + text_of(found, own.sort, own.rows)

    with suppress(KeyboardInterrupt):
        asyncio.run(follow(source, query, seconds, own.count, text))
    return 0


async def follow(
    source: Source,
    query: Mapping[str, str],
    seconds: float,
    count: int,
    text: Callable[[Rates], str],
) -> None:
    """Print rates again and again; ``count`` of 0 is for ever."""
    before = await asyncio.to_thread(source.ask, "traffic", TrafficCounts, query)
    printed = 0
    while not count or printed < count:
        await asyncio.sleep(seconds)
        now = await asyncio.to_thread(source.ask, "traffic", TrafficCounts, query)
        show(text(rates(before, now)))
        sys.stdout.flush()
        before = now
        printed += 1


def text_of(found: Rates, sort: str, rows: int) -> str:
    """Return the busiest rows: of each count what came in a second, and what came in all."""
    names = [name for name in COLUMNS if any(known(row, name) for row in found.items)]
    head = ["SERVICE", "CONNS", *(COLUMNS[name] for name in names)]
    shown = busiest(found.items, sort)[:rows]
    cells = [
        [subject(row), total(row), *(short(row.per_second.get(name)) for name in names)]
        for row in shown
    ]
    left = len(found.items) - len(shown)
    text = table(head, cells, WIDTH) if shown else "nothing is counted\n"
    more = f"and {left} more\n" if left else ""
    return text + more + "".join(f"not counted: {problem}\n" for problem in found.problems)


def known(row: RateRow, name: str) -> bool:
    return getattr(row.counts, name) is not None


def subject(row: RateRow) -> str:
    counts = row.counts
    port = f":{counts.port}" if counts.port else ""
    to = f" {counts.endpoint}" if counts.endpoint else ""
    return f"{counts.namespace}/{counts.service}{port}/{counts.proto}{to}"


def total(row: RateRow) -> str:
    return short(row.counts.connections)


def short(value: float | None) -> str:
    """Return a number in few digits, such as ``0.5``, ``12``, ``1.2k``; nothing for None."""
    if value is None:
        return ""
    for step in STEPS:
        rounded = round(value, 1) if value < 99.95 else round(value)
        if rounded < 1000 or step == STEPS[-1]:
            return f"{rounded:g}{step}"
        value /= 1000
    raise AssertionError("the last step takes all")
