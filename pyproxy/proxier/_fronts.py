"""The frontends of the userspace mode that exist: sockets, guards, and who owns them.

Those that the capture takes have no socket of their own; all others do.
"""

import logging
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from socket import SocketType
from typing import Literal

from msgspec import Struct

from pyproxy.balancer import Picker
from pyproxy.counters import NOTHING, Counts, Entry, total
from pyproxy.model import Address, Family, Frontend, Proto, ServicePortName
from pyproxy.proxier._accept import TcpFront, listen, unlisten
from pyproxy.proxier._datagrams import Datagrams
from pyproxy.proxier._flow import UdpRelay
from pyproxy.proxier._given import Bound, Entrances, GivenFlow
from pyproxy.proxier._meter import Carried, Meter
from pyproxy.proxier._openings import Openings
from pyproxy.proxier._sockets import (
    Shared,
    destination,
    dropped_at,
    why_not,
)
from pyproxy.proxier._tcp import TcpRelay
from pyproxy.proxier._udp import UdpFront
from pyproxy.proxier._way import Capture
from pyproxy.reconcile import Difference
from pyproxy.rules.listeners import (
    Listener,
    Surroundings,
    admits_all,
    stance,
)

log = logging.getLogger(__name__)


class Held(Struct):
    """A frontend as it is: without ``front``, it refuses."""

    listener: Listener
    front: TcpFront | UdpFront | None
    taken: bool  # by the capture
    foreign: bool = False  # nothing but the port makes the address ours
    rejected: int = 0  # clients that were accepted, to be reset at once
    dropped_before: int = 0  # what its sockets had dropped when the guard came


