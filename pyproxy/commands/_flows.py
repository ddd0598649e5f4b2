"""How many tracked connections the frontends of a difference have now, as far as we may look."""

from collections import Counter
from collections.abc import Iterable

from msgspec.structs import replace

from pyproxy.comparison import RouteChange, RouteChanges
from pyproxy.model import FAMILIES, PROTOS, Family, Frontend, family_of
from pyproxy.proxier._conntrack import Conntrack


def with_flows(found: RouteChanges) -> RouteChanges:
    """Return the difference with the flows that are counted in this network namespace."""
    items = list(found.items)
    for family in FAMILIES:
        frontends = {at: f for at, item in enumerate(items) if (f := frontend_of(item, family))}
        if not frontends:
            continue
        try:
            counts = counted(Conntrack(family), frontends.values())
        except OSError:  # it takes root, and connection tracking
            continue
        for at, frontend in frontends.items():
            items[at] = replace(items[at], flows=counts[frontend])
    return replace(found, items=tuple(items))


def counted(conntrack: Conntrack, frontends: Iterable[Frontend]) -> Counter[Frontend]:
    wanted = set(frontends)
    counts: Counter[Frontend] = Counter()
    for flow in conntrack.flows(wanted):
        ip, port = flow.destination
        own = Frontend(ip, port, flow.proto)
        counts[own if own in wanted else Frontend("", port, flow.proto)] += 1
    return counts


def frontend_of(item: RouteChange, family: Family) -> Frontend | None:
    """Read a frontend back from its text; None if it is of the other family."""
    where, _, proto = item.frontend.rpartition("/")
    address, _, port = where.rpartition(":")
    ip = "" if address == "node" else address.strip("[]")
    if item.family != family or (ip and family_of(ip) != family):
        return None
    return next((Frontend(ip, int(port), name) for name in PROTOS if name == proto), None)
