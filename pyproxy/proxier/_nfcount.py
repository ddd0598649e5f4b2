"""Reads what the elements of a table have counted: new connections, and packets of refused ones."""

from collections.abc import Iterable, Mapping
from contextlib import closing
from ipaddress import ip_address

from pyproxy.counters import Counts, Entry
from pyproxy.model import Address
from pyproxy.proxier._nfnetlink import CountedElement, NfError, NfTables
from pyproxy.rules.nft import Element, Table, Verdict
from pyproxy.rules.nftables import NODE_PORT, SERVICE, Item

DENIED = "denied"
FRONTENDS = frozenset({SERVICE.frontends, NODE_PORT.frontends})
REFUSALS = frozenset({
    SERVICE.refusals, NODE_PORT.refusals, SERVICE.silent, NODE_PORT.silent, DENIED,
})  # fmt: skip
ENDPOINTS = frozenset({
    SERVICE.endpoints, SERVICE.local_endpoints, NODE_PORT.endpoints, NODE_PORT.local_endpoints,
})  # fmt: skip
# By the setting: a counter costs memory and a few nanoseconds of each lookup.
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
        return [entry(name, each) for name in names for each in nf.counters(table, name)]


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
        found += [entry(name, each)._replace(ended=True) for each in counted]
    return found


def entry(name: str, element: CountedElement) -> Entry[Item]:
    item = Item(name, element.key)
    if name in ENDPOINTS:
        assert isinstance(element.data, bytes), "an endpoint is an address and a port"
        return Entry(item, address_in(element.data), Counts(connections=element.packets))
    if name in FRONTENDS:
        return Entry(item, None, Counts(connections=element.packets))
    return Entry(item, None, refused(name, element))


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
