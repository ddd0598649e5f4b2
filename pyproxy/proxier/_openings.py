"""Opens the sockets that frontends have of their own, and guards them."""

import logging
import socket
from collections.abc import Mapping, Sequence

from pyproxy.balancer import Picker
from pyproxy.model import WILDCARD, Family, Frontend
from pyproxy.proxier._accept import TcpFront
from pyproxy.proxier._flow import UdpRelay
from pyproxy.proxier._given import Bound
from pyproxy.proxier._sockets import attach_guard, check_free, detach_guard, listening
from pyproxy.proxier._tcp import TcpRelay
from pyproxy.proxier._udp import UdpFront
from pyproxy.rules.guard import DROP_ALL, Program, guard
from pyproxy.rules.listeners import Listener, Surroundings, needs_guard, owns_address, stance

log = logging.getLogger(__name__)


class Openings:
    """One family's; those that a predecessor had open are used again."""

    def __init__(
        self, family: Family, tcp: TcpRelay, udp: UdpRelay, inherited: Mapping[Bound, socket.socket]
    ) -> None:
        self._family = family
        self._tcp = tcp
        self._udp = udp
        self._inherited = dict(inherited)  # until they are there again
        self._around = Surroundings()
        self._node_port_ips: Sequence[str] | None = None  # None: all there are

    def surround(self, around: Surroundings, node_port_ips: Sequence[str] | None) -> bool:
        """Take in that the node's addresses are others; say whether node ports listen elsewhere."""
        moved = node_port_ips != self._node_port_ips
        self._around, self._node_port_ips = around, node_port_ips
        return moved

    def drop_inherited(self) -> None:
        """Close what nobody has use for: of frontends that are no more."""
        for sock in self._inherited.values():
            sock.close()
        self._inherited.clear()

    def open(
        self, frontend: Frontend, listener: Listener, picker: Picker, *, foreign: bool
    ) -> TcpFront | UdpFront:
        """Open a frontend, guarded from the start. Raises ``OSError``.

        Of a foreign one, nothing but the port makes the address ours.
        """
        sockets: list[socket.socket] = []
        ips = self._ips(frontend)
        program = self._program(listener)
        wildcard = WILDCARD[self._family] in ips
        try:
            for ip in ips:
                sock = self._inherited.pop(Bound(ip, frontend.port, frontend.proto), None)
                sockets.append(
                    sock
                    or listening(
                        ip,
                        frontend.port,
                        frontend.proto,
                        program,
                        wildcard=wildcard,
                        transparent=foreign,
                    )
                )
                if sock is not None:
                    set_guard(sock, program)
        except OSError:
            for sock in sockets:
                sock.close()
            raise
        return self.front(frontend, listener, picker, sockets, wildcard=wildcard)

    def front(
        self,
        frontend: Frontend,
        listener: Listener,
        picker: Picker,
        sockets: Sequence[socket.socket] = (),
        *,
        wildcard: bool = False,
    ) -> TcpFront | UdpFront:
        """Return a frontend with these sockets; without any, others bring it its clients."""
        if frontend.proto == "TCP":
            return TcpFront(self._tcp, sockets, listener, picker)
        return UdpFront(self._udp, sockets, listener, picker, wildcard=wildcard)

    def _ips(self, frontend: Frontend) -> Sequence[str]:
        """Return the addresses of a frontend; of a node port that is everywhere, the wildcard."""
        if frontend.ip:
            return (frontend.ip,)
        return (WILDCARD[self._family],) if self._node_port_ips is None else self._node_port_ips

    def check_free(self, frontend: Frontend) -> None:
        """See that no program of this node would lose its port to us. Raises ``OSError``."""
        if not frontend.ip or frontend.ip in self._around.node_ips:
            for ip in self._ips(frontend):
                check_free(ip, frontend.port, frontend.proto)

    def is_foreign(self, frontend: Frontend, listener: Listener) -> bool:
        own = self._around.node_ips
        return bool(frontend.ip) and not owns_address(listener.route) and frontend.ip not in own

    def protect(self, sockets: Sequence[socket.socket], listener: Listener) -> None:
        program = self._program(listener)
        for sock in sockets:
            set_guard(sock, program)

    def _program(self, listener: Listener) -> Program | None:
        if stance(listener.route) == "silent":
            return DROP_ALL
        if not needs_guard(listener.route):
            return None
        program = guard(listener.route, self._around, self._family)
        if program is None:
            log.warning(
                "too many source ranges for a socket filter: others are refused, not dropped",
                extra={"service": str(listener.owner)},
            )
        return program


def set_guard(sock: socket.socket, program: Program | None) -> None:
    if program is not None:
        attach_guard(sock, program)
    else:
        detach_guard(sock)
