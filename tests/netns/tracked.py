"""Entries for connection tracking that no packet has made, by the thousand."""

import socket
import struct

from pyproxy.proxier._conntrack import (
    CT_NEW,
    CTA_TUPLE_IP,
    CTA_TUPLE_ORIG,
    CTA_TUPLE_PROTO,
    NUMBERS,
    Channel,
    nested,
)
from pyproxy.proxier._netlink import (
    NETLINK_NETFILTER,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    attribute,
)

CTA_TUPLE_REPLY = 2
CTA_STATUS = 3
CTA_TIMEOUT = 7
CTA_ZONE = 18
ASSURED = 2 | 4 | 8  # a reply was seen, the kernel keeps it, it is in the table
TIMEOUT_SECONDS = 600


def inject(flows):
    """Enter ``(proto, source, destination, backend)`` or, with a zone number, five of them."""
    messages = [Message(CT_NEW, NLM_F_CREATE | NLM_F_EXCL, body(*flow)) for flow in flows]
    channel = Channel(NETLINK_NETFILTER)
    try:
        assert not any(channel.carry_out(messages))
    finally:
        channel.close()


def body(proto, source, destination, backend, zone=0):
    family = socket.AF_INET6 if ":" in source.ip else socket.AF_INET
    data = struct.pack("=BBH", family, 0, 0)
    data += tuple_of(CTA_TUPLE_ORIG, family, proto, source, destination)
    data += tuple_of(CTA_TUPLE_REPLY, family, proto, backend, source)
    data += attribute(CTA_STATUS, struct.pack("!I", ASSURED))
    data += attribute(CTA_TIMEOUT, struct.pack("!I", TIMEOUT_SECONDS))
    return data + (attribute(CTA_ZONE, struct.pack("!H", zone)) if zone else b"")


def tuple_of(kind, family, proto, source, destination):
    first = 1 if family == socket.AF_INET else 3
    ips = attribute(first, socket.inet_pton(family, source.ip))
    ips += attribute(first + 1, socket.inet_pton(family, destination.ip))
    ports = attribute(1, bytes((NUMBERS[proto],)))
    ports += attribute(2, struct.pack("!H", source.port))
    ports += attribute(3, struct.pack("!H", destination.port))
    return nested(kind, nested(CTA_TUPLE_IP, ips) + nested(CTA_TUPLE_PROTO, ports))
