"""Which socket a packet for a Service finds: the entries of maps, as values and as bytes.

The kernel's socket lookup runs a program that reads them (``capture_code``). A frontend's entry
has a verdict for each origin, so that nobody is accepted first and refused then.
"""

import struct
from collections.abc import Mapping
from ipaddress import ip_network
from typing import Literal, NamedTuple

from msgspec import Struct

from pyproxy.counters import Counts
from pyproxy.model import (
    Action,
    Drop,
    Family,
    Forward,
    Frontend,
    Network,
    Pass,
    Proto,
    Reject,
    Route,
)
from pyproxy.rules.listeners import Origin, Surroundings, has_affinity
from pyproxy.rules.nft import packed_ip

Verdict = Literal["refuse", "serve", "silent", "pass"]
VERDICTS: Mapping[Verdict, int] = {
    "refuse": 0,  # as if there were no socket: a reset, or port unreachable
    "serve": 1,  # to the shared socket
    "silent": 2,  # to a socket that admits nobody
    "pass": 3,  # to whatever socket there is
}
ORIGINS: Mapping[Origin, int] = {"pod": 0, "node": 1, "outside": 2}

Standing = Literal["silent", "node ports"]
STANDINGS: Mapping[Standing, int] = {
    "silent": 1,  # a Service's address: its ports without a frontend answer nobody
    "node ports": 2,  # an address at which node ports are served
}
PROTOCOLS: Mapping[Proto, int] = {"TCP": 6, "UDP": 17}
NUMBER = struct.Struct("=I")
PORT_AND_PROTOCOL = struct.Struct("=II")
ENTRY = struct.Struct("=BBB?I")  # what follows in a value are counts
COUNTS = struct.Struct("=QQQ")
# What the program counts of a frontend: the place of each count in its value.
COUNTED: Mapping[str, int] = {
    name: ENTRY.size + 8 * index for index, name in enumerate(("rejected", "dropped", "denied"))
}
NO_SOURCES = 0  # the number of the list in an entry that admits all sources


class Entry(Struct, frozen=True):
    """What becomes of packets for a frontend. Sources that are not allowed meet silence."""

    pod: Verdict
    node: Verdict
    outside: Verdict
    sources: tuple[Network, ...] | None = None  # None: all are allowed
    by_client: bool = False  # all of a client go to one worker, whichever port they come from


PASS = Entry("pass", "pass", "pass")


def entry(route: Route) -> Entry:
    """Return the entry that does what the route says."""
    return Entry(
        verdict(route.from_pod),
        verdict(route.from_node),
        verdict(route.from_outside),
        route.allowed_sources,
        has_affinity(route),
    )


def audible(entry: Entry) -> Entry:
    """Return the entry for an IPv4 address that is not the node's, but for some ports.

    The kernel sends no refusal from there. Who is to be refused is accepted, and reset at once.
    """
    pod, node, outside = (
        "serve" if v == "refuse" else v for v in (entry.pod, entry.node, entry.outside)
    )
    return Entry(pod, node, outside, entry.sources, entry.by_client)


def verdict(action: Action) -> Verdict:
    match action:
        case Forward():
            return "serve"
        case Reject():
            return "refuse"
        case Pass():  # its packets come by on their way, and rules of nf_tables ask for a socket
            return "pass"
        case Drop():
            return "silent"


def origins(around: Surroundings, family: Family) -> dict[Network, Origin]:
    """Return who is what by source address: the longest prefix counts, others are outside.

    The node comes before its pods, as in ``listeners.origin_of``: a pod range inside a range of
    the node's own is left out.
    """
    own = [ip_network(ip) for ip in around.node_ips] + list(around.loopback)
    pods = [n for n in around.pods if not any(covers(wide, n) for wide in around.loopback)]
    found: dict[Network, Origin] = {n: "pod" for n in pods if n.version == family}
    return found | {n: "node" for n in own if n.version == family}


def covers(wide: Network, network: Network) -> bool:
    same = wide.version == network.version
    return same and network.subnet_of(wide)  # type: ignore[arg-type]  # of the same version


# --- bytes --------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """The sizes of keys, and of the value of an entry, in bytes."""

    entry: int
    value: int
    network: int


def sizes(family: Family) -> Sizes:
    address = 4 if family == 4 else 16
    return Sizes(address + 8, ENTRY.size + COUNTS.size, address + 8)


def frontend_key(frontend: Frontend, family: Family) -> bytes:
    """Return the key of an entry; a node port's has the address that is none."""
    where = PORT_AND_PROTOCOL.pack(frontend.port, PROTOCOLS[frontend.proto])
    return packed_address(frontend.ip, family) + where


def address_key(ip: str, family: Family) -> bytes:
    """Return the key of what an address is: no frontend has port 0."""
    return packed_address(ip, family) + bytes(PORT_AND_PROTOCOL.size)


def packed_address(ip: str, family: Family) -> bytes:
    return packed_ip(ip) if ip else bytes(4 if family == 4 else 16)


def network_key(network: Network, number: int = NO_SOURCES) -> bytes:
    """Return the key of a trie, which begins with the length of the prefix.

    Numbers of lists of sources are a part of the prefix, and 0 is the one of origins. They are in
    the host's byte order: they are only ever compared as a whole.
    """
    prefix = NUMBER.pack(32 + network.prefixlen)
    return prefix + NUMBER.pack(number) + network.network_address.packed


def packed_entry(value: Entry, number: int) -> bytes:
    """Return an entry's bytes; ``number`` is that of its sources, 0 where all are allowed."""
    pod, node, outside = VERDICTS[value.pod], VERDICTS[value.node], VERDICTS[value.outside]
    return ENTRY.pack(pod, node, outside, value.by_client, number) + bytes(COUNTS.size)


def packed_standing(standing: Standing) -> bytes:
    return ENTRY.pack(STANDINGS[standing], 0, 0, False, NO_SOURCES) + bytes(COUNTS.size)


def counts(value: bytes) -> Counts:
    """Return what an entry has counted since it was put there."""
    return Counts(**dict(zip(COUNTED, COUNTS.unpack_from(value, ENTRY.size), strict=True)))
