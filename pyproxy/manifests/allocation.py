"""Cluster IPs and node ports for the Services whose manifests leave them open.

A slot is filled from the hash of its owner's name, so that a restart, another node or another order
of files arrive at the same numbers without any memory of them. Where two slots meet, the later name
takes the next free number; what is once held stays held.
"""

from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from itertools import chain
from typing import Final, Literal, NamedTuple

from pyproxy.model import Network, ObjectName, Proto

NumberSpace = Literal["IPv4", "IPv6"] | Proto

HEALTH_CHECK: Final = 0  # the port of the slot of a Service's health check node port
CLUSTER_IP: Final = -1  # the port of the slot of a cluster IP


class Slot(NamedTuple):
    """What one number is held for: a cluster IP of a family, or the node port of a port."""

    service: ObjectName
    port: int
    space: NumberSpace


class Band(NamedTuple):
    """The numbers to give out; those below ``dynamic`` only when all others are in use.

    The lower part is for numbers that people choose, as in the API server: 10.96.0.10, 30080.
    """

    start: int
    dynamic: int
    end: int

    def candidates(self, seed: str) -> Iterator[int]:
        """Iterate over all numbers, each once, from where the seed's hash falls."""
        digest = int.from_bytes(blake2b(seed.encode(), digest_size=16).digest())
        first = self.dynamic + digest % max(self.end - self.dynamic, 1)
        return chain(
            range(first, self.end), range(self.dynamic, first), range(self.start, self.dynamic)
        )


# The size of the lower part: a 32nd of the range, from 16 to 128.
NODE_PORTS: Final = Band(30000, 30086, 32768)


def addresses(network: Network) -> Band:
    """Return the addresses of a service range; its first and last are nobody's."""
    start, end = int(network[0]) + 1, int(network[-1])
    size = network.num_addresses
    # As in the API server: a 16th of the range is for people, from 16 to 256 addresses.
    lower = min(max(16, size // 16), 256) if size > 16 else 1
    return Band(start, start - 1 + lower, end)


class Refusal(NamedTuple):
    """Why a slot stays empty: another has the number, or (None) all numbers are in use."""

    holder: Slot | None


class Allocation(NamedTuple):
    granted: Mapping[Slot, int]
    refused: Mapping[Slot, Refusal]


def allocate(
    wanted: Mapping[Slot, int | None],
    held: Mapping[Slot, int],
    bands: Mapping[NumberSpace, Band],
) -> Allocation:
    """Fill the slots: with the number that each wants, or with any (None).

    ``held`` is what an earlier round granted. A slot that still wants that number keeps it, even
    against one that now asks for it by name: an address with connections does not move.
    """
    table = _Table()
    slots = sorted(wanted)
    kept = [s for s in slots if s in held and _still_fits(wanted[s], held[s], bands.get(s.space))]
    for slot in kept:
        table.claim(slot, held[slot])
    rest = [slot for slot in slots if slot not in table.granted]
    for slot in rest:
        number = wanted[slot]
        if number is not None:
            table.claim(slot, number)
    for slot in rest:
        if wanted[slot] is None:
            table.fill(slot, bands.get(slot.space))
    return Allocation(table.granted, table.refused)


class _Table:
    """Who has which number."""

    def __init__(self) -> None:
        self.granted: dict[Slot, int] = {}
        self.refused: dict[Slot, Refusal] = {}
        self._holders: dict[tuple[NumberSpace, int], Slot] = {}

    def claim(self, slot: Slot, number: int) -> None:
        holder = self._holders.setdefault((slot.space, number), slot)
        if holder is slot:
            self.granted[slot] = number
        else:
            self.refused[slot] = Refusal(holder)

    def fill(self, slot: Slot, band: Band | None) -> None:
        for number in band.candidates(_seed(slot)) if band is not None else ():
            if self._is_free(slot, number):
                return self.claim(slot, number)
        self.refused[slot] = Refusal(None)
        return None

    def _is_free(self, slot: Slot, number: int) -> bool:
        """Say whether the slot may take the number; Services do not share a node port's number."""
        if (slot.space, number) in self._holders:
            return False
        holders = (self._holders.get((space, number)) for space in _siblings(slot.space))
        return all(holder is None or holder.service == slot.service for holder in holders)


def _still_fits(wanted: int | None, held: int, band: Band | None) -> bool:
    if wanted is not None:
        return wanted == held
    return band is not None and band.start <= held < band.end


def _siblings(space: NumberSpace) -> Iterable[NumberSpace]:
    return () if space in ("IPv4", "IPv6") else ("TCP", "UDP", "SCTP")


def _seed(slot: Slot) -> str:
    # Without the protocol: port 53 of TCP and of UDP get the same node port, as everybody expects.
    return str(slot.service) if slot.port == CLUSTER_IP else f"{slot.service}/{slot.port}"
