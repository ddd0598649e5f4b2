"""What part of new connections each backend of a pool is given, in each mode. No I/O."""

from collections.abc import Sequence

from pyproxy.balancer import BY_CLIENT, BY_CONNECTIONS, proportions, slot_counts
from pyproxy.model import Pool, Route
from pyproxy.rules.ipvs import BRIEF_SECONDS, FALLBACK, carried_pool, kernel_scheduler
from pyproxy.rules.nft_affinity import LONGEST_TURN as SLOTS


def shares(mode: str, route: Route, pool: Pool, ipvs_scheduler: str = "") -> list[float] | None:
    """Return the chance of each backend, 0 to 1, to be given a new client.

    None: it depends on the client's address, or on who else is connected. ``ipvs_scheduler`` is
    the node's own, of mode ipvs; empty where it has none.
    """
    if len(pool.backends) == 1:
        return [1.0]
    counts = parts(mode, route, pool, ipvs_scheduler)
    return [count / sum(counts) for count in counts] if counts is not None else None


def parts(mode: str, route: Route, pool: Pool, ipvs_scheduler: str) -> Sequence[int] | None:
    if mode == "ipvs" and is_carried(route, pool):
        weighted = any(backend.weight != 1 for backend in pool.backends)
        name = kernel_scheduler(pool.scheduler, ipvs_scheduler or FALLBACK, weighted=weighted)
        return proportions(pool) if name in ("rr", "wrr") else None
    if pool.scheduler in BY_CLIENT:
        return None
    match mode:
        case "iptables":
            return proportions(pool)
        case "userspace":
            return slot_counts(pool) if pool.scheduler not in BY_CONNECTIONS else None
        case _:
            return slot_counts(pool, longest=SLOTS)


def is_carried(route: Route, pool: Pool) -> bool:
    """Say whether a virtual server picks, and not the table beside it."""
    seconds = pool.affinity_seconds
    return (seconds is None or seconds >= BRIEF_SECONDS) and carried_pool(route) == pool
