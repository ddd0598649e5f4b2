"""Numbered places for what a pool consists of: dense, and each keeps its own while it can."""

from collections import Counter as Multiset
from collections.abc import Sequence


def settled(wanted: Sequence[bytes], old: Sequence[bytes | None]) -> Sequence[bytes]:
    """Return ``wanted`` by slot: each stays where it was if its slot still exists.

    ``old`` has what was in each of these slots; one that comes or goes moves at most one other.
    """
    if old == wanted or not any(old):
        return wanted
    left = Multiset(wanted)
    kept = [data if data is not None and take(left, data) else None for data in old]
    others = iter([data for data in wanted if take(left, data)])
    return [data if data is not None else next(others) for data in kept]


def take(left: Multiset[bytes], data: bytes) -> bool:
    if left[data] <= 0:
        return False
    left[data] -= 1
    return True
