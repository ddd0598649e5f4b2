"""Reads what the elements of a table have counted: new connections, and packets of refused ones."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from ipaddress import ip_address

from pyproxy.counters import Counts, Entry
from pyproxy.model import Address
from pyproxy.proxier._nfnetlink import CountedElement, NfError, NfTables
from pyproxy.rules.nft import Element, Table, Verdict
from pyproxy.rules.nftables import NODE_PORT, SERVICE, Item

DENIED = "denied"
FRONTENDS = frozenset({SERVICE.frontends, NODE_PORT.frontends})
STRANGERS = frozenset({SERVICE.silent, NODE_PORT.silent, DENIED})
REFUSALS = STRANGERS | {SERVICE.refusals, NODE_PORT.refusals}
ENDPOINTS = frozenset({
    SERVICE.endpoints, SERVICE.local_endpoints, NODE_PORT.endpoints, NODE_PORT.local_endpoints,
})  # fmt: skip
# All elements of these count, if any do. Of others each says so by itself.
WHOLLY = STRANGERS | ENDPOINTS
# By the setting: where elements count. Each time costs memory, and a few nanoseconds of a packet,
# so that what goes to endpoints is not counted at its frontend again.
COUNTED: Mapping[str, frozenset[str]] = {
    "off": frozenset(),
    "service": FRONTENDS | REFUSALS,
    "endpoint": FRONTENDS | REFUSALS | ENDPOINTS,
}
# Of mode ipvs: what is forwarded is counted by virtual servers.
COUNTED_BESIDE = REFUSALS


def read(table: Table, names: Iterable[str]) -> list[Entry[Item]]:
    """Return what all elements of these sets have counted. Raises ``NfError`` and ``OSError``."""
    with closing(NfTables()) as nf:
        return [
            entry for name in names for each in nf.counters(table, name) for entry in of(name, each)
        ]


def last(nf: NfTables, table: Table, doomed: Mapping[str, Iterable[Element]]) -> list[Entry[Item]]:
    """Return what elements have counted that a transaction is about to remove.

    None of a set where somebody else has removed one.
    """
    found: list[Entry[Item]] = []
    for name, elements in doomed.items():
        try:
            counted = nf.counters(table, name, [element.key for element in elements])
        except NfError:
            continue
        found += [entry._replace(ended=True) for each in counted for entry in of(name, each)]
    return found


def of(name: str, element: CountedElement) -> Iterator[Entry[Item]]:
    """Yield what an element tells of its Service, and of its endpoint if it is one's."""
    item = Item(name, element.key)
    if name in REFUSALS:
        yield Entry(item, None, refused(name, element))
        return
    counts = Counts(connections=element.packets)
    yield Entry(item, None, counts)
    if name in ENDPOINTS:
        assert isinstance(element.data, bytes), "an endpoint is an address and a port"
        yield Entry(item, address_in(element.data), counts)


def refused(name: str, element: CountedElement) -> Counts:
    if name == DENIED:
        return Counts(denied=element.packets)
    drops = element.data in DROPS
    return Counts(dropped=element.packets) if drops else Counts(rejected=element.packets)


# Elements of sets have no data: whom these find is dropped.
DROPS = (Verdict("drop"), Verdict("goto", "drop-strangers"), None)


def address_in(data: bytes) -> Address:
    """Return the address that ``endpoint_data`` has packed."""
    ip, port = data[:-4], data[-4:-2]
    return Address(str(ip_address(ip)), int.from_bytes(port, "big"))
