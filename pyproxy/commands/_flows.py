"""How many tracked connections a difference touches now, and which of them would not go on."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from pyproxy.comparison import RouteChanges
from pyproxy.model import FAMILIES, Family, Frontend, PortPlan, ServicePortName
from pyproxy.planned import PlanRow, port_plan
from pyproxy.proxier._conntrack import Conntrack
from pyproxy.rules.flows import Flow, Pending, Review, condemned
from pyproxy.rules.listeners import Surroundings

Ports = Mapping[ServicePortName, PortPlan]


def with_flows(
    found: RouteChanges,
    before: Sequence[PlanRow],
    after: Sequence[PlanRow],
    around: Mapping[Family, Surroundings],
    *,
    ends_forbidden: bool,
) -> RouteChanges:
    """Return the difference with the flows that are counted in this network namespace.

    Those end that the proxy itself would end, as ``rules.flows`` has it. A proxy of another mode
    is another process, which does not know the old rules. What mode userspace relays ends with it.
    """
    moves = found.mode_before != found.mode_after
    items, flows, ending = list(found.items), 0, 0
    for family in FAMILIES:
        old, new = ports_of(before, family), ports_of(after, family)
        touched = {
            at: Frontend.parse(item.frontend)
            for at, item in enumerate(items)
            if item.family == family
        }
        wanted = set(touched.values())
        wanted |= frontends_of(
            plan for plan in old.values() if moves or plan != new.get(plan.owner)
        )
        if not wanted:
            continue
        try:
            there = list(Conntrack(family).flows(wanted))
        except OSError:  # it takes root, and connection tracking
            return found
        lost = there
        if not (moves and found.mode_before == "userspace"):
            pending = Pending(ends_forbidden=ends_forbidden)
            lost = list(condemned(there, review_of(pending, old, new, moves), around[family]))
        flows, ending = flows + len(there), ending + len(lost)
        all_counts, lost_counts = counted(there, wanted), counted(lost, wanted)
        for at, front in touched.items():
            items[at] = replace(items[at], flows=all_counts[front], ending=lost_counts[front])
    return replace(found, items=tuple(items), flows=flows, ending=ending)


def review_of(pending: Pending, old: Ports, new: Ports, moves: bool) -> Review:
    if not moves:
        pending.take(old)
        pending.note(old.keys() | new.keys())
    return pending.take(new)


def ports_of(rows: Iterable[PlanRow], family: Family) -> dict[ServicePortName, PortPlan]:
    plans = (port_plan(row) for row in rows if row.family == family)
    return {plan.owner: plan for plan in plans}


def frontends_of(plans: Iterable[PortPlan]) -> set[Frontend]:
    return {route.frontend for plan in plans for route in plan.routes}


def counted(flows: Iterable[Flow], wanted: set[Frontend]) -> Counter[Frontend]:
    counts: Counter[Frontend] = Counter()
    for flow in flows:
        ip, port = flow.destination
        own = Frontend(ip, port, flow.proto)
        counts[own if own in wanted else Frontend("", port, flow.proto)] += 1
    return counts
