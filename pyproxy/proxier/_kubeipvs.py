"""The device ``kube-ipvs0``: what kube-proxy's mode ipvs leaves there, and what we show there.

For kube-proxy the addresses of the device are what makes them local. For us that is done by routes,
of which some are for one port only. With ``ipvs.bindAddresses`` the addresses are there to be seen
by tools that look for them: the routes that the kernel makes for them are removed, and packets go
where they would go without.
"""

import errno
import logging
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import closing
from ipaddress import ip_address

from pyproxy.model import Family, Network
from pyproxy.proxier import _ipvsnl as nl
from pyproxy.proxier._ipvsnl import Ipvs
from pyproxy.proxier._netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    Netlink,
    attribute,
    attributes,
    raise_errno,
)
from pyproxy.proxier._vips import (
    ROUTE,
    RT_SCOPE_HOST,
    RT_TABLE_LOCAL,
    RTA_DST,
    RTA_OIF,
    RTM_DELROUTE,
    RTN_LOCAL,
    RTPROT_IPVS,
    Vip,
    Vips,
)

DEVICE = "kube-ipvs0"
OURS = "pyproxy"  # the alias of the device while its addresses are ours
RTM_NEWLINK, RTM_DELLINK, RTM_SETLINK, RTM_GETLINK = 16, 17, 19, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
IFLA_IFNAME, IFLA_LINKINFO, IFLA_IFALIAS, IFLA_INFO_KIND = 3, 18, 20, 1
IFA_ADDRESS, IFA_LOCAL = 1, 2
IFA_F_NODAD = 0x02  # the device is down: nobody would answer
RTPROT_KERNEL = 2
LINK = struct.Struct("=BxHiII")  # struct ifinfomsg
ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg
AFS: Mapping[Family, int] = {4: socket.AF_INET, 6: socket.AF_INET6}
FAMILIES: tuple[Family, ...] = (4, 6)

log = logging.getLogger(__name__)


class Shown:
    """Leads packets for addresses here as ``Vips`` does, and shows the addresses on the device.

    Addresses that the node has elsewhere, which ``own`` returns, are not shown.
    """

    def __init__(self, vips: Vips, family: Family, own: Callable[[], Collection[str]]) -> None:
        self._vips = vips
        self._family = family
        self._own = own
        self._netlink = Netlink()
        self._shown: set[str] = set()

    def close(self) -> None:
        self._vips.close()
        self._netlink.close()

    def listed(self) -> set[Vip]:
        """Return what is led here, and show it; hide what is not. Raises ``OSError``."""
        vips = self._vips.listed()
        index = index_of_device()
        self._shown = set(listed(self._netlink, self._family, index)) if index else set()
        wanted = {vip.ip for vip in vips}
        self._hide(self._shown - wanted)
        self._show(wanted)
        return vips

    def add(self, vips: Iterable[Vip]) -> Mapping[Vip, str]:
        wanted = list(vips)
        failed = self._vips.add(wanted)
        self._show({vip.ip for vip in wanted if vip not in failed})
        return failed

    def remove(self, vips: Iterable[Vip], left: Iterable[Vip] = ()) -> Mapping[Vip, str]:
        gone, stay = list(vips), list(left)
        self._hide({vip.ip for vip in gone} - {vip.ip for vip in stay})
        return self._vips.remove(gone, stay)

    def _show(self, ips: set[str]) -> None:
        new = sorted(ips - self._shown - set(self._own()))
        index = index_of_device()
        if not new or not index:
            return
        codes = self._netlink.carry_out([new_address(self._family, index, ip) for ip in new])
        failed = {ip: code for ip, code in zip(new, codes, strict=True) if code}
        there = [ip for ip in new if failed.get(ip, errno.EEXIST) == errno.EEXIST]
        self._netlink.carry_out([delete_route(self._family, index, ip) for ip in there])
        self._shown.update(there)
        for ip in failed.keys() - self._shown:
            fields = {"address": ip, "device": DEVICE, "error": os.strerror(failed[ip])}
            log.warning("cannot show an address", extra=fields)

    def _hide(self, ips: set[str]) -> None:
        index = index_of_device()
        gone = sorted(ips & self._shown)
        if gone and index:
            self._netlink.carry_out([delete_address(self._family, index, ip) for ip in gone])
        self._shown.difference_update(gone)


def make_device() -> str | None:
    """Make the device if it is not there, and let it be ours; return why that cannot be."""
    netlink = Netlink()
    alias = attribute(IFLA_IFALIAS, OURS.encode())
    name = attribute(IFLA_IFNAME, DEVICE.encode() + b"\0")
    dummy = attribute(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, b"dummy"))
    make = Message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, LINK.pack(0, 0, 0, 0, 0) + name + dummy)
    try:
        (code,) = netlink.carry_out([make])
        index = index_of_device()
        if index:
            (code,) = netlink.carry_out(
                [Message(RTM_SETLINK, 0, LINK.pack(0, 0, index, 0, 0) + alias)]
            )
    finally:
        netlink.close()
    return f"cannot show addresses on {DEVICE}: {os.strerror(code)}" if code else None


