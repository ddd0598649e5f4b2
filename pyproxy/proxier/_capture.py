"""The ways in which packets for frontends come to sockets of this process.

``sk_lookup``: a program gives them all to one socket for each protocol, and knows whom to refuse
or to leave without an answer. ``tproxy``: rules do, where everybody is served. ``listeners``: each
frontend has sockets of its own, and filters on them keep silent.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from pyproxy.config import CAPTURES
from pyproxy.model import Family, Frontend, Route
from pyproxy.proxier._lookup import Lookup, Unsupported
from pyproxy.proxier._sockets import shared
from pyproxy.rules.capture import PASS, entry
from pyproxy.rules.listeners import Surroundings

log = logging.getLogger(__name__)


class Capture(Protocol):
    """One way, for one family."""

    sockets: "Shared | None"  # where it brings packets to

    def takes(self, route: Route) -> bool:
        """Say whether packets for such a frontend come to the shared sockets."""
        ...

    def put(self, frontend: Frontend, route: Route) -> None:
        """Take in a frontend that is ready to be served. Raises ``OSError``."""
        ...

    def drop(self, frontend: Frontend) -> None: ...

    def silence(self, ip: str) -> None:
        """Keep silent at the ports of this address that are no frontend's. Raises ``OSError``."""
        ...

    def unsilence(self, ip: str) -> None: ...

    def surround(self, around: Surroundings, node_port_ips: Sequence[str] | None) -> None:
        """Take in where connections come from, and where node ports are served; None: all."""
        ...

    def close(self) -> None: ...


class Shared:
    """The sockets of all frontends: one for connections and one for datagrams."""

    def __init__(self, family: Family) -> None:
        """Raises ``OSError``."""
        self.tcp = shared(family, "TCP")
        try:
            self.udp = shared(family, "UDP")
        except OSError:
            self.tcp.close()
            raise

    def close(self) -> None:
        self.tcp.close()
        self.udp.close()


class ByLookup:
    """A program at the kernel's socket lookup decides for each frontend and origin."""

    def __init__(self, family: Family) -> None:
        """Raises ``Unsupported``."""
        self._lookup = Lookup(family)
        self.sockets: Shared | None = None
        try:
            self.sockets = Shared(family)
            self._lookup.lead_to(0, self.sockets.tcp, self.sockets.udp)
        except OSError as error:
            self.close()
            raise Unsupported(error.strerror) from error

    def takes(self, route: Route) -> bool:
        return True

    def put(self, frontend: Frontend, route: Route) -> None:
        self._lookup.put(frontend, entry(route))

    def drop(self, frontend: Frontend) -> None:
        self._lookup.drop(frontend)

    def silence(self, ip: str) -> None:
        self._lookup.stand(ip, "silent")

    def unsilence(self, ip: str) -> None:
        self._lookup.forget(ip)

    def surround(self, around: Surroundings, node_port_ips: Sequence[str] | None) -> None:
        self._lookup.surround(around, node_port_ips)

    def close(self) -> None:
        self._lookup.close()
        if self.sockets is not None:
            self.sockets.close()


class ByListeners:
    """Each frontend has its own sockets; the program, where it may be, silences other ports."""

    sockets: Shared | None = None

    def __init__(self, family: Family) -> None:
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

    def put(self, frontend: Frontend, route: Route) -> None:
        if self._lookup is not None and frontend.ip:
            self._lookup.put(frontend, PASS)

    def drop(self, frontend: Frontend) -> None:
        if self._lookup is not None and frontend.ip:
            self._lookup.drop(frontend)

    def silence(self, ip: str) -> None:
        if self._lookup is not None:
            self._lookup.stand(ip, "silent")

    def unsilence(self, ip: str) -> None:
        if self._lookup is not None:
            self._lookup.forget(ip)

    def surround(self, around: Surroundings, node_port_ips: Sequence[str] | None) -> None:
        pass

    def close(self) -> None:
        if self._lookup is not None:
            self._lookup.close()


WAYS: dict[str, Callable[[Family], Capture]] = {
    "sk_lookup": ByLookup,
    "listeners": ByListeners,
}


def why_not(name: str) -> str | None:
    """Say why this node cannot capture so; None if it can."""
    if name not in WAYS:
        return "it is not part of this version"
    try:
        WAYS[name](4).close()
    except Unsupported as why:
        return str(why)
    return None


def best() -> str:
    """Return the first way that works on this node, and log why the ones before do not."""
    for name in CAPTURES[1:-1]:
        reason = why_not(name)
        if reason is None:
            return name
        log.info("another way to capture is needed", extra={"not": name, "reason": reason})
    return CAPTURES[-1]
