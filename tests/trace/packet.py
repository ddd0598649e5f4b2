"""A first packet of a connection, the node that it meets, and what may become of it."""

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import NamedTuple

from pyproxy.model import Address, Proto

LOOPBACK = {4: ip_network("127.0.0.0/8"), 6: ip_network("::1/128")}


class Sender(NamedTuple):
    """Who sends: ``interface`` is where it comes in, empty for a process of this node."""

    ip: str
    interface: str = ""

    @property
    def is_here(self):
        return not self.interface


class Packet(NamedTuple):
    sender: Sender
    destination: str
    proto: Proto
    port: int


class World(NamedTuple):
    """The node, as far as packets are concerned."""

    family: int
    node_ips: frozenset[str]  # loopback apart
    pods: IPv4Network | IPv6Network | str | None  # or the interface they are behind; None: unknown
    node_port_ips: tuple[str, ...] | None = None  # None: every address of the node
    service_cidrs: tuple[IPv4Network | IPv6Network, ...] = ()
    node_ports_on_loopback: bool = False

    def is_local(self, ip):
        return ip in self.node_ips or ip_address(ip) in LOOPBACK[self.family]

    def is_pod(self, sender):
        if isinstance(self.pods, str):
            return sender.interface == self.pods
        return self.pods is not None and ip_address(sender.ip) in self.pods

    def serves_node_ports(self, ip):
        if self.node_port_ips is not None:
            return ip in self.node_port_ips
        return self.is_local(ip) if self.node_ports_on_loopback else ip in self.node_ips


@dataclass(frozen=True)
class Untouched:
    """It goes where it is addressed to, as if there were no proxy."""


@dataclass(frozen=True)
class Refused:
    """The sender is told at once."""


@dataclass(frozen=True)
class Dropped:
    """The sender is told nothing."""


@dataclass(frozen=True)
class Delivered:
    """One of these backends gets it; some see the node's address instead of the sender's.

    A hairpin depends on the backend: only that which sent the packet needs it.
    """

    backends: frozenset[Address]
    masqueraded: frozenset[Address] = frozenset()


UNTOUCHED, REFUSED, DROPPED = Untouched(), Refused(), Dropped()
Fate = Untouched | Refused | Dropped | Delivered
