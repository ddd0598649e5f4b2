"""What listeners do, in words: for tables that people read."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pyproxy.model import Action, Forward, Pass, Route
from pyproxy.rules.listeners import stance


class Treatment(NamedTuple):
    """For whom a frontend does what, with which backends."""

    whom: str
    what: str
    backends: str = ""

    def __str__(self) -> str:
        return " ".join(
            filter(None, (self.what, self.whom, self.backends and f"by {self.backends}"))
        )


def treatments(route: Route) -> Iterator[Treatment]:
    """Yield a row for each group of origins that are treated alike."""
    if stance(route) == "refuse":
        yield Treatment("everybody", "refuse")
        return
    groups: dict[tuple[str, str], list[str]] = {}
    actions = {"pods": route.from_pod, "the node": route.from_node, "others": route.from_outside}
    for origin, action in actions.items():
        groups.setdefault((verb_of(action), backends_text(action)), []).append(origin)
    within = ""
    if route.allowed_sources is not None:
        within = f" in {', '.join(map(str, route.allowed_sources))}"
    for (verb, backends), origins in groups.items():
        yield Treatment(whom(origins) + ("" if verb == "pass by" else within), verb, backends)
    if within:
        yield Treatment("everybody else", "silent")


def whom(origins: Sequence[str]) -> str:
    return "everybody" if len(origins) == 3 else ", ".join(origins)


def verb_of(action: Action) -> str:
    match action:
        case Forward():
            return "serve"
        case Pass():
            return "pass by"
        case _:
            return "silent"


def backends_text(action: Action) -> str:
    if not isinstance(action, Forward):
        return ""
    return ", ".join(
        f"{backend.address}" if backend.weight == 1 else f"{backend.address} x{backend.weight}"
        for backend in action.pool.backends
    )
