"""Frontends as a tree of chains by their address, so that a packet meets few rules of many.

Sixteen rules in a row are as fast as any branch. Where there are more, a chain branches by the
first four bits in which the addresses differ: ``-d PREFIX -g KUBE-T-PREFIX``.
"""

from collections.abc import Sequence
from functools import lru_cache
from ipaddress import ip_address
from typing import NamedTuple

from pyproxy.model import family_of
from pyproxy.rules.iptables import hashed

LEAVES = 16  # rules that a chain may have before it branches
CHAIN = "KUBE-T-"
LONGEST_NAME = 28  # of a chain: XT_EXTENSION_MAXNAMELEN less the zero


class Leaf(NamedTuple):
    """A rule, by the address that it matches, as hexadecimal digits."""

    digits: str
    line: str


@lru_cache(maxsize=1 << 16)
def digits_of(ip: str) -> str:
    if family_of(ip) == 4:  # canonical: a third of the time of parsing it
        return bytes(map(int, ip.split("."))).hex()
    return ip_address(ip).packed.hex()


def tree(leaves: Sequence[Leaf]) -> dict[str, tuple[str, ...]]:
    """Return the chains; the root has an empty name. ``leaves`` are in order of their digits."""
    chains: dict[str, tuple[str, ...]] = {}
    grow(leaves, "", chains)
    return chains


def grow(leaves: Sequence[Leaf], chain: str, chains: dict[str, tuple[str, ...]]) -> None:
    """Add a chain of these leaves, and those below it.

    What the root jumps to comes back to it; further down nothing needs to.
    """
    shared = shared_digits(leaves[0].digits, leaves[-1].digits) if leaves else 0
    if len(leaves) <= LEAVES or shared == len(leaves[0].digits):
        chains[chain] = tuple(leaf.line for leaf in leaves)
        return
    rules = []
    start = 0
    while start < len(leaves):
        prefix = leaves[start].digits[: shared + 1]
        end = start + 1
        while end < len(leaves) and leaves[end].digits.startswith(prefix):
            end += 1
        below = name_of(prefix)
        rules.append(
            f"-d {network(prefix, len(leaves[0].digits))} -{'g' if chain else 'j'} {below}"
        )
        grow(leaves[start:end], below, chains)
        start = end
    chains[chain] = tuple(rules)


def shared_digits(one: str, other: str) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


@lru_cache(maxsize=4096)
def name_of(prefix: str) -> str:
    name = CHAIN + prefix.upper()
    return name if len(name) <= LONGEST_NAME else CHAIN + hashed(prefix)


@lru_cache(maxsize=4096)
def network(prefix: str, length: int) -> str:
    return f"{ip_address(bytes.fromhex(prefix.ljust(length, '0')))}/{4 * len(prefix)}"
