"""What another configuration, mode or set of objects would change of this node's routes.

Both sides are sheets of routes, as ``pyproxy get routes`` has them, and what is compared is what
becomes of connections; beside that, the entries in which each mode writes it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from pyproxy.listing import EndpointRow, RouteRow
from pyproxy.view import Answer
from pyproxy.written import Entries, EntryRow

Kind = Literal["added", "removed", "changed"]
FIELDS = (
    "namespace", "service", "port", "kind", "from_pod", "from_node", "from_outside",
    "allowed_sources",
)  # fmt: skip


class FieldChange(Answer, frozen=True):
    """One thing that is different about a frontend."""

    field: str
    before: str
    after: str


class RouteChange(Answer, frozen=True):
    """A frontend that comes, goes, or treats connections otherwise."""

    change: Kind
    family: int
    frontend: str
    service: str  # NAMESPACE/NAME:PORT, that of after if it is another one
    fields: tuple[FieldChange, ...] = ()
    flows: int | None = None  # tracked connections that it has now; null: nobody could look
    ending: int | None = None  # those of them that would not go on


class EndpointChange(Answer, frozen=True):
    """An endpoint that a Service's frontends come to lead to, or do not any more."""

    change: Kind
    service: str
    address: str


class EntryChange(Answer, frozen=True):
    """An entry that a mode would add, change or remove."""

    change: Kind
    family: int
    kind: str
    name: str
    before: str = ""
    after: str = ""


class RouteChanges(Answer, frozen=True):
    """The answer of ``pyproxy diff`` about another configuration."""

    node: str
    mode_before: str
    mode_after: str
    items: tuple[RouteChange, ...]
    endpoints: tuple[EndpointChange, ...] = ()
    entries: tuple[EntryChange, ...] | None = ()  # null: what is written now is not known
    flows: int | None = None  # tracked connections of all that changes, and those that would end
    ending: int | None = None

    @property
    def is_equal(self) -> bool:
        changes = (*self.items, *self.endpoints, *(self.entries or ()))
        return not changes and self.mode_before == self.mode_after


class _Key(NamedTuple):
    family: int
    frontend: str


def route_changes(before: Sequence[RouteRow], after: Sequence[RouteRow]) -> tuple[RouteChange, ...]:
    """Return what differs, in the order of families and frontends."""
    old, new = by_frontend(before), by_frontend(after)
    return tuple(changes(old, new))


def changes(old: dict[_Key, RouteRow], new: dict[_Key, RouteRow]) -> Iterator[RouteChange]:
    for key in sorted(old.keys() | new.keys()):
        was, will = old.get(key), new.get(key)
        if will is None and was is not None:
            yield RouteChange("removed", *key, owner_of(was))
        elif will is not None and was is None:
            yield RouteChange("added", *key, owner_of(will))
        elif was is not None and will is not None:
            fields = tuple(field_changes(was, will))
            if fields:
                yield RouteChange("changed", *key, owner_of(will), fields)


def endpoint_changes(
    before: Iterable[EndpointRow], after: Iterable[EndpointRow]
) -> tuple[EndpointChange, ...]:
    """Return the endpoints that come into use, and those that go out of it."""
    old, new = used(before), used(after)
    found = [EndpointChange("added", *pair) for pair in new - old]
    found += [EndpointChange("removed", *pair) for pair in old - new]
    return tuple(sorted(found, key=lambda item: (item.service, item.address)))


def used(rows: Iterable[EndpointRow]) -> set[tuple[str, str]]:
    return {(owner_of(row), row.address) for row in rows if row.used}


def entry_changes(before: Entries, after: Entries) -> tuple[EntryChange, ...] | None:
    """Return what would be written otherwise; None where nobody knows what is written."""
    old, new = {f.family: f.entries for f in before.families}, after.families
    if any(old.get(family.family, ()) is None or family.entries is None for family in new):
        return None
    return tuple(
        change
        for family in new
        for change in changed_entries(
            family.family, contents(old.get(family.family)), contents(family.entries)
        )
    )


def changed_entries(
    family: int, old: dict[tuple[str, str], str], new: dict[tuple[str, str], str]
) -> Iterator[EntryChange]:
    for key in sorted(old.keys() | new.keys()):
        was, will = old.get(key), new.get(key)
        if was == will:
            continue
        kind: Kind = "added" if was is None else "removed" if will is None else "changed"
        yield EntryChange(kind, family, *key, was or "", will or "")


def contents(rows: Iterable[EntryRow] | None) -> dict[tuple[str, str], str]:
    return {(row.kind, row.name): row.content for row in rows or ()}


def field_changes(was: RouteRow, will: RouteRow) -> Iterator[FieldChange]:
    for field in FIELDS:
        before, after = getattr(was, field), getattr(will, field)
        if before != after:
            yield FieldChange(field.replace("_", " "), text_of(before), text_of(after))


def by_frontend(rows: Iterable[RouteRow]) -> dict[_Key, RouteRow]:
    return {_Key(row.family, row.frontend): row for row in rows}


def owner_of(row: RouteRow | EndpointRow) -> str:
    return f"{row.namespace}/{row.service}" + (f":{row.port}" if row.port else "")


def text_of(value: object) -> str:
    match value:
        case None:
            return "everybody"
        case tuple():
            return ", ".join(map(str, value)) or "nobody"
        case _:
            return str(value)
