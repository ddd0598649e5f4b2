"""The frontends of the userspace mode that exist: sockets, guards, and who owns them."""

import logging
import socket
from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

from pyproxy.balancer import Picker
from pyproxy.model import Family, Frontend, ServicePortName
from pyproxy.proxier._sockets import attach_guard, detach_guard, listening, why_not
from pyproxy.proxier._tcp import TcpFront, TcpRelay
from pyproxy.proxier._udp import UdpFront, UdpRelay
from pyproxy.reconcile import Difference
from pyproxy.rules.guard import DROP_ALL, Program, guard
from pyproxy.rules.listeners import (
    Listener,
    Surroundings,
    needs_guard,
    owns_address,
    stance,
)

WILDCARD: Mapping[Family, str] = {4: "0.0.0.0", 6: "::"}

log = logging.getLogger(__name__)


class Held(Struct):
    """A frontend as it is: without ``front``, it refuses."""

    listener: Listener
    front: TcpFront | UdpFront | None
    foreign: bool = False  # nothing but the port makes the address ours


class Fronts:
    """All frontends of one family, by where they are and by owner."""

    def __init__(self, family: Family, tcp: TcpRelay, udp: UdpRelay) -> None:
        self._family = family
        self._tcp = tcp
        self._udp = udp
        self._held: dict[Frontend, Held] = {}
        self._of_owner: dict[ServicePortName, dict[Frontend, Listener]] = {}
        self._around = Surroundings()
        self._node_port_ips: Sequence[str] | None = None  # None: all there are

    def held(self) -> set[Frontend]:
        return set(self._held)

    def listener(self, frontend: Frontend) -> Listener:
        return self._held[frontend].listener

    def listeners(self) -> dict[Frontend, Listener]:
        return {frontend: held.listener for frontend, held in self._held.items()}

    def of(self, owner: ServicePortName) -> dict[Frontend, Listener]:
        return self._of_owner.get(owner, {})

    def differing(self, frontend: Frontend, listener: Listener) -> Iterator[Difference]:
        """Yield how a frontend differs from what it should be; sockets are asked themselves."""
        held = self._held.get(frontend)
        does = stance(listener.route)
        if held is None or held.listener != listener:
            there = stance(held.listener.route) if held is not None else None
            yield Difference(f"frontend {frontend}", does, there)
        elif does != "refuse" and not (held.front and all(map(is_open, held.front.sockets))):
            yield Difference(f"socket of {frontend}", does, None)

    def put(self, frontend: Frontend, listener: Listener, picker: Picker) -> str | None:
        """Make a frontend so; return why it cannot be, and then there is none.

        Sockets that are open stay open: who waits to be accepted is treated by the new rules.
        """
        if frontend.proto == "SCTP":
            return "SCTP is for the kernel modes: nftables, iptables or ipvs"
        held = self._held.get(frontend)
        front = held.front if held is not None else None
        foreign = self._is_foreign(frontend, listener)
        if front is not None and held is not None and held.foreign != foreign:
            front.close()
            front = None
        if stance(listener.route) == "refuse":
            if front is not None:
                front.close()
            front = None
        else:
            try:
                front = self._served(frontend, front, listener, picker)
            except OSError as error:
                self.close(frontend)
                return why_not(error, frontend.port)
        self._own(frontend, listener, held)
        self._held[frontend] = Held(listener, front, foreign)
        return None

    def _served(
        self,
        frontend: Frontend,
        front: TcpFront | UdpFront | None,
        listener: Listener,
        picker: Picker,
    ) -> TcpFront | UdpFront:
        if front is None:
            return self._open(frontend, listener, picker)
        front.update(listener, picker)
        self._protect(front.sockets, listener)
        return front

    def close(self, frontend: Frontend) -> ServicePortName | None:
        """Let go of a frontend; return whose it was."""
        held = self._held.pop(frontend, None)
        if held is None:
            return None
        if held.front is not None:
            held.front.close()
        self._disown(frontend, held.listener.owner)
        return held.listener.owner

    def surround(self, around: Surroundings, node_port_ips: Sequence[str] | None) -> None:
        """Take in that the node's addresses are others: guards, and where node ports listen."""
        moved = node_port_ips != self._node_port_ips
        self._around, self._node_port_ips = around, node_port_ips
        for frontend, held in list(self._held.items()):
            if held.front is None:
                continue
            picker, stays = held.front.picker, bool(frontend.ip) or not moved
            if not stays:
                held.front.close()
            try:
                held.front = self._served(
                    frontend, held.front if stays else None, held.listener, picker
                )
            except OSError as error:
                self.close(frontend)
                problem = why_not(error, frontend.port)
                log.error("not served", extra={"frontend": str(frontend), "error": problem})

    def _open(self, frontend: Frontend, listener: Listener, picker: Picker) -> TcpFront | UdpFront:
        wildcard = not frontend.ip and self._node_port_ips is None
        ips: Sequence[str] = [frontend.ip]
        if not frontend.ip:
            ips = self._node_port_ips or () if not wildcard else [WILDCARD[self._family]]
        sockets: list[socket.socket] = []
        program = self._program(listener)
        try:
            sockets.extend(
                listening(
                    ip,
                    frontend.port,
                    frontend.proto,
                    program,
                    wildcard=wildcard,
                    transparent=self._is_foreign(frontend, listener),
                )
                for ip in ips
            )
        except OSError:
            for sock in sockets:
                sock.close()
            raise
        if frontend.proto == "TCP":
            return TcpFront(self._tcp, sockets, listener, picker)
        return UdpFront(self._udp, sockets, listener, picker, wildcard=wildcard)

    def _is_foreign(self, frontend: Frontend, listener: Listener) -> bool:
        own = self._around.node_ips
        return bool(frontend.ip) and not owns_address(listener.route) and frontend.ip not in own

    def _protect(self, sockets: Sequence[socket.socket], listener: Listener) -> None:
        program = self._program(listener)
        for sock in sockets:
            if program is not None:
                attach_guard(sock, program)
            else:
                detach_guard(sock)

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

    def _own(self, frontend: Frontend, listener: Listener, before: Held | None) -> None:
        if before is not None and before.listener.owner != listener.owner:
            self._disown(frontend, before.listener.owner)
        self._of_owner.setdefault(listener.owner, {})[frontend] = listener

    def _disown(self, frontend: Frontend, owner: ServicePortName) -> None:
        frontends = self._of_owner[owner]
        del frontends[frontend]
        if not frontends:
            del self._of_owner[owner]


def is_open(sock: socket.socket) -> bool:
    """Say whether a socket is open, and listens if it is one for connections."""
    if sock.fileno() < 0:
        return False
    is_stream = sock.type == socket.SOCK_STREAM
    return not is_stream or bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
