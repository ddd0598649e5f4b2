"""How much went through each Service port, and to each endpoint: counts that only grow. No I/O."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from msgspec import Struct
from msgspec.structs import astuple

from pyproxy.model import Address, ServicePortName

K = TypeVar("K")


class Counts(Struct, frozen=True, gc=False):
    """What was counted; None where the mode cannot tell. In: towards the endpoint."""

    connections: int | None = None  # new ones; of UDP, new flows
    rejected: int | None = None  # packets that were refused: nobody serves
    dropped: int | None = None  # packets that a traffic policy leaves without an answer
    denied: int | None = None  # packets that were dropped for their source: no range has it
    packets_in: int | None = None
    packets_out: int | None = None
    bytes_in: int | None = None
    bytes_out: int | None = None


FIELDS = Counts.__struct_fields__
NOTHING = Counts()


class Where(NamedTuple):
    """A Service port as a whole, or what went to one of its endpoints."""

    owner: ServicePortName
    endpoint: Address | None = None


class Entry(NamedTuple, Generic[K]):
    """What one entry of a target has counted since it was written, as a whole or for an endpoint.

    One that has ``ended`` is no more: what the same key counts after it begins anew.
    """

    key: K
    endpoint: Address | None
    counts: Counts
    ended: bool = False


class Reading(NamedTuple):
    """What the entries of a target have counted, and whose each is."""

    entries: Sequence[Entry[Any]]
    owners: Sequence[tuple[ServicePortName, Iterable[Any]]]  # with the keys of its entries


Traffic = Mapping[Where, Counts]


def total(counts: Iterable[Counts]) -> Counts:
    """Return the sum; of what nobody can tell, nothing."""
    return Counts(*map(added, zip(*map(astuple, counts), strict=True)))


def added(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def growth(before: Counts, now: Counts) -> Counts:
    """Return what came since ``before``: all of it, where an entry began anew in between."""
    pairs = [(getattr(before, name) or 0, getattr(now, name)) for name in FIELDS]
    if any(new is not None and new < old for old, new in pairs):
        return now
    return Counts(*(None if new is None else new - old for old, new in pairs))


def merged(all_traffic: Iterable[Traffic]) -> dict[Where, Counts]:
    """Return what several families counted together."""
    found: dict[Where, list[Counts]] = {}
    for traffic in all_traffic:
        for where, counts in traffic.items():
            found.setdefault(where, []).append(counts)
    return {where: each[0] if len(each) == 1 else total(each) for where, each in found.items()}


class Tally:
    """Adds up what entries counted, which begin at zero whenever they are written anew."""

    def __init__(self) -> None:
        self._last: dict[tuple[object, Address | None], Counts] = {}
        self._sums: dict[Where, Counts] = {}

    def take(self, reading: Reading, *, by_endpoint: bool) -> dict[Where, Counts]:
        """Take in a reading; return the sums. With ``by_endpoint`` it has all endpoints there are.

        Entries and endpoints that are no more are forgotten, and so is what they counted.
        """
        owners = {key: owner for owner, keys in reading.owners for key in keys}
        there = set()
        for key, endpoint, counts, ended in reading.entries:
            owner = owners.get(key)
            if owner is None:  # of somebody else
                continue
            place = (key, endpoint)
            there.add(place)
            before = self._last.get(place)
            if ended:
                self._last.pop(place, None)
            else:
                self._last[place] = counts
            if counts == before:
                continue
            where = Where(owner, endpoint)
            new = growth(before, counts) if before is not None else counts
            known = self._sums.get(where)
            self._sums[where] = new if known is None else total((known, new))
        self._forget(owners, there if by_endpoint else None)
        return {w: c for w, c in self._sums.items() if by_endpoint or w.endpoint is None}

    def _forget(
        self,
        owners: Mapping[object, ServicePortName],
        there: Collection[tuple[object, Address | None]] | None,
    ) -> None:
        self._last = {
            (key, endpoint): counts
            for (key, endpoint), counts in self._last.items()
            if key in owners and (endpoint is None or there is None or (key, endpoint) in there)
        }
        alive = {Where(owners[key], endpoint) for key, endpoint in self._last}
        alive |= {Where(owner) for owner in owners.values()}
        self._sums = {where: counts for where, counts in self._sums.items() if where in alive}
