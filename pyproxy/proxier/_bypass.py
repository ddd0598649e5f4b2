"""Leads what pods and the node send past a frontend that has an address of another machine.

A load balancer's address may be for the load balancer to answer, wherever in the cluster a
connection begins. Rules of policy routing that come before those of ``_vips`` jump over them:
``ip rule add to ADDRESS iif lo ipproto tcp dport 80 goto 99``, and so for each network of pods.
"""

import errno
import os
import socket
import struct
from collections.abc import Collection, Iterable, Mapping
from ipaddress import ip_network
from typing import NamedTuple

from pyproxy.model import Family, Frontend, Network, Proto
from pyproxy.proxier._netlink import NLM_F_CREATE, NLM_F_EXCL, Message, Netlink, attributes
from pyproxy.proxier._netlink import attribute as attr
from pyproxy.proxier._vips import (
    FRA_DPORT_RANGE,
    FRA_IP_PROTO,
    FRA_PRIORITY,
    FRA_PROTOCOL,
    PROTOCOLS,
    ROUTE,
    RTM_DELRULE,
    RTM_GETRULE,
    RTM_NEWRULE,
    RULE_PRIORITY,
)
from pyproxy.reconcile import Difference

PRIORITY, BEYOND = RULE_PRIORITY - 1, RULE_PRIORITY + 1
FR_ACT_GOTO, FR_ACT_NOP = 2, 3
FRA_DST, FRA_SRC, FRA_IIFNAME, FRA_GOTO = 1, 2, 3, 4
LOOPBACK = b"lo\0"  # the interface that what the node sends comes in by
NAMES: Mapping[int, Proto] = {number: name for name, number in PROTOCOLS.items()}


class Past(NamedTuple):
    """A frontend, and the senders who go past it; None is the node itself."""

    frontend: Frontend
    senders: Network | None


class Bypass:
    """The rules of one family that lead past frontends; ``mark`` tells that they are ours.

    The channel is lent: whoever opened it closes it.
    """

    def __init__(self, family: Family, mark: int, netlink: Netlink) -> None:
        self._version = family
        self._family = socket.AF_INET if family == 4 else socket.AF_INET6
        self._bits = 32 if family == 4 else 128
        self._mark = mark
        self._netlink = netlink
        self._there: set[Past] | None = None  # None: to be asked for
        self._has_landing = False

    def put(
        self, frontends: Collection[Frontend], pods: Iterable[Network]
    ) -> Mapping[Frontend, str]:
        """Let these frontends and no others be gone past; return why not, where it cannot be."""
        if self._there is None:
            self._there, self._has_landing = self._listed()
        own = [pod for pod in pods if pod.version == self._version]
        wanted = {Past(f, senders) for f in frontends for senders in (None, *own)}
        new, old = sorted(wanted - self._there, key=str), sorted(self._there - wanted, key=str)
        if wanted and not self._has_landing:
            self._netlink.carry_out([self._landing(RTM_NEWRULE)])
            self._has_landing = True
        codes = self._netlink.carry_out([self._rule(RTM_NEWRULE, past) for past in new])
        self._netlink.carry_out([self._rule(RTM_DELRULE, past) for past in old])
        failed = {
            past: code
            for past, code in zip(new, codes, strict=True)
            if code not in (0, errno.EEXIST)
        }
        self._there = wanted - failed.keys()
        if self._has_landing and not self._there:
            self._netlink.carry_out([self._landing(RTM_DELRULE)])
            self._has_landing = False
        return {
            past.frontend: f"cannot lead pods past {past.frontend.ip}: {os.strerror(code)}"
            for past, code in failed.items()
        }

    def clear(self) -> None:
        """Remove all rules, also those of an earlier process. Raises ``OSError``."""
        self.renew()
        self.put((), ())

    def renew(self) -> None:
        """Take note that others have changed rules: the next ``put`` looks which there are."""
        self._there = None

    def lost(self) -> list[Difference]:
        """Return the rules of ours that others have removed. Raises ``OSError``."""
        if not self._there:
            return []
        there, has_landing = self._listed()
        lost = [f"rule past {past.frontend}" for past in sorted(self._there - there, key=str)]
        if not has_landing:
            lost.append("rule that is gone past to")
        return [Difference(entry, "a rule of ours", None) for entry in lost]

    def _listed(self) -> tuple[set[Past], bool]:
        """Return what our rules lead past, and whether the rule that they jump to is there."""
        found: set[Past] = set()
        has_landing = False
        for body in self._netlink.dump(RTM_GETRULE, ROUTE.pack(self._family, *[0] * 8)):
            _family, _to, bits, _tos, _table, _res, _res, action, _flags = ROUTE.unpack_from(body)
            values = dict(attributes(body, ROUTE.size))
            if values.get(FRA_PROTOCOL) != bytes([self._mark]):
                continue
            has_landing = has_landing or action == FR_ACT_NOP
            if FRA_GOTO in values:
                port = struct.unpack_from("=H", values[FRA_DPORT_RANGE])[0]
                proto = NAMES[values[FRA_IP_PROTO][0]]
                ip = socket.inet_ntop(self._family, values[FRA_DST])
                senders = None
                if FRA_SRC in values:
                    source = socket.inet_ntop(self._family, values[FRA_SRC])
                    senders = ip_network(f"{source}/{bits}")
                found.add(Past(Frontend(ip, port, proto), senders))
        return found, has_landing

    def _rule(self, kind: int, past: Past) -> Message:
        (ip, port, proto), senders = past
        bits = 0 if senders is None else senders.prefixlen
        body = ROUTE.pack(self._family, self._bits, bits, 0, 0, 0, 0, FR_ACT_GOTO, 0)
        body += attr(FRA_PRIORITY, struct.pack("=I", PRIORITY))
        body += attr(FRA_GOTO, struct.pack("=I", BEYOND))
        body += attr(FRA_PROTOCOL, bytes([self._mark]))
        body += attr(FRA_DST, socket.inet_pton(self._family, ip))
        if senders is None:
            body += attr(FRA_IIFNAME, LOOPBACK)
        else:
            body += attr(FRA_SRC, senders.network_address.packed)
        body += attr(FRA_IP_PROTO, bytes([PROTOCOLS[proto]]))
        body += attr(FRA_DPORT_RANGE, struct.pack("=HH", port, port))
        return Message(kind, NLM_F_CREATE | NLM_F_EXCL if kind == RTM_NEWRULE else 0, body)

    def _landing(self, kind: int) -> Message:
        """Return the rule that is jumped to: it does nothing."""
        body = ROUTE.pack(self._family, 0, 0, 0, 0, 0, 0, FR_ACT_NOP, 0)
        body += attr(FRA_PRIORITY, struct.pack("=I", BEYOND))
        body += attr(FRA_PROTOCOL, bytes([self._mark]))
        return Message(kind, NLM_F_CREATE | NLM_F_EXCL if kind == RTM_NEWRULE else 0, body)
