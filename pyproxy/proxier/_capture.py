"""The ways in which packets for frontends come to sockets of this process.

``sk_lookup``: a program gives them all to one socket for each protocol, and knows whom to refuse
or to leave without an answer. ``tproxy``: rules do, where everybody is served. ``listeners``: each
frontend has sockets of its own, and filters on them keep silent.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from pyproxy.config import CAPTURES
from pyproxy.counters import NOTHING, Counts
from pyproxy.model import Family, Frontend, Route
from pyproxy.proxier._lookup import Lookup, Unsupported
from pyproxy.proxier._sockets import Shared, shared_by_all
from pyproxy.proxier._tproxy import ByRules, why_no_rules
from pyproxy.rules.capture import PASS, audible, entry
from pyproxy.rules.listeners import Surroundings

log = logging.getLogger(__name__)


class Capture(Protocol):
    """One way, for one family."""

    sockets: Shared | None  # where it brings packets to

    def takes(self, route: Route) -> bool:
        """Say whether packets for such a frontend come to the shared sockets."""
        ...

    def put(self, frontend: Frontend, route: Route, *, foreign: bool) -> None:
        """Take in a frontend that is ready to be served. Raises ``OSError``.

        Of a foreign one nothing but the port is this node's.
        """
        ...

    def drop(self, frontend: Frontend) -> None: ...

    def refused(self, frontend: Frontend) -> Counts:
        """Return what it has kept from a frontend, as far as it counts. Raises ``OSError``."""
        ...

    def commit(self) -> None:
        """Have all that was said before in effect. Raises ``OSError``; then none of it is."""
        ...

    def silence(self, ip: str) -> None:
        """Keep silent at the ports of this address that are no frontend's. Raises ``OSError``."""
        ...

    def unsilence(self, ip: str) -> None: ...

    def surround(self, around: Surroundings, node_port_ips: Sequence[str] | None) -> None:
        """Take in where connections come from, and where node ports are served; None: all."""
        ...

    def close(self) -> None: ...

    def leave(self) -> None:
        """Let go of everything, for a successor has the same."""
        ...


class ByLookup:
    """A program at the kernel's socket lookup decides for each frontend and origin."""

    def __init__(self, family: Family, sockets: Shared | None = None) -> None:
        """Raises ``Unsupported``."""
        self._family = family
        try:
            self.sockets: Shared | None = sockets or shared_by_all(family)
        except OSError as error:
            raise Unsupported(error.strerror) from error
        try:
            self._lookup = Lookup(family, self.sockets)
        except Unsupported:
            self.sockets.close()
            raise

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
        if self.sockets is not None:
            self.sockets.close()

    leave = close


class ByListeners:
    """Each frontend has its own sockets; the program, where it may be, silences other ports."""

    sockets: Shared | None = None

    def __init__(self, family: Family, sockets: Shared | None = None) -> None:
        if sockets is not None:
            sockets.close()  # a predecessor had another way
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
WAYS: dict[str, Callable[[Family, Shared | None], Capture]] = {
    "sk_lookup": ByLookup,
    "tproxy": ByRules,
    "listeners": ByListeners,
}


def why_not(name: str) -> str | None:
    """Say why this node cannot capture so; None if it can."""
    if name == "tproxy":
        return why_no_rules()
    try:
        WAYS[name](4, None).close()
    except Unsupported as why:
        return str(why)
    return None


def risk(name: str) -> str | None:
    """Say why some packets may not be captured so; None if all will be."""
    if name != "tproxy":
        return None
    on = [path for path in BRIDGED if path.exists() and path.read_text().strip() != "0"]
    # A bridged packet meets the rules inside the bridge, and loses its socket on leaving it.
    return f"rules see packets inside of bridges: {on[0].name} is 1" if on else None


def best() -> str:
    """Return the first way that works on this node, and log why the ones before do not."""
    for name in CAPTURES[1:-1]:
        reason = why_not(name) or risk(name)
        if reason is None:
            return name
        log.info("another way to capture is needed", extra={"not": name, "reason": reason})
    return CAPTURES[-1]
