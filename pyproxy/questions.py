"""Every question of the API that the state of a node answers, by its path. No I/O.

A daemon answers them on its socket, and a command that is given files answers them itself.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from pyproxy import explain, listing
from pyproxy.view import Answer, Question

VERSION: Final = "v1"


class Entry(NamedTuple):
    """How a question is answered, and by what; ``parameters`` are those of its query."""

    answer: Question
    type: type[Answer]
    parameters: tuple[str, ...]
    help: str


FILTER = ("service", "namespace")

QUESTIONS: Final[Mapping[str, Entry]] = {
    "services": Entry(listing.services, listing.Services, FILTER, "how far each Service is"),
    "status": Entry(
        listing.status, listing.Status, ("service",), "how far one Service is, there or not"
    ),
    "endpoints": Entry(listing.endpoints, listing.Endpoints, FILTER, "endpoints, and which serve"),
    "routes": Entry(listing.routes, listing.Routes, FILTER, "frontends, and what they do"),
    "conflicts": Entry(
        listing.conflicts, listing.Conflicts, FILTER, "what Services ask for and do not get"
    ),
    "explain": Entry(
        explain.explain,
        explain.Explanation,
        ("service", "from", "to"),
        "what becomes of connections, and why",
    ),
}
