"""The rules that give packets for Services to the shared sockets, where there is no socket lookup.

Packets for a Service's address are local already, by their routes: it is enough to choose the
socket. Linux: Documentation/networking/tproxy.rst. A connection that exists keeps its socket.
"""

from typing import Final, NamedTuple

from pyproxy.model import Address, Family, Frontend, Proto, Route
from pyproxy.rules.capture import entry
from pyproxy.rules.nft import (
    Chain,
    Element,
    Field,
    Hook,
    MatchLocal,
    MatchProto,
    MatchSet,
    Rule,
    Set,
    Table,
    Tproxy,
    Types,
    Verdict,
    VerdictMap,
    packed_key,
)

# While a node moves between modes, rules of the other translate addresses. A packet that has both a
# socket and another address would be dropped.
AFTER_DSTNAT: Final = -99
FRONTENDS, NODE_PORTS, NODE_PORT_IPS, SILENT = "frontends", "node-ports", "node-port-ips", "silent"
TAKE: Final = Verdict("goto", "take")
LEAVE: Final = Verdict("accept")
FRONTEND: Final[tuple[Field, ...]] = ("daddr", "l4proto", "dport")
NODE_PORT: Final[tuple[Field, ...]] = ("l4proto", "dport")
PREROUTING: Final = Chain("prerouting", Hook("filter", "prerouting", AFTER_DSTNAT))
CHAINS: Final = (Chain("take"), Chain("silent"), PREROUTING)


class Doors(NamedTuple):
    """Where sockets listen: those that serve, and those that are silent."""

    serving: dict[Proto, Address]
    silent: dict[Proto, Address]


def table(family: Family, name: str) -> Table:
    return Table(family, name, "packets for Services, to sockets of pyproxy")


def sets(family: Family) -> tuple[Set, ...]:
    (ip, *_) = types = frontend_types(family)
    return (
        Set(FRONTENDS, types, "verdict"),
        Set(NODE_PORTS, types[1:], "verdict"),
        Set(NODE_PORT_IPS, (ip,)),
        Set(SILENT, (ip,)),
    )


def rules(doors: Doors) -> tuple[Rule, ...]:
    """Return the rules of chains that never change."""
    return tuple(
        Rule(chain, (MatchProto(proto), Tproxy(where)))
        for chain, places in (("take", doors.serving), ("silent", doors.silent))
        for proto, where in places.items()
    )


def entrance(*, node_ports_everywhere: bool) -> tuple[Rule, ...]:
    """Return the rules of the chain that all packets meet."""
    here = MatchLocal("daddr") if node_ports_everywhere else MatchSet(("daddr",), NODE_PORT_IPS)
    return (
        Rule(PREROUTING.name, (VerdictMap(FRONTEND, FRONTENDS),)),
        Rule(PREROUTING.name, (MatchSet(("daddr",), SILENT), Verdict("goto", "silent"))),
        Rule(PREROUTING.name, (here, VerdictMap(NODE_PORT, NODE_PORTS))),
    )


def takes(route: Route) -> bool:
    """Say whether everybody is served, as these rules tell nobody from another."""
    found = entry(route)
    return found.sources is None and {found.pod, found.node, found.outside} == {"serve"}


def frontend_element(frontend: Frontend, family: Family, verdict: Verdict) -> tuple[str, Element]:
    """Return the set that a frontend belongs to, and its element."""
    types = frontend_types(family)
    if frontend.ip:
        key = packed_key(types, (frontend.ip, frontend.proto, frontend.port))
        return FRONTENDS, Element(key, data=verdict)
    return NODE_PORTS, Element(packed_key(types[1:], (frontend.proto, frontend.port)), data=verdict)


def frontend_types(family: Family) -> Types:
    return ("ipv4_addr" if family == 4 else "ipv6_addr", "inet_proto", "inet_service")
