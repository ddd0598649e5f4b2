"""Looks whether the kernel holds certain items of mode ipvs, and how what it holds differs."""

from collections.abc import Iterator, Mapping

from pyproxy.model import Address, Frontend
from pyproxy.proxier._ipvslocal import Leads, vip_of
from pyproxy.proxier._ipvsnl import Ipvs
from pyproxy.proxier._vips import Vip
from pyproxy.reconcile import Difference
from pyproxy.rules.entries import server_text
from pyproxy.rules.ipvs import BOUND, Content, Destination, Key, LocalAddress, Server


def compared(ipvs: Ipvs, leads: Leads, wanted: Mapping[Key, Content]) -> tuple[Difference, ...]:
    """Return what is not there so; items of the table are passed over. Raises ``OSError``."""
    servers, listed = ipvs.servers(), leads.listed()
    asked = {key.server for key in wanted if isinstance(key, Destination)}
    weights = {server: weights_of(ipvs, server) for server in asked & servers.keys()}
    return tuple(differing(servers, weights, listed, wanted))


def differing(
    servers: Mapping[Frontend, Server],
    weights: Mapping[Frontend, Mapping[Address, int]],
    listed: set[Vip],
    wanted: Mapping[Key, Content],
) -> Iterator[Difference]:
    for key, content in wanted.items():
        held: Content | None
        match key:
            case LocalAddress(ip=ip):
                entry, held = f"local address {ip}", BOUND if vip_of(key) in listed else None
            case Destination(server=server, address=address):
                entry = f"destination {address} of virtual server {server}"
                held = weights.get(server, {}).get(address)
            case Frontend():
                entry, held = f"virtual server {key}", servers.get(key)
            case _:
                continue
        if held != content:
            yield Difference(entry, worded(content), worded(held) if held is not None else None)


def worded(content: Content) -> str:
    match content:
        case Server():
            return server_text(content)
        case int():
            return f"weight {content}"
        case _:
            return "a route of ours"


def weights_of(ipvs: Ipvs, server: Frontend) -> dict[Address, int]:
    return {address: busy.weight for address, busy in ipvs.destinations(server).items()}
