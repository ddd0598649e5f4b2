"""Every question of the API that the state of a node answers, by its path. No I/O.

A daemon answers them on its socket, and a command that is given files answers them itself.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from pyproxy import explain, listing, planned
from pyproxy.model import Service
from pyproxy.view import Answer, Query, Question, View, asked_services

VERSION: Final = "v1"


class Sheet(NamedTuple):
    """A question about all Services, or some: the rows of each, and the answer around them.

    There may be very many rows: who must not keep others waiting makes them little by little.
    """

    rows: Callable[[View, Service], Iterable[Answer]]
    whole: Callable[[View, Sequence[Any]], Answer]  # its field ``items`` has the rows

    def answer(self, view: View, query: Query) -> Answer:
        services = asked_services(view, query)
        return self.whole(view, [row for service in services for row in self.rows(view, service)])


# The parameters of a sheet are service=NAMESPACE/NAME and namespace=NAME.
SHEETS: Final[Mapping[str, Sheet]] = {
    "services": Sheet(listing.service_rows, listing.services),
    "endpoints": Sheet(listing.endpoint_rows, listing.endpoints),
    "routes": Sheet(listing.route_rows, listing.routes),
    "plan": Sheet(planned.plan_rows, planned.plans),
    "conflicts": Sheet(listing.conflict_rows, listing.conflicts),
}
OTHERS: Final[Mapping[str, Question]] = {"status": listing.status, "explain": explain.explain}
QUESTIONS: Final[Mapping[str, Question]] = {
    **{name: sheet.answer for name, sheet in SHEETS.items()},
    **OTHERS,
}
