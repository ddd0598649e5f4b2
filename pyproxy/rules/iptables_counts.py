"""What the rules of mode iptables have counted, by the items that they are of. No I/O."""

from collections.abc import Iterable, Iterator

from pyproxy.counters import Counts, Entry
from pyproxy.model import Address
from pyproxy.rules.iptables import EXTERNAL, FIREWALL, NODE_PORTS, SERVICES, Item
from pyproxy.rules.iptables_base import Place
from pyproxy.rules.iptables_layout import split
from pyproxy.rules.iptables_text import is_of_owner

DNAT = " -j DNAT --to-destination "
REFUSING = frozenset({SERVICES, EXTERNAL, FIREWALL, NODE_PORTS})


def entries(rules: Iterable[tuple[Place, str, int]]) -> Iterator[Entry[Item]]:
    """Yield what was counted: connections by the rules that choose an endpoint, and refusals."""
    connections: dict[Item, dict[Address, int]] = {}
    for (table, chain), rule, packets in rules:
        if table == "nat" and is_of_owner(chain):
            _match, dnat, to = f" {rule}".partition(DNAT)
            if dnat:
                of_chain = connections.setdefault(Item(table, chain), {})
                address = address_of(to)
                of_chain[address] = of_chain.get(address, 0) + packets
        elif table == "filter" and chain in REFUSING:
            match, to = split(rule)
            counts = refused(chain, to, packets)
            if counts is not None:
                yield Entry(Item(table, chain, match), None, counts)
    for item, of_chain in connections.items():
        yield Entry(item, None, Counts(connections=sum(of_chain.values())))
        for address, count in of_chain.items():
            yield Entry(item, address, Counts(connections=count))


def refused(chain: str, target: str, packets: int) -> Counts | None:
    if target == "DROP":
        return Counts(denied=packets) if chain == FIREWALL else Counts(dropped=packets)
    return Counts(rejected=packets) if target.startswith("REJECT") else None


def address_of(text: str) -> Address:
    ip, _, port = text.rpartition(":")
    return Address(ip.strip("[]"), int(port))
