"""The fate of a packet by the listeners of mode userspace.

Their backends always see an address of this node: nothing is said of masquerading.
"""

from ipaddress import ip_address

from msgspec.structs import replace

from pyproxy.counters import Counts, growth, total
from pyproxy.host import LOOPBACK
from pyproxy.model import Drop, Forward, Frontend, Pass
from pyproxy.rules.capture import (
    NO_SOURCES,
    NUMBER,
    ORIGINS,
    PROTOCOLS,
    address_key,
    counts,
    entry,
    frontend_key,
    network_key,
    origins,
    packed_entry,
    packed_standing,
    sizes,
)
from pyproxy.rules.capture_code import (
    ADDRESS_FAMILY,
    FAMILY,
    LOCAL_IP4,
    LOCAL_IP6,
    LOCAL_PORT,
    MAP_LOOKUP,
    PROTOCOL,
    REMOTE_IP4,
    REMOTE_IP6,
    REMOTE_PORT,
    SERVING_TCP,
    SILENT_TCP,
    SILENT_UDP,
    SK_ASSIGN,
    SK_DROP,
    SK_RELEASE,
    Maps,
    code,
)
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
from tests.trace.ebpf import Hash, Trie, look_up, run
from tests.trace.packet import DROPPED, REFUSED, UNTOUCHED, Delivered

ZERO = Counts(rejected=0, dropped=0, denied=0)


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


class Captured(Listeners):
    """The same frontends by the program at the socket lookup, with its maps.

    It is the program's verdict that counts; whose backends a client gets is the listener's word.
    """

    def __init__(self, ports, world, pods, workers=1):
        super().__init__(ports, world, pods)
        family, size = world.family, sizes(world.family)
        self.maps = Maps(
            entries=Hash(size.entry),
            networks=Trie(size.network),
            sockets=Hash(4),
        )
        self.code = code(family, Maps(*range(len(self.maps))), workers)
        for number, (frontend, listener) in enumerate(self.listeners.items(), 1):
            made = entry(listener.route)
            limited = made.sources is not None
            packed = bytearray(packed_entry(made, number if limited else NO_SOURCES))
            self.maps.entries[frontend_key(frontend, family)] = packed
            for network in made.sources or ():
                self.maps.networks[network_key(network, number)] = NUMBER.pack(1)
            if owns_address(listener.route):
                self.maps.entries[address_key(frontend.ip, family)] = bytearray(
                    packed_standing("silent")
                )
        for network, origin in origins(self.around, family).items():
            self.maps.networks[network_key(network)] = NUMBER.pack(ORIGINS[origin])
        own = world.node_ips | {str(LOOPBACK[family][1 if family == 4 else 0])}
        for ip in world.node_port_ips if world.node_port_ips is not None else own:
            self.maps.entries[address_key(ip, family)] = bytearray(packed_standing("node ports"))
        for index in range(SERVING_TCP + 2 * workers):
            self.maps.sockets[NUMBER.pack(index)] = index

    def fate(self, packet, world):
        before = self._counts()
        socket = self.socket(packet)  # none for what a routing rule leads past
        counted = total((growth(before, self._counts()), ZERO))
        assert counted == self._reason(packet, world, socket), "it counts what it refuses"
        if socket in (SILENT_TCP, SILENT_UDP):
            return DROPPED
        if socket is None:
            return UNTOUCHED
        if socket == "refused":
            return REFUSED
        action = action_for(self._listener(packet, world).route, packet.sender.ip, self.around)
        return Delivered(frozenset(backend.address for backend in action.pool.backends))

    def _counts(self):
        return total(counts(bytes(value)) for value in self.maps.entries.values())

    def _reason(self, packet, world, socket):
        """Return the one count of a packet that is not let through to a frontend."""
        listener = self._listener(packet, world)
        if listener is None or socket not in (SILENT_TCP, SILENT_UDP, "refused"):
            return ZERO
        if socket == "refused":
            return replace(ZERO, rejected=1)
        ranges, sender = listener.route.allowed_sources, ip_address(packet.sender.ip)
        if ranges is None or any(sender in network for network in ranges):
            return replace(ZERO, dropped=1)
        return replace(ZERO, denied=1)

    def socket(self, packet, remote_port=40000):
        """Return the number of the socket that gets the packet."""
        assigned = []
        helpers = {
            MAP_LOOKUP: look_up,
            SK_ASSIGN: lambda _context, found, *_: assigned.append(found.memory) or 0,
            SK_RELEASE: lambda *_: 0,
        }
        verdict = run(self.code, bytearray(context(packet, remote_port)), self.maps, helpers)
        if assigned:
            assert assigned[0] % 2 == (packet.proto == "UDP"), "a socket of another protocol"
            return assigned[0]
        return "refused" if verdict == SK_DROP else None


def context(packet, remote_port):
    """Return the ``struct bpf_sk_lookup`` of a packet."""
    sender, local = ip_address(packet.sender.ip).packed, ip_address(packet.destination).packed
    v4 = len(sender) == 4
    fields = {
        FAMILY: NUMBER.pack(ADDRESS_FAMILY[4 if v4 else 6]),
        PROTOCOL: NUMBER.pack(PROTOCOLS[packet.proto]),
        REMOTE_IP4 if v4 else REMOTE_IP6: sender,
        LOCAL_IP4 if v4 else LOCAL_IP6: local,
        REMOTE_PORT: remote_port.to_bytes(2, "big"),
        LOCAL_PORT: NUMBER.pack(packet.port),
    }
    made = bytearray(68)
    for offset, value in fields.items():
        made[offset : offset + len(value)] = value
    return made
