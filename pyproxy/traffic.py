"""Answers about how much goes where: counts, and rates between two of them. No I/O."""

from collections.abc import Iterable, Mapping

from pyproxy.counters import FIELDS, NOTHING, Counts, Traffic, Where
from pyproxy.model import Proto
from pyproxy.view import Answer, Query, QueryError, asked_service


class CountRow(Answer, frozen=True):
    """What went through a Service port, or to one of its endpoints, since it is counted."""

    namespace: str
    service: str
    port: str
    proto: Proto
    endpoint: str = ""  # of a whole port, empty
    connections: int | None = None
    rejected: int | None = None
    dropped: int | None = None
    packets_in: int | None = None
    packets_out: int | None = None
    bytes_in: int | None = None
    bytes_out: int | None = None
    denied: int | None = None


class TrafficCounts(Answer, frozen=True):
    """All that was asked for. ``at`` is in seconds, of a clock that only two answers can share."""

    mode: str
    at: float
    items: tuple[CountRow, ...] = ()
    problems: tuple[str, ...] = ()  # why something is not counted


class RateRow(Answer, frozen=True):
    """A row, with what came in each second of an interval."""

    counts: CountRow
    per_second: Mapping[str, float]  # by the name of a count


class Rates(Answer, frozen=True):
    """What went where in an interval; without one, since it is counted."""

    mode: str
    seconds: float
    items: tuple[RateRow, ...]
    problems: tuple[str, ...] = ()


def wants_endpoints(query: Query) -> bool:
    """Read ``by=service`` or ``by=endpoint``. Raises ``QueryError``."""
    by = query.get("by", "service")
    if by not in ("service", "endpoint"):
        raise QueryError(f"by: {by} is not service or endpoint")
    return by == "endpoint"


def asked_rows(traffic: Traffic, query: Query) -> tuple[CountRow, ...]:
    """Return the rows that a query is about, by name. Raises ``QueryError``."""
    service, namespace = asked_service(query), query.get("namespace", "")
    with_endpoints = wants_endpoints(query)
    found = [
        (where, counts)
        for where, counts in traffic.items()
        if with_endpoints == (where.endpoint is not None)
        and service in (None, where.owner.service_name)
        and namespace in ("", where.owner.namespace)
    ]
    return tuple(row_of(where, counts) for where, counts in sorted(found, key=by_name))


def by_name(pair: tuple[Where, Counts]) -> tuple[object, ...]:
    where, _counts = pair
    return (*where.owner, where.endpoint or ("", 0))


def row_of(where: Where, counts: Counts) -> CountRow:
    numbers = {name: getattr(counts, name) for name in FIELDS}
    endpoint = str(where.endpoint) if where.endpoint is not None else ""
    return CountRow(*where.owner, endpoint, **numbers)


def rates(before: TrafficCounts | None, now: TrafficCounts) -> Rates:
    """Return what came between two answers. A row that is new came whole in between."""
    seconds = now.at - before.at if before is not None else 0.0
    known = {name_of(row): row for row in before.items} if before is not None else {}
    items = tuple(RateRow(row, speeds(known.get(name_of(row)), row, seconds)) for row in now.items)
    return Rates(now.mode, seconds, items, now.problems)


def name_of(row: CountRow) -> tuple[str, ...]:
    return row.namespace, row.service, row.port, row.proto, row.endpoint


def speeds(before: CountRow | None, now: CountRow, seconds: float) -> dict[str, float]:
    if seconds <= 0:
        return {}
    found = {}
    for name in FIELDS:
        value = getattr(now, name)
        if value is not None:
            old = getattr(before or NOTHING, name) or 0
            found[name] = (value - old if value >= old else value) / seconds
    return found


def busiest(items: Iterable[RateRow], name: str) -> list[RateRow]:
    """Return the rows by a count: the quickest first; without an interval, the largest."""

    def size(row: RateRow) -> tuple[float, float]:
        return row.per_second.get(name, 0.0), getattr(row.counts, name) or 0

    return sorted(items, key=size, reverse=True)
