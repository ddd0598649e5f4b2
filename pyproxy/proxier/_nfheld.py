"""What a table of nf_tables holds, and how much of it is not as it was."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from pyproxy.proxier._nfpack import RuleForm
from pyproxy.rules.nft_affinity import Content

K = TypeVar("K")
V = TypeVar("V")
Forms = tuple[RuleForm, ...]


@dataclass(slots=True)
class Held:
    """What the kernel's table holds."""

    elements: dict[str, dict[bytes, Content]] = field(default_factory=dict)
    chains: dict[str, Forms] = field(default_factory=dict)
    affinity_sets: dict[str, object] = field(default_factory=dict)


def differences(one: Held, other: Held) -> int:
    """Return how many elements, chains and sets are not the same."""
    names = one.elements.keys() | other.elements.keys()
    count = sum(unlike(one.elements.get(n, {}), other.elements.get(n, {})) for n in names)
    count += unlike(one.chains, other.chains)
    return count + unlike(one.affinity_sets, other.affinity_sets)


def unlike(one: Mapping[K, V], other: Mapping[K, V]) -> int:
    if one == other:
        return 0
    return sum(one.get(key) != other.get(key) for key in one.keys() | other.keys())
