"""The ways in which packets for frontends come to sockets of this process.

``sk_lookup``: a program gives them all to one socket for each protocol, and knows whom to refuse
or to leave without an answer. ``tproxy``: rules do, where everybody is served. ``listeners``: each
frontend has sockets of its own, and filters on them keep silent.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from pyproxy.config import CAPTURES
from pyproxy.counters import NOTHING, Counts
from pyproxy.model import Family, Frontend, Route
from pyproxy.proxier._lookup import Lookup, Unsupported
from pyproxy.proxier._sockets import Shared, doors
from pyproxy.proxier._tproxy import TRIAL, ByRules
from pyproxy.proxier._way import Capture
from pyproxy.rules.capture import PASS, audible, entry
from pyproxy.rules.listeners import Surroundings

log = logging.getLogger(__name__)


class ByLookup:
    """A program at the kernel's socket lookup decides for each frontend and origin."""

    def __init__(self, family: Family, inherited: Sequence[Shared] = (), workers: int = 1) -> None:
        """Raises ``Unsupported``."""
        self._family = family
        try:
            self.doors: Sequence[Shared] = doors(family, workers, inherited)
        except OSError as error:
            raise Unsupported(error.strerror) from error
        try:
            self._lookup = Lookup(family, self.doors[:workers])
        except Unsupported:
            close_all(self.doors)
            raise

    @property
    def kept(self) -> list[int]:
        return self._lookup.kept

    def takes(self, route: Route) -> bool:
        return True

    def put(self, frontend: Frontend, route: Route, *, foreign: bool) -> None:
        made = entry(route)
        if foreign and self._family == 4 and frontend.proto == "TCP":
            made = audible(made)
        self._lookup.put(frontend, made)

    def drop(self, frontend: Frontend) -> None:
        self._lookup.drop(frontend)

    def refused(self, frontend: Frontend) -> Counts:
        return self._lookup.counts(frontend)

    def commit(self) -> None:
        self._lookup.commit()

    def silence(self, ip: str) -> None:
        self._lookup.stand(ip, "silent")

    def unsilence(self, ip: str) -> None:
        self._lookup.fall(ip)

    def surround(self, around: Surroundings, node_port_ips: Sequence[str] | None) -> None:
        self._lookup.surround(around, node_port_ips)

    def close(self) -> None:
        self._lookup.close()
        close_all(self.doors)

    leave = close


class ByListeners:
    """Each frontend has its own sockets; the program, where it may be, silences other ports."""

    doors: Sequence[Shared] = ()
    kept: list[int] = []  # noqa: RUF012 - nobody else serves

    def __init__(self, family: Family, inherited: Sequence[Shared] = (), _workers: int = 1) -> None:
        close_all(inherited)  # a predecessor had another way
        self._lookup: Lookup | None = None
        try:
            self._lookup = Lookup(family)
        except Unsupported as why:
            log.info(
                "undefined ports of Service addresses will refuse instead of staying silent",
                extra={"family": family, "reason": str(why)},
            )

    def takes(self, route: Route) -> bool:
        return False

    def put(self, frontend: Frontend, route: Route, *, foreign: bool) -> None:
        if self._lookup is not None and frontend.ip:
            self._lookup.put(frontend, PASS)

    def drop(self, frontend: Frontend) -> None:
        if self._lookup is not None and frontend.ip:
            self._lookup.drop(frontend)

    def refused(self, frontend: Frontend) -> Counts:
        return NOTHING

    def commit(self) -> None:
        if self._lookup is not None:
            self._lookup.commit()

    def silence(self, ip: str) -> None:
        if self._lookup is not None:
            self._lookup.stand(ip, "silent")

    def unsilence(self, ip: str) -> None:
        if self._lookup is not None:
            self._lookup.fall(ip)

    def surround(self, around: Surroundings, node_port_ips: Sequence[str] | None) -> None:
        pass

    def close(self) -> None:
        if self._lookup is not None:
            self._lookup.close()

    leave = close


BRIDGED = [
    Path("/proc/sys/net/bridge", f"bridge-nf-call-{tables}") for tables in ("iptables", "ip6tables")
]
WAYS: dict[str, Callable[[Family, Sequence[Shared], int], Capture]] = {
    "sk_lookup": ByLookup,
    "tproxy": ByRules,
    "listeners": ByListeners,
}


def why_not(name: str) -> str | None:
    """Say why this node cannot capture so, by a trial that stays for a moment; None if it can."""
    try:
        trial = ByRules(4, table=TRIAL) if name == "tproxy" else WAYS[name](4, (), 1)
    except Unsupported as why:
        return str(why)
    try:
        trial.commit()
    except OSError as error:
        return str(error.strerror)
    finally:
        trial.close()
    return None


def risk(name: str) -> str | None:
    """Say why some packets may not be captured so; None if all will be."""
    if name != "tproxy":
        return None
    on = [path for path in BRIDGED if path.exists() and path.read_text().strip() != "0"]
    # A bridged packet meets the rules inside the bridge, and loses its socket on leaving it.
    return f"rules see packets inside of bridges: {on[0].name} is 1" if on else None


def close_all(pairs: Sequence[Shared]) -> None:
    for pair in pairs:
        pair.close()


def best() -> str:
    """Return the first way that works on this node, and log why the ones before do not."""
    for name in CAPTURES[1:-1]:
        reason = why_not(name) or risk(name)
        if reason is None:
            return name
        log.info("another way to capture is needed", extra={"not": name, "reason": reason})
    return CAPTURES[-1]
