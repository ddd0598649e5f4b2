"""A packet on its way through the kernel, for interpreters of rules: what hooks do to it."""

from typing import NamedTuple

from pyproxy.model import Address
from tests.trace.packet import DROPPED, REFUSED, UNTOUCHED, Delivered


class State(NamedTuple):
    """The interface is empty where the packet did not come in through one."""

    saddr: str
    daddr: str
    proto: str
    dport: int
    interface: str
    mark: int = 0
    is_dnatted: bool = False
    is_masqueraded: bool = False
    remembered: frozenset[str] = frozenset()  # the sets that its source was added to


def arrived(packet):
    ip, interface = packet.sender
    return State(ip, packet.destination, packet.proto, packet.port, interface)


def dnatted(state, address):
    return state._replace(daddr=address.ip, dport=address.port, is_dnatted=True)


def united(outcomes):
    """Return the one fate of all ways a packet may take: they differ in the backend only."""
    ended = {verdict if verdict != "accept" else at.is_dnatted for verdict, at in outcomes}
    assert len(ended) == 1, f"it depends on the pick: {ended}"
    match ended.pop():
        case "drop":
            return DROPPED
        case "reject":
            return REFUSED
        case False:
            masqueraded = any(at.is_masqueraded for _, at in outcomes)
            assert not masqueraded, "masqueraded on its way to nobody of ours"
            return UNTOUCHED
    marked = any(at.is_masqueraded and at.mark for _, at in outcomes)
    assert not marked, "its mark would have it masqueraded again where it comes by once more"
    to = {Address(at.daddr, at.dport): at.is_masqueraded for _, at in outcomes}
    return Delivered(frozenset(to), frozenset(address for address, yes in to.items() if yes))
