"""Rules that refuse connections to addresses of which only ports are the node's, in IPv4.

The kernel sends nothing from an IPv4 address that is not its own: neither the reset that a
connection meets where nobody listens, nor the word that a port is unreachable. A rule can, in the
name of the node. Linux: net/ipv4/route.c, ``ip_route_output_key_hash_rcu``; rules may refuse in
prerouting since 5.9. Of UDP, the node's own datagrams still meet silence.
"""

from typing import Final

from pyproxy.model import Frontend, Route
from pyproxy.rules.capture import Entry, entry
from pyproxy.rules.listeners import owns_address
from pyproxy.rules.nft import (
    Chain,
    Element,
    Hook,
    MatchProto,
    MatchSet,
    MatchSyn,
    Reject,
    Rule,
    Set,
    Table,
    packed_key,
)
from pyproxy.rules.tproxy import AFTER_DSTNAT, FRONTEND, frontend_types

NAME: Final = "refused"
TABLE: Final = Table(4, "pyproxy-refusals", "pyproxy, mode userspace: Services without endpoints")
CHAIN: Final = Chain("prerouting", Hook("filter", "prerouting", AFTER_DSTNAT))
SET: Final = Set(NAME, frontend_types(4), counted=True)
WANTED: Final = MatchSet(FRONTEND, NAME)
RULES: Final = (  # connections that are open go on
    Rule(CHAIN.name, (MatchProto("TCP"), MatchSyn(), WANTED, Reject(reset=True))),
    Rule(CHAIN.name, (MatchProto("UDP"), WANTED, Reject())),
)
NOBODY: Final = Entry("refuse", "refuse", "refuse")


def refuses_all(frontend: Frontend, route: Route) -> bool:
    """Say whether everybody is to be refused, at an address that may be another machine's."""
    return bool(frontend.ip) and not owns_address(route) and entry(route) == NOBODY


def element(frontend: Frontend) -> Element:
    return Element(packed_key(SET.key, (frontend.ip, frontend.proto, frontend.port)))
