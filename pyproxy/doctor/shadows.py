"""Which rules of others get hold of connections to Services before ours. No I/O."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from ipaddress import ip_address
from itertools import chain
from typing import Final

from pyproxy.doctor.facts import Barrier, Facts, Finding, Limits, Served

SHOWN: Final = 3
FEW: Final = 100  # ports of a rule
LOWEST, NOWHERE = 1 << 31, -(1 << 31)
# Up to which priority a rule sees packets that still have a frontend's address.
BEFORE_NAT: Final = {
    ("nat", "prerouting"): -100, ("nat", "output"): -100,
    ("drop", "prerouting"): -101, ("drop", "output"): -101,
}  # fmt: skip
REACH: Final[Mapping[str, Mapping[tuple[str, str], int]]] = {
    "nftables": BEFORE_NAT,
    "iptables": BEFORE_NAT,
    "ipvs": {
        ("nat", "prerouting"): LOWEST, ("nat", "output"): -100,
        ("drop", "prerouting"): LOWEST, ("drop", "output"): -99, ("drop", "input"): 97,
    },
    "userspace": {
        (kind, hook): LOWEST
        for kind in ("nat", "drop") for hook in ("prerouting", "output", "input")
    },
}  # fmt: skip

address = lru_cache(maxsize=1 << 16)(ip_address)  # each is asked about for each rule


def shadows(facts: Facts) -> Iterator[Finding]:
    """Yield the rules that keep connections to frontends from us."""
    reach = REACH.get(facts.mode, {})
    by_port: dict[int, list[Served]] = {}
    for served in facts.served:
        by_port.setdefault(served.frontend.port, []).append(served)
    for barrier in facts.barriers:
        if barrier.priority > reach.get((barrier.kind, barrier.hook), NOWHERE):
            continue
        hit = [
            served
            for served in concerned(barrier.limits, by_port, facts.served)
            if covers(barrier, served)
        ]
        if hit:
            names = ", ".join(f"{s.frontend} ({s.service})" for s in hit[:SHOWN])
            more = f" and {len(hit) - SHOWN} more" if len(hit) > SHOWN else ""
            some = "some " if barrier.limits.is_partial else ""
            does = "leads away" if barrier.kind == "nat" else "drops"
            yield Finding(
                "warning" if some else "error",
                "foreign rules",
                f"a rule that is not ours {does} {some}connections to {names}{more}",
                f"{barrier.where}: {barrier.text}",
                "remove the rule, or limit it to what is not a Service's",
            )


def concerned(
    limits: Limits, by_port: Mapping[int, Sequence[Served]], served: Sequence[Served]
) -> Iterable[Served]:
    """Return the frontends that a rule may be about: with thousands of each, not all pairs."""
    spans = limits.ports
    if spans is None or sum(last - first for first, last in spans) > FEW:
        return served
    ports = {port for first, last in spans for port in range(first, last + 1)}
    return chain.from_iterable(by_port.get(port, ()) for port in sorted(ports))


def covers(barrier: Barrier, served: Served) -> bool:
    """Say whether a rule gets hold of connections to a frontend."""
    frontend, limits = served.frontend, barrier.limits
    if limits.destinations is None and limits.ports is None:
        return False  # it is about everything: a policy, which says nothing of Services
    if limits.protocols is not None and frontend.proto not in limits.protocols:
        return False
    if limits.ports is not None and not any(a <= frontend.port <= b for a, b in limits.ports):
        return False
    if not frontend.ip:
        return limits.destinations is None
    ip = address(frontend.ip)
    if ip.version != barrier.family or limits.is_local:
        return False
    return limits.destinations is None or any(ip in network for network in limits.destinations)
