"""What a way to bring packets to our sockets must be able to do, for whoever serves by it."""

from collections.abc import Sequence
from typing import Protocol

from pyproxy.counters import Counts
from pyproxy.model import Frontend, Route
from pyproxy.proxier._sockets import Shared
from pyproxy.rules.listeners import Surroundings


class Capture(Protocol):
    """One way, for one family."""

    doors: Sequence[Shared]  # where it brings packets to: a pair for each worker, and old ones

    @property
    def kept(self) -> list[int]:
        """The file descriptors that a process must have for packets to come there."""
        ...

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
