"""Removes what kube-proxy's mode ipvs leaves: the addresses of its device, and what serves them."""

import errno
import socket
import struct

from pyproxy.model import Family
from pyproxy.proxier import _ipvsnl as nl
from pyproxy.proxier._ipvsnl import Ipvs
from pyproxy.proxier._netlink import Message, Netlink, attribute, attributes, raise_errno

DEVICE = "kube-ipvs0"
RTM_DELLINK, RTM_DELADDR, RTM_GETADDR = 17, 21, 22
IFA_ADDRESS, IFA_LOCAL = 1, 2
LINK = struct.Struct("=BxHiII")  # struct ifinfomsg
ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg
AFS = {4: socket.AF_INET, 6: socket.AF_INET6}


def remove_leftovers(family: Family) -> None:
    """Delete the addresses of one family, their virtual servers, and the device if it has no more.

    Virtual servers of node ports stay: nothing tells them from other people's, and ours of the
    same place take their place. Raises ``OSError``.
    """
    try:
        index = socket.if_nametoindex(DEVICE)
    except OSError:
        return
    netlink = Netlink()
    try:
        addresses = listed(netlink, family, index)
        delete_servers(family, set(addresses))
        netlink.carry_out([address_message(family, index, ip) for ip in addresses])
        if not any(listed(netlink, each, index) for each in (4, 6)):
            (code,) = netlink.carry_out([Message(RTM_DELLINK, 0, LINK.pack(0, 0, index, 0, 0))])
            if code not in (0, errno.ENODEV):
                raise_errno(code)
    finally:
        netlink.close()


def listed(netlink: Netlink, family: int, index: int) -> list[str]:
    found = []
    for body in netlink.dump(RTM_GETADDR, ADDRESS.pack(AFS[family], 0, 0, 0, index)):
        values = dict(attributes(body, ADDRESS.size))
        packed = values.get(IFA_LOCAL) or values.get(IFA_ADDRESS)
        if packed and ADDRESS.unpack_from(body)[4] == index:
            found.append(socket.inet_ntop(AFS[family], packed))
    return found


def delete_servers(family: Family, addresses: set[str]) -> None:
    try:
        ipvs = Ipvs(family)
    except OSError:
        return  # none can be left
    try:
        others = ipvs.servers(ours=False)
        ipvs.carry_out([nl.delete_server(server) for server in others if server.ip in addresses])
    finally:
        ipvs.close()


def address_message(family: Family, index: int, ip: str) -> Message:
    bits = 32 if family == 4 else 128
    body = ADDRESS.pack(AFS[family], bits, 0, 0, index)
    return Message(RTM_DELADDR, 0, body + attribute(IFA_LOCAL, socket.inet_pton(AFS[family], ip)))
