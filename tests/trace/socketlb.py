"""What the programs of socket load balancing do with a socket that connects."""

import struct
from functools import cache
from ipaddress import ip_address

from pyproxy.model import Address
from pyproxy.rules.listeners import compile_owner
from pyproxy.rules.socketlb import BACKEND, MAPPED, NODE, NUMBERS, POD, changes, content, mapped_ip
from pyproxy.rules.socketlb_code import (
    FIND_TCP,
    FIND_UDP,
    IP4,
    IP6,
    KTIME,
    LOOKUP,
    NETNS_COOKIE,
    PORT,
    PROTOCOL,
    RELEASE,
    SET_RETVAL,
    SOCKET,
    SOCKET_COOKIE,
    UPDATE,
    Fds,
    Hook,
    program,
)
from tests.trace.ebpf import Hash, Pointer, look_up, run
from tests.trace.packet import LOOPBACK, REFUSED, UNTOUCHED

COOKIE, NAMESPACES = 77, {True: 1, False: 2}  # the node's, a pod's
SIZES = Fds(
    frontends=(20, 48), slots=(24, 20), members=(40, 4), addresses=(16, 4), origins=(8, 4),
    reverse=(32, 20), flows=(32, 20), affinity=(16, 32),
)  # fmt: skip


class Table(Hash):
    def __init__(self, key_size, value_size):
        super().__init__(key_size)
        self.value_size = value_size


class Event(Pointer):
    """A ``struct bpf_sock_addr``, in which a pointer to the socket is."""

    def read(self, offset, size):
        return Pointer(bytearray(80)) if offset == SOCKET else super().read(offset, size)


class Sockets:
    """The maps that a cluster's plan leads to, and sockets that ask them."""

    def __init__(self, ports, world):
        self._family = world.family
        self.maps = Fds(*(Table(*size) for size in SIZES))
        for port in ports:
            for frontend, listener in compile_owner(port).items():
                for table, key, value in changes(None, content(frontend, listener, None, 0)):
                    getattr(self.maps, table)[key] = bytearray(value)
        self.maps.origins[bytes(8)] = struct.pack("=I", POD)
        self.maps.origins[struct.pack("=Q", NAMESPACES[True])] = struct.pack("=I", NODE)
        loopback = str(LOOPBACK[world.family][1 if world.family == 4 else 0])
        for ip in (*world.node_ips, loopback):
            if world.serves_node_ports(ip):
                origins = NODE if ip == loopback else POD | NODE
                self.maps.addresses[mapped_ip(ip)] = struct.pack("=I", origins)

    def connected(self, packet, event="connect"):
        """Return the backend a socket is given, or what else becomes of it."""
        code = assembled(event, self._family)
        memory = bytearray(72)
        packed = ip_address(packet.destination).packed
        at = IP4 if self._family == 4 else IP6
        memory[at : at + len(packed)] = packed
        memory[PORT : PORT + 2] = packet.port.to_bytes(2, "big")
        memory[PROTOCOL] = NUMBERS[packet.proto]
        told = []
        helpers = {
            LOOKUP: look_up,
            UPDATE: put,
            KTIME: lambda *_: 10**12,
            SOCKET_COOKIE: lambda *_: COOKIE,
            NETNS_COOKIE: lambda *_: NAMESPACES[packet.sender.is_here],
            SET_RETVAL: lambda value, *_: told.append(value) or 0,
            FIND_TCP: lambda _event, wanted, size, *_: self._own(packet, wanted, size),
            FIND_UDP: lambda _event, wanted, size, *_: self._own(packet, wanted, size),
            RELEASE: lambda *_: 0,
        }
        before = bytes(memory)
        if run(code, Event(memory), self.maps, helpers) == 0:
            assert len(told) == 1, "who is refused is told why"
            return REFUSED
        if bytes(memory) == before:
            return UNTOUCHED
        ip = str(ip_address(bytes(memory[at : at + len(packed)])))
        return Address(ip, int.from_bytes(memory[PORT : PORT + 2], "big"))

    def shown(self, backend):
        """Return the address that the socket's owner believes to be connected to."""
        key = struct.pack("=Q20s4x", COOKIE, BACKEND.pack(*address(backend), 0))
        ip, port, _zero = BACKEND.unpack(self.maps.reverse[key])
        packed = ip.removeprefix(MAPPED) if self._family == 4 else ip
        return Address(str(ip_address(packed)), int.from_bytes(port, "big"))

    def _own(self, packet, wanted, size):
        """A pod has a socket for whatever is sent to its own address."""
        ip = ip_address(packet.sender.ip).packed
        tuple_of = bytes(wanted.memory[wanted.bytes(0, size)])
        return Pointer(bytearray(80)) if tuple_of[len(ip) : 2 * len(ip)] == ip else 0


@cache
def assembled(event, family):
    return program(Hook(event, family), family, Fds(*range(len(SIZES))), can_refuse=True)


def address(backend):
    return mapped_ip(backend.ip), backend.port.to_bytes(2, "big")


def put(table, key, value, *_):
    found = bytes(key.memory[key.bytes(0, table.key_size)])
    table[found] = bytearray(value.memory[value.bytes(0, table.value_size)])
    return 0
