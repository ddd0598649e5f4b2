"""The difference between two mappings."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Delta(Generic[K, V]):
    """What turns one mapping into another. ``removed`` and ``changed`` tell the old values too.

    The three mappings have no key in common. An empty delta is false.
    """

    added: Mapping[K, V]
    changed: Mapping[K, tuple[V, V]]  # old, new
    removed: Mapping[K, V]  # old

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)


def diff(old: Mapping[K, V], new: Mapping[K, V]) -> Delta[K, V]:
    """Return the delta that turns ``old`` into ``new``.

    Values are compared by identity first: one that was carried over from an earlier plan costs
    one pointer comparison.
    """
    added: dict[K, V] = {}
    changed: dict[K, tuple[V, V]] = {}
    for key, after in new.items():
        if key not in old:
            added[key] = after
            continue
        before = old[key]
        if before is not after and before != after:
            changed[key] = (before, after)
    if len(new) - len(added) == len(old):  # nothing of the old is missing
        return Delta(added, changed, {})
    return Delta(added, changed, {key: value for key, value in old.items() if key not in new})


def patch(old: Mapping[K, V], delta: Delta[K, V]) -> dict[K, V]:
    """Return ``old`` with ``delta`` carried out: ``patch(a, diff(a, b)) == b``."""
    new = {key: value for key, value in old.items() if key not in delta.removed}
    new.update({key: after for key, (_before, after) in delta.changed.items()})
    new.update(delta.added)
    return new


def merge(deltas: Iterable[Delta[K, V]]) -> Delta[K, V]:
    """Unite deltas of different owners into one.

    A key that one owner gives up and another takes over becomes a change, whichever of the two
    comes first.
    """
    added: dict[K, V] = {}
    changed: dict[K, tuple[V, V]] = {}
    removed: dict[K, V] = {}
    for delta in deltas:
        added.update(delta.added)
        changed.update(delta.changed)
        removed.update(delta.removed)
    for key in added.keys() & removed.keys():
        before, after = removed.pop(key), added.pop(key)
        if before != after:
            changed[key] = (before, after)
    return Delta(added, changed, removed)
