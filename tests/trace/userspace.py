"""The fate of a packet by the listeners of mode userspace.

Their backends always see an address of this node: nothing is said of masquerading.
"""

from pyproxy.host import LOOPBACK
from pyproxy.model import Drop, Forward, Frontend, Pass
from pyproxy.rules.guard import guard
from pyproxy.rules.listeners import (
    Surroundings,
    action_for,
    compile_owner,
    needs_guard,
    owns_address,
    stance,
)
from tests.trace.cbpf import verdict
from tests.trace.packet import DROPPED, REFUSED, UNTOUCHED, Delivered


class Listeners:
    """The sockets of a family, each with its guard; ``pods`` are the networks of local pods."""

    def __init__(self, ports, world, pods):
        self.listeners = {f: li for port in ports for f, li in compile_owner(port).items()}
        self.around = Surroundings(
            node_ips=world.node_ips,
            pods=pods,
            loopback=(LOOPBACK[world.family],),
        )

    def fate(self, packet, world):
        listener = self._listener(packet, world)
        if listener is None:
            return self._unclaimed(packet)
        route = listener.route
        if isinstance(action_for(route, packet.sender.ip, self.around), Pass):
            return UNTOUCHED  # a routing rule leads it past
        match stance(route):
            case "refuse":
                return REFUSED  # there is no socket
            case "silent":
                return DROPPED
        if needs_guard(route):
            program = guard(route, self.around, world.family)
            if program is not None and not verdict(program, packet.sender.ip):
                return DROPPED
        action = action_for(route, packet.sender.ip, self.around)
        assert not isinstance(action, Drop), "the guard has dropped it"
        assert isinstance(action, Forward), "one that refuses has no socket"
        return Delivered(frozenset(backend.address for backend in action.pool.backends))

    def _listener(self, packet, world):
        wanted = Frontend(packet.destination, packet.port, packet.proto)
        if wanted in self.listeners:
            return self.listeners[wanted]
        if world.serves_node_ports(packet.destination):
            return self.listeners.get(Frontend("", packet.port, packet.proto))
        return None

    def _unclaimed(self, packet):
        """The address of a Service is local: its other ports are kept silent."""
        own = {f.ip for f, listener in self.listeners.items() if owns_address(listener.route)}
        return DROPPED if packet.destination in own else UNTOUCHED
