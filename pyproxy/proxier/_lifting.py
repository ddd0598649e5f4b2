"""Lifts answers out of bridges, by a table of nf_tables in its family ``bridge``: see the rules."""

import socket
import struct
from contextlib import closing
from socket import SocketType

from pyproxy.model import Family
from pyproxy.proxier._netlink import Netlink, attributes
from pyproxy.proxier._nfnetlink import NfError, NfTables
from pyproxy.proxier._nfpack import delete_table, flush_chain, new_chain, new_table
from pyproxy.proxier._nfwhole import Whole
from pyproxy.rules import lifting
from pyproxy.rules.lifting import KEEPALIVE_SECONDS, PRIORITY

RTM_GETLINK = 18
LINK = struct.Struct("=BxHiII")  # struct ifinfomsg
IFLA_LINKINFO, IFLA_INFO_KIND = 18, 1


def whole(family: Family, name: str, mark: int, udp_seconds: int) -> Whole:
    """Return the table. ``udp_seconds`` is how long a flow of UDP may be silent."""
    rules = lifting.rules(mark, udp_seconds)
    return Whole(lifting.table(family, name), lifting.CHAINS, rules, lifting.sets(family))


def install(made: Whole) -> None:
    """Make the table, or renew its rules: what they remember of open flows stays.

    Raises ``NfError``.
    """
    table = made.table
    emptied = [new_table(table)]
    for chain in made.chains:
        emptied += [new_chain(table, chain), flush_chain(table, chain.name)]
    with closing(NfTables()) as nf_tables:
        try:
            nf_tables.commit([*emptied, *made.added()])
        except NfError:  # perhaps another version's sets are in the way
            nf_tables.commit(made.made())


def is_installed(family: Family, name: str) -> bool:
    """Say whether the table is there. Raises ``OSError`` without nf_tables."""
    nf_tables = NfTables()
    try:
        return bool(nf_tables.chains(lifting.table(family, name)))
    except NfError:
        return False
    finally:
        nf_tables.close()


def removal(family: Family, name: str) -> list[bytes]:
    """Return the messages that remove the table, whether there is one or not."""
    table = lifting.table(family, name)
    return [new_table(table), delete_table(table)]


def is_bridge(netlink: Netlink, index: int) -> bool:
    """Say whether an interface is a bridge. Raises ``OSError`` if there is none."""
    answer = netlink.fetch(RTM_GETLINK, LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0))
    info = dict(attributes(answer, LINK.size)).get(IFLA_LINKINFO, b"")
    return dict(attributes(info, 0)).get(IFLA_INFO_KIND) == b"bridge\0"


def announce(sock: SocketType) -> None:
    """Have the answers to a socket lifted, for as long as it is open. Raises ``OSError``."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, PRIORITY)
    if sock.type == socket.SOCK_STREAM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_SECONDS)