class Fronts:
    """All frontends of one family, by where they are and by owner."""

    def __init__(
        self,
        family: Family,
        tcp: TcpRelay,
        udp: UdpRelay,
        capture: Capture,
        inherited: Mapping[Bound, socket.socket],
        *,
        checks_ports: bool = True,
    ) -> None:
        """``checks_ports`` unless another process does: those of other programs are theirs."""
        self._checks_ports = checks_ports
        self._tcp = tcp
        self._udp = udp
        self.capture = capture
        self._openings = Openings(family, tcp, udp, inherited)
        self._outdated: list[TcpFront | UdpFront] = []  # until the capture leads elsewhere
        self._datagrams: dict[Shared, Datagrams] = {}  # of the doors that we look after
        self.sockets: list[socket.socket] = []  # likewise, those for connections
        self.is_retired = False
        # Asked for a frontend that is not here: make it so, and say whether it is now.
        self.wake: Callable[[Frontend], bool] = lambda _frontend: False
        self._committed = False
        self._held: dict[Frontend, Held] = {}
        self._of_owner: dict[ServicePortName, dict[Frontend, Listener]] = {}

    def held(self) -> set[Frontend]:
        return set(self._held)

    def holds(self, frontend: Frontend) -> bool:
        return frontend in self._held

    def listener(self, frontend: Frontend) -> Listener:
        return self._held[frontend].listener

    def listeners(self) -> dict[Frontend, Listener]:
        return {frontend: held.listener for frontend, held in self._held.items()}

    def owners(self) -> list[ServicePortName]:
        return list(self._of_owner)

    def taken_of(self, owner: ServicePortName) -> list[Listener]:
        """Return the listeners of an owner to which the capture brings clients."""
        return [li for frontend, li in self.of(owner).items() if self._held[frontend].taken]

    def of(self, owner: ServicePortName) -> dict[Frontend, Listener]:
        return self._of_owner.get(owner, {})

    def differing(self, frontend: Frontend, listener: Listener) -> Iterator[Difference]:
        """Yield how a frontend differs from what it should be; sockets are asked themselves."""
        held = self._held.get(frontend)
        does = stance(listener.route)
        if held is None or held.listener != listener:
            there = stance(held.listener.route) if held is not None else None
            yield Difference(f"frontend {frontend}", does, there)
        elif does != "refuse" and held.front is not None:
            is_shared = held.taken and frontend.proto == "TCP"
            sockets = [door.tcp for door in self.capture.doors] if is_shared else held.front.sockets
            if not all(map(is_open, sockets)):
                yield Difference(f"socket of {frontend}", does, None)

    def entries(self) -> Iterator[Entry[Frontend]]:
        """Yield what each frontend has carried so far, and refused. Raises ``OSError``."""
        living: dict[Meter, list[tuple[Address, Carried]]] = {}
        for meter, address, carried in self._tcp.carried():
            living.setdefault(meter, []).append((address, carried))
        for frontend, held in self._held.items():
            front = held.front
            refused = self._kept_out(frontend, held)
            if front is None:
                reset = Counts(rejected=held.rejected or None)
                yield Entry(frontend, None, total((refused, reset)))
            elif isinstance(front, UdpFront):
                flows = [(flow.backend, flow.carried) for flow in front.flows.values()]
                yield from front.meter.entries(frontend, flows, refused)
            else:
                yield from front.meter.entries(frontend, living.get(front.meter, ()), refused)

    def _kept_out(self, frontend: Frontend, held: Held) -> Counts:
        """Return the packets that were refused or dropped. Raises ``OSError``."""
        reason = why_kept_out(held.listener)
        if reason is None:
            return NOTHING
        if held.taken:
            return self.capture.refused(frontend)
        if held.front is None:  # the kernel refuses, and tells nobody
            return NOTHING
        count = dropped(held.front) - held.dropped_before
        return Counts(denied=count) if reason == "denied" else Counts(dropped=count)

    def put(self, frontend: Frontend, listener: Listener, picker: Picker) -> str | None:
        """Make a frontend so; return why it cannot be, and then there is none.

        Sockets that are open stay open: who waits to be accepted is treated by the new rules.
        """
        if frontend.proto == "SCTP":
            return "SCTP is for the kernel modes: nftables, iptables or ipvs"
        before = self._held.get(frontend)
        front = before.front if before is not None else None
        taken = self.capture.takes(listener.route)
        foreign = self._openings.is_foreign(frontend, listener)
        held = Held(listener, front, taken, foreign)
        if before is not None:
            same = why_kept_out(before.listener) == why_kept_out(listener)
            held.dropped_before = before.dropped_before if same else dropped(front)
        if front is not None and before is not None and must_reopen(before, held):
            self._outdated.append(front)
            held.front = None
        try:
            if taken and self._checks_ports and (before is None or not before.taken):
                self._openings.check_free(frontend)
            self._serve(frontend, held, picker)
            self._held[frontend] = held
            self._own(frontend, listener, before)
            self.capture.put(frontend, listener.route, foreign=foreign)
        except OSError as error:
            self.close(frontend)
            return why_not(error, frontend.port)
        return None

    def _serve(self, frontend: Frontend, held: Held, picker: Picker) -> None:
        """Open what a frontend needs, or bring up to date what is open. Raises ``OSError``."""
        front, listener = held.front, held.listener
        if stance(listener.route) == "refuse":
            held.front = None
            if front is not None:
                front.close()
        elif front is None:
            held.front = (
                self._openings.front(frontend, listener, picker)
                if held.taken
                else self._openings.open(frontend, listener, picker, foreign=held.foreign)
            )
            held.dropped_before = dropped(held.front)
        else:
            front.update(listener, picker)
            if not held.taken:
                self._openings.protect(front.sockets, listener)

    def commit(self) -> None:
        """Have all changes in effect, and close what they replace. Raises ``OSError``."""
        self.capture.commit()
        self._committed = True
        self._openings.drop_inherited()
        for front in self._outdated:
            front.close()
        self._outdated.clear()

    def front_of(self, client: SocketType) -> TcpFront | None:
        """Return the frontend that a client wants who came by the shared socket."""
        ip, port = client.getsockname()[:2]
        held = self._at(ip, port, "TCP")
        if held is None:
            return None
        if held.front is None:
            held.rejected += 1
        return held.front if isinstance(held.front, TcpFront) else None

    def give_flows(self) -> list[GivenFlow]:
        """Let go of all flows of UDP, for another process."""
        fronts = [held.front for held in self._held.values()]
        return [g for f in fronts if isinstance(f, UdpFront) for g in f.give_flows()]

    def take_flow(self, given: GivenFlow) -> None:
        """Go on with a flow that another process has given, if it may still be."""
        held = self._at(*given.local, "UDP")
        if held is not None and isinstance(held.front, UdpFront):
            held.front.take_flow(given)
        else:
            given.close()

    def udp_front(self, local: bytes) -> UdpFront | None:
        """Return the frontend that a datagram is for, by ``original_destination``."""
        held = self._at(*destination(local), "UDP")
        return held.front if held is not None and isinstance(held.front, UdpFront) else None

    def _at(self, ip: str, port: int, proto: Proto) -> Held | None:
        for frontend in (Frontend(ip, port, proto), Frontend("", port, proto)):
            held = self._held.get(frontend)
            if held is None and self.wake(frontend):
                held = self._held.get(frontend)
            if held is not None:
                return held
        return None

    def entrances(self) -> Entrances:
        """Return all sockets by which clients come in."""
        own: dict[Bound, socket.socket] = {}
        for frontend, held in self._held.items():
            for sock in held.front.sockets if held.front is not None else ():
                ip, port = sock.getsockname()[:2]
                own[Bound(ip, port, frontend.proto)] = sock
        return Entrances(tuple(self.capture.doors), own)

    def admit(self, door: Shared) -> None:
        """Let clients in by a pair of shared sockets: when all frontends are there."""
        if door in self._datagrams or self.is_retired:
            return
        self.sockets.append(door.tcp)
        listen(self._tcp, door.tcp, self)
        self._datagrams[door] = Datagrams(
            self._udp.poller, door.udp, self._udp.taken, self.udp_front
        )

    def leave_to_others(self, door: Shared) -> None:
        """Let nobody in by a pair of shared sockets any more: another process does."""
        if door in self._datagrams:
            self.sockets.remove(door.tcp)
            unlisten(self._tcp, door.tcp)
            self._datagrams.pop(door).close()

    def retire(self) -> None:
        """Let nobody in any more; a successor does, by the same addresses."""
        self.is_retired = True
        for door in list(self._datagrams):
            self.leave_to_others(door)
        for held in self._held.values():
            if isinstance(held.front, TcpFront):
                for sock in held.front.sockets:
                    unlisten(self._tcp, sock)
            elif held.front is not None:
                held.front.stop_reading()

    def leave(self) -> None:
        """Close the sockets of frontends; what the capture has in the kernel is the successor's.

        Datagrams that are on their way back still find their client.
        """
        for held in self._held.values():
            if held.front is not None and not held.taken:
                held.front.close()
        self.capture.leave()

    def end(self) -> None:
        """Close what ``leave`` has left open."""
        for held in self._held.values():
            if held.front is not None:
                held.front.close()

    def aclose(self) -> None:
        """Let nobody in any more, and remove what the capture has in the kernel."""
        self.retire()
        self.capture.close()

    def close(self, frontend: Frontend) -> ServicePortName | None:
        """Let go of a frontend; return whose it was."""
        held = self._held.pop(frontend, None)
        if held is None:
            return None
        self.capture.drop(frontend)
        if held.front is not None:
            held.front.close()
        self._disown(frontend, held.listener.owner)
        return held.listener.owner

    def surround(self, around: Surroundings, node_port_ips: Sequence[str] | None) -> None:
        """Take in that the node's addresses are others: guards, and where node ports listen."""
        moved = self._openings.surround(around, node_port_ips)
        self.capture.surround(around, node_port_ips)
        if self._committed:
            self.capture.commit()
        for frontend, held in list(self._held.items()):
            if held.front is None or held.taken:
                continue
            picker = held.front.picker
            if moved and not frontend.ip:
                held.front.close()
                held.front = None
            try:
                self._serve(frontend, held, picker)
            except OSError as error:
                self.close(frontend)
                problem = why_not(error, frontend.port)
                log.error("not served", extra={"frontend": str(frontend), "error": problem})

    def _own(self, frontend: Frontend, listener: Listener, before: Held | None) -> None:
        if before is not None and before.listener.owner != listener.owner:
            self._disown(frontend, before.listener.owner)
        self._of_owner.setdefault(listener.owner, {})[frontend] = listener

    def _disown(self, frontend: Frontend, owner: ServicePortName) -> None:
        frontends = self._of_owner[owner]
        del frontends[frontend]
        if not frontends:
            del self._of_owner[owner]


def why_kept_out(listener: Listener) -> Literal["dropped", "denied"] | None:
    """Say what it is called that some come in vain: for a policy, or for source ranges."""
    if admits_all(listener.route):
        return None
    return "dropped" if listener.route.allowed_sources is None else "denied"


def dropped(front: TcpFront | UdpFront | None) -> int:
    sockets = front.sockets if front is not None else ()
    return sum(dropped_at(sock) for sock in sockets if sock.fileno() >= 0)


def must_reopen(before: Held, after: Held) -> bool:
    """Say whether what is open does not do any more."""
    return before.taken != after.taken or (not after.taken and before.foreign != after.foreign)


def is_open(sock: socket.socket) -> bool:
    """Say whether a socket is open, and listens if it is one for connections."""
    if sock.fileno() < 0:
        return False
    is_stream = sock.type == socket.SOCK_STREAM
    return not is_stream or bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