def remove_device() -> str | None:
    """Remove the device if its addresses are ours: no packet needs them."""
    netlink = Netlink()
    code = 0
    try:
        index = index_of_device()
        if index and is_ours(netlink, index):
            (code,) = netlink.carry_out([delete_link(index)])
    finally:
        netlink.close()
    return f"cannot remove the device {DEVICE}: {os.strerror(code)}" if code else None


def remove_leftovers(family: Family, spared: tuple[Network, ...], *, ours: bool) -> None:
    """Delete the addresses of one family, their virtual servers, and the device if it has no more.

    Those in ``spared`` stay, and without ``ours`` also those that we show. Virtual servers of node
    ports stay: nothing tells them from other people's, and ours of the same place take their place.
    Raises ``OSError``.
    """
    index = index_of_device()
    if not index:
        return
    netlink = Netlink()
    try:
        addresses = {
            ip
            for ip in listed(netlink, family, index)
            if not any(ip_address(ip) in network for network in spared)
        }
        delete_servers(family, addresses)
        keep = not ours and is_ours(netlink, index)
        if keep:
            addresses -= led_here(family)
        netlink.carry_out([delete_address(family, index, ip) for ip in sorted(addresses)])
        if not keep and not any(listed(netlink, each, index) for each in FAMILIES):
            (code,) = netlink.carry_out([delete_link(index)])
            if code not in (0, errno.ENODEV):
                raise_errno(code)
    finally:
        netlink.close()


def shown_addresses(family: Family) -> frozenset[str]:
    """Return the addresses of one family on the device. Raises ``OSError``."""
    index = index_of_device()
    if not index:
        return frozenset()
    with closing(Netlink()) as netlink:
        return frozenset(listed(netlink, family, index))


def led_here(family: Family) -> set[str]:
    vips = Vips(family, None, mark=RTPROT_IPVS)
    try:
        return {vip.ip for vip in vips.listed()}
    finally:
        vips.close()


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


# --- messages -------------------------------------------------------------------------------------


def index_of_device() -> int:
    """Return the number of the interface; 0 if there is none."""
    try:
        return socket.if_nametoindex(DEVICE)
    except OSError:
        return 0


def is_ours(netlink: Netlink, index: int) -> bool:
    aliases = {
        LINK.unpack_from(body)[2]: dict(attributes(body, LINK.size)).get(IFLA_IFALIAS)
        for body in netlink.dump(RTM_GETLINK, LINK.pack(0, 0, 0, 0, 0))
    }
    return aliases.get(index, b"") == OURS.encode() + b"\0"


def listed(netlink: Netlink, family: Family, index: int) -> list[str]:
    found = []
    for body in netlink.dump(RTM_GETADDR, ADDRESS.pack(AFS[family], 0, 0, 0, index)):
        values = dict(attributes(body, ADDRESS.size))
        packed = values.get(IFA_LOCAL) or values.get(IFA_ADDRESS)
        if packed and ADDRESS.unpack_from(body)[4] == index:
            found.append(socket.inet_ntop(AFS[family], packed))
    return found


def delete_link(index: int) -> Message:
    return Message(RTM_DELLINK, 0, LINK.pack(0, 0, index, 0, 0))


def new_address(family: Family, index: int, ip: str) -> Message:
    flags = NLM_F_CREATE | NLM_F_EXCL
    return Message(RTM_NEWADDR, flags, address(family, index, ip, IFA_F_NODAD))


def delete_address(family: Family, index: int, ip: str) -> Message:
    return Message(RTM_DELADDR, 0, address(family, index, ip))


def address(family: Family, index: int, ip: str, flags: int = 0) -> bytes:
    bits = 32 if family == 4 else 128
    own = attribute(IFA_LOCAL, socket.inet_pton(AFS[family], ip))
    return ADDRESS.pack(AFS[family], bits, flags if family == 6 else 0, 0, index) + own


def delete_route(family: Family, index: int, ip: str) -> Message:
    """Return what removes the route by which the kernel makes an address of the device local."""
    bits, scope = (32, RT_SCOPE_HOST) if family == 4 else (128, 0)
    body = ROUTE.pack(AFS[family], bits, 0, 0, RT_TABLE_LOCAL, RTPROT_KERNEL, scope, RTN_LOCAL, 0)
    body += attribute(RTA_DST, socket.inet_pton(AFS[family], ip))
    return Message(RTM_DELROUTE, 0, body + attribute(RTA_OIF, struct.pack("=I", index)))
