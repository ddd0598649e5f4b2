"""What a frontend of the userspace mode has carried, by endpoint."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from msgspec import Struct

from pyproxy.counters import NOTHING, Counts, Entry, total
from pyproxy.model import Address, Frontend


class Carried(Struct):
    """Sums of one endpoint, or of one connection. In: towards the endpoint."""

    connections: int = 0
    packets_in: int = 0  # of UDP only: the kernel does not tell how a stream is cut
    packets_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    def add(self, other: "Carried") -> None:
        self.connections += other.connections
        self.packets_in += other.packets_in
        self.packets_out += other.packets_out
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out


class Meter:
    """Connections of one frontend that began, and what those carried that are over."""

    __slots__ = ("_sums", "rejected")

    def __init__(self) -> None:
        self.rejected = 0  # clients that were accepted, to be reset at once
        self._sums: defaultdict[Address, Carried] = defaultdict(Carried)

    def opened(self, address: Address) -> Carried:
        """Count a connection; return the sums of its endpoint."""
        sums = self._sums[address]
        sums.connections += 1
        return sums

    def closed(self, address: Address, carried: Carried) -> None:
        self._sums[address].add(carried)

    def entries(
        self,
        frontend: Frontend,
        living: Iterable[tuple[Address, Carried]],
        refused: Counts = NOTHING,
    ) -> Iterator[Entry[Frontend]]:
        """Yield what went to each endpoint and to all of them; ``living`` is not over yet.

        ``refused`` is what did not come so far.
        """
        sums: defaultdict[Address, Carried] = defaultdict(Carried)
        for address, carried in (*self._sums.items(), *living):
            sums[address].add(carried)
        has_packets = frontend.proto == "UDP"
        found = {
            address: counts_of(each, has_packets=has_packets) for address, each in sums.items()
        }
        for address, counts in found.items():
            yield Entry(frontend, address, counts)
        nothing = counts_of(Carried(), has_packets=has_packets)
        here = Counts(rejected=self.rejected or None)
        yield Entry(frontend, None, total((nothing, *found.values(), here, refused)))


def counts_of(carried: Carried, *, has_packets: bool) -> Counts:
    return Counts(
        connections=carried.connections,
        packets_in=carried.packets_in if has_packets else None,
        packets_out=carried.packets_out if has_packets else None,
        bytes_in=carried.bytes_in,
        bytes_out=carried.bytes_out,
    )
