"""Counts of Services as metrics: so many rows at most, and all others together as one. No I/O."""

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from pyproxy.counters import Counts, Traffic, Where, total

MOST_ROWS: Final = 1000  # each is a series of every metric
OTHER: Final = "other"  # in place of each label
SERVICE: Final = ("namespace", "service", "port", "protocol")
ENDPOINT: Final = (*SERVICE, "endpoint")


class Row(NamedTuple):
    """A metric, and the fields of ``Counts`` that it has; the labels tell them apart."""

    name: str
    help: str
    fields: Mapping[str, tuple[str, ...]]  # of Counts, to the values of the labels
    labels: tuple[str, ...] = ()


BOTH_WAYS: Final = ("direction",)
ROWS: Final = (
    Row("connections_total", "New connections, and flows of UDP", {"connections": ()}),
    Row(
        "refused_packets_total",
        "Packets that were not forwarded",
        {
            "rejected": ("reject", "no_endpoint"),
            "dropped": ("drop", "traffic_policy"),
            "denied": ("drop", "source_ranges"),
        },
        ("action", "reason"),
    ),
    Row("packets_total", "Packets", {"packets_in": ("in",), "packets_out": ("out",)}, BOTH_WAYS),
    Row("bytes_total", "Bytes", {"bytes_in": ("in",), "bytes_out": ("out",)}, BOTH_WAYS),
)


class ServiceMetrics(Collector):
    """What was read last. A row that was shown stays shown while there is such a Service.

    So no series goes backwards because another became busier. ``on_full`` hears, once, how many
    rows there are when not all of them can be shown.
    """

    def __init__(
        self,
        *,
        most_rows: int = MOST_ROWS,
        on_full: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._most = most_rows
        self._on_full = on_full
        self._was_full = False
        self._shown: dict[str, dict[Where, Counts]] = {}
        self._rest: dict[str, Counts | None] = {}
        self.publish({})

    def publish(self, traffic: Traffic) -> None:
        """Take in the counts of Services and endpoints, as of now."""
        services = {where: c for where, c in traffic.items() if where.endpoint is None}
        endpoints = {where: c for where, c in traffic.items() if where.endpoint is not None}
        for kind, rows in (("service", services), ("endpoint", endpoints)):
            shown = seated(rows, self._shown.get(kind, {}), self._most)
            rest = [counts for where, counts in rows.items() if where not in shown]
            self._shown[kind] = shown
            self._rest[kind] = total(rest) if rest else None
            if rest and not self._was_full:
                self._was_full = True
                self._on_full(len(rows))

    def describe(self) -> Iterator[Metric]:
        """Name the metrics without reading anything, as the registry asks when it begins."""
        for kind in ("service", "endpoint"):
            for row in ROWS:
                yield family(kind, row)

    def collect(self) -> Iterator[Metric]:
        for kind, shown in self._shown.items():
            rest = self._rest[kind]
            for row in ROWS:
                made = family(kind, row)
                for where, counts in shown.items():
                    put(made, row, labels(where), counts)
                if rest is not None:
                    width = len(SERVICE if kind == "service" else ENDPOINT)
                    put(made, row, (OTHER,) * width, rest)
                if made.samples:
                    yield made


def seated(rows: Traffic, before: Traffic, most: int) -> dict[Where, Counts]:
    """Return the rows to show: those that were, and while there is room, the busiest of others."""
    kept = {where: rows[where] for where in before if where in rows}
    new = (where for where in rows if where not in kept)
    best = heapq.nlargest(most - len(kept), new, key=lambda where: rows[where].connections or 0)
    return kept | {where: rows[where] for where in best}


def family(kind: str, row: Row) -> CounterMetricFamily:
    names = SERVICE if kind == "service" else ENDPOINT
    of = "of a Service's port" if kind == "service" else "to an endpoint"
    return CounterMetricFamily(
        f"pyproxy_{kind}_{row.name}", f"{row.help} {of}", labels=(*names, *row.labels)
    )


def put(made: CounterMetricFamily, row: Row, values: tuple[str, ...], counts: Counts) -> None:
    for field, added in row.fields.items():
        value = getattr(counts, field)
        if value is not None:
            made.add_metric((*values, *added), value)


def labels(where: Where) -> tuple[str, ...]:
    owner = where.owner
    found = (owner.namespace, owner.service, owner.port, owner.proto)
    return found if where.endpoint is None else (*found, str(where.endpoint))
