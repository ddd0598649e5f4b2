"""Lets virtual servers end that another mode has taken over from, with their last connections.

Rules of NAT come before virtual servers, so these get no new connections. Those that they have need
the server, the destination and the address that leads here until they end. Datagrams have no end:
their flows are forgotten, and what comes next meets the new rules.
"""

import asyncio
import errno
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from ipaddress import ip_address
from pathlib import Path

from pyproxy.config import Config, is_beside, networks_of
from pyproxy.model import Address, Family, Frontend, Network
from pyproxy.proxier import _ipvsnl as nl
from pyproxy.proxier._conntrack import Conntrack
from pyproxy.proxier._ipvsnl import Busy, Ipvs, Request
from pyproxy.proxier._kubeipvs import shown_addresses
from pyproxy.proxier._nfnetlink import NfError
from pyproxy.proxier._nftarget import delete_tables
from pyproxy.proxier._vips import RTPROT_IPVS, Vips
from pyproxy.rules import ipvs_base
from pyproxy.rules.ipvs import Destination

NO_SERVERS: frozenset[Frontend] = frozenset()
ENTRIES = Path("/proc/thread-self/net/ip_vs_conn")
FEW = 10_000  # connections, so that it is worth while to look whether they are any


async def connections(families: Iterable[Family], config: Config) -> int:
    """Return how many connections the virtual servers have that would be waited for.

    Raises ``OSError``.
    """
    found = 0
    for family in families if config.ipvs.drain_timeout_seconds else ():
        spared = networks_of(config.ipvs.exclude_cidrs, family)
        found += await asyncio.to_thread(active, family, spared)
    return found


async def waiting(families: Iterable[Family], config: Config) -> Mapping[Family, int]:
    """Have virtual servers end; return how many of each family cannot yet, where there are any.

    With ``ipvs.drainTimeout`` 0, none is waited for.
    """
    if not config.ipvs.drain_timeout_seconds or is_beside(config):
        return {}
    found: dict[Family, int] = {}
    for family in families:
        spared = networks_of(config.ipvs.exclude_cidrs, family)
        with suppress(NfError, OSError):  # the clean-up says why
            if servers := await asyncio.to_thread(in_use, family, spared):
                found[family] = len(servers)
    return found


def in_use(family: Family, spared: tuple[Network, ...]) -> frozenset[Frontend]:
    """Have the virtual servers end that are ours or kube-proxy's; return those that cannot yet.

    The table beside them goes at once: what it knows is old from now on. Raises ``OSError`` and
    ``NfError``.
    """
    ipvs = opened(family)
    if ipvs is None:
        return NO_SERVERS
    with closing(ipvs):
        servers = [*ipvs.servers(), *those_of_kube_proxy(ipvs, family, spared)]
        if not servers:
            return NO_SERVERS
        delete_tables([ipvs_base.table(family)])
        busy, requests = drained(ipvs, servers)
        ipvs.carry_out(requests)
    lead_away_all_but(family, {server.ip for server in busy})
    forget(family, (server for server in servers if server.proto == "UDP"))
    return busy


def active(family: Family, spared: tuple[Network, ...]) -> int:
    """Return how many connections there are through our virtual servers and kube-proxy's.

    Raises ``OSError``.
    """
    ipvs = opened(family)
    if ipvs is None:
        return 0
    with closing(ipvs):
        servers = [*ipvs.servers(), *those_of_kube_proxy(ipvs, family, spared)]
        return sum(busy.active for there in held(ipvs, servers).values() for busy in there.values())


def opened(family: Family) -> Ipvs | None:
    """Return what asks the kernel; None if it has no virtual servers. Raises ``OSError``."""
    try:
        return Ipvs(family)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


def those_of_kube_proxy(
    ipvs: Ipvs, family: Family, spared: tuple[Network, ...]
) -> Iterable[Frontend]:
    """Return the virtual servers at addresses of its device."""
    addresses = shown_addresses(family)
    for server in ipvs.servers(ours=False):
        ip = ip_address(server.ip)
        if server.ip in addresses and not any(ip in network for network in spared):
            yield server


def drained(
    ipvs: Ipvs, servers: Iterable[Frontend]
) -> tuple[frozenset[Frontend], Sequence[Request]]:
    """Return which servers have connections, and what takes away all that have none."""
    busy: set[Frontend] = set()
    requests: list[Request] = []
    for server, there in held(ipvs, servers).items():
        used = {address for address, found in there.items() if not found.is_idle(doomed=True)}
        if not used:
            requests.append(nl.delete_server(server))
            continue
        busy.add(server)
        for address, found in there.items():
            destination = Destination(server, address)
            if address not in used:
                requests.append(nl.delete_destination(destination))
            elif found.weight:
                requests.append(nl.set_destination(destination, 0))
    return frozenset(busy), requests


def held(ipvs: Ipvs, servers: Iterable[Frontend]) -> dict[Frontend, dict[Address, Busy]]:
    """Return the destinations of servers, of UDP none, and what connections they really have."""
    found = {
        server: {} if server.proto == "UDP" else ipvs.destinations(server) for server in servers
    }
    if not 0 < sum(busy.active for there in found.values() for busy in there.values()) < FEW:
        return found
    with suppress(OSError), ENTRIES.open(encoding="ascii") as lines:
        for destination, count in revived(lines).items():
            there = found.get(destination.server, {})
            if busy := there.get(destination.address):
                there[destination.address] = busy._replace(active=max(busy.active - count, 0))
    return found


def revived(lines: Iterable[str]) -> Counter[Destination]:
    """Return what the kernel's table of connections counts as active, and has ended.

    An entry stays for two minutes after its end. If the client comes to the same backend from the
    same port meanwhile, by NAT, IPVS takes the answer for one to its entry, and that is in SYN_SENT
    until two minutes after the last answer. Nothing gets there through a virtual server.
    Linux: ip_vs_proto_tcp.c, tcp_states; ip_vs_conn.c, ip_vs_conn_seq_show.
    """
    found: Counter[Destination] = Counter()
    for line in lines:
        match line.split():
            case ["TCP", _, _, vip, vport, ip, port, "SYN_SENT", *_]:
                server = Frontend(printed(vip), int(vport, 16), "TCP")
                found[Destination(server, Address(printed(ip), int(port, 16)))] += 1
            case _:
                pass
    return found


def printed(ip: str) -> str:
    return str(ip_address(ip if ":" in ip else int(ip, 16)))


def lead_away_all_but(family: Family, needed: Collection[str]) -> None:
    """Remove our routes to other addresses: their undefined ports are the node's own there."""
    with closing(Vips(family, None, mark=RTPROT_IPVS)) as vips:
        listed = vips.listed()
        stay = {vip for vip in listed if vip.ip in needed}
        vips.remove(listed - stay, stay)


def forget(family: Family, frontends: Iterable[Frontend]) -> None:
    """Have connection tracking forget flows; that it cannot is no reason to keep the servers."""
    with suppress(OSError):
        table = Conntrack(family)
        table.delete(table.flows(frontends))
