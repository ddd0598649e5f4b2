"""Makes Service addresses local to this node: ``ip route add local ADDRESS dev lo proto 98``.

The routing protocol number marks the routes as ours, so that a restart finds what an earlier
process left. They carry the node's address as their preferred source: without it, the node's
own connections to a Service would come from the Service's address.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterable, Mapping

from pyproxy.model import Family
from pyproxy.proxier._netlink import NLM_F_CREATE, NLM_F_EXCL, Message, Netlink, attributes
from pyproxy.proxier._netlink import attribute as attr

RTM_NEWROUTE = 24
RTM_DELROUTE = 25
RTM_GETROUTE = 26
RTN_LOCAL = 2
RT_SCOPE_HOST = 254
RT_TABLE_LOCAL = 255
RTPROT_PYPROXY = 98
RTA_DST = 1
RTA_OIF = 4
RTA_PREFSRC = 7
ROUTE = struct.Struct("=BBBBBBBBI")


class Vips:
    """The local routes of one family that are ours."""

    def __init__(self, family: Family, source: str | None) -> None:
        self._family = socket.AF_INET if family == 4 else socket.AF_INET6
        self._bits = 32 if family == 4 else 128
        self._source = source
        self._loopback = socket.if_nametoindex("lo")
        self._netlink = Netlink()

    def close(self) -> None:
        self._netlink.close()

    def listed(self) -> set[str]:
        """Return the addresses that our routes make local, whichever process made them."""
        query = self._route(0, protocol=RTPROT_PYPROXY)
        found: set[str] = set()
        for body in self._netlink.dump(RTM_GETROUTE, query):
            _family, bits, _src, _tos, table, protocol, *_rest = ROUTE.unpack_from(body)
            if (bits, table, protocol) == (self._bits, RT_TABLE_LOCAL, RTPROT_PYPROXY):
                found.update(
                    socket.inet_ntop(self._family, value)
                    for kind, value in attributes(body, ROUTE.size)
                    if kind == RTA_DST
                )
        return found

    def add(self, ips: Iterable[str]) -> Mapping[str, str]:
        """Make addresses local; return why not, for each that cannot be.

        An address that an interface of the node has is local already, and stays its own.
        """
        wanted = list(ips)
        failed = self._carry_out(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, wanted, self._source)
        invalid = [ip for ip, code in failed.items() if code == errno.EINVAL]
        if invalid and self._source is not None:  # the node does not have the address it should
            for ip in invalid:
                del failed[ip]
            failed |= self._carry_out(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, invalid, None)
        return {
            ip: f"cannot make {ip} local to this node: {os.strerror(code)}"
            for ip, code in failed.items()
            if code != errno.EEXIST
        }

    def remove(self, ips: Iterable[str]) -> Mapping[str, str]:
        """Remove our routes to these addresses; return why not, for each that is still there."""
        failed = self._carry_out(RTM_DELROUTE, 0, list(ips), None)
        return {
            ip: f"cannot remove the route to {ip}: {os.strerror(code)}"
            for ip, code in failed.items()
            if code != errno.ESRCH
        }

    def _carry_out(
        self, kind: int, flags: int, ips: list[str], source: str | None
    ) -> dict[str, int]:
        messages = [Message(kind, flags, self._body(ip, source)) for ip in ips]
        codes = self._netlink.carry_out(messages)
        return {ip: code for ip, code in zip(ips, codes, strict=True) if code}

    def _body(self, ip: str, source: str | None) -> bytes:
        body = self._route(self._bits, protocol=RTPROT_PYPROXY)
        body += attr(RTA_DST, socket.inet_pton(self._family, ip))
        body += attr(RTA_OIF, struct.pack("=I", self._loopback))
        if source is not None:
            body += attr(RTA_PREFSRC, socket.inet_pton(self._family, source))
        return body

    def _route(self, bits: int, *, protocol: int) -> bytes:
        scope = RT_SCOPE_HOST if self._family == socket.AF_INET else 0
        return ROUTE.pack(
            self._family, bits, 0, 0, RT_TABLE_LOCAL, protocol, scope if bits else 0,
            RTN_LOCAL if bits else 0, 0,
        )  # fmt: skip
