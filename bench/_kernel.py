"""The other side of the proxy: when an endpoint is in the kernel, and what packets cost there."""

import os
import socket
import struct
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from time import perf_counter

from bench._cluster import NODE_IP, PORT
from pyproxy.model import Frontend
from pyproxy.proxier._conntrack import Conntrack
from pyproxy.proxier._netlink import NETLINK_NETFILTER, SO_RCVBUFFORCE, SOL_NETLINK
from pyproxy.proxier._nfform import plain_attributes
from pyproxy.proxier._nfnetlink import NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES, NfTables
from pyproxy.proxier._nfpack import NEWSETELEM, SUBSYSTEM
from pyproxy.proxier._nfread import GENERIC, answers, elements_in
from pyproxy.rules.nft import Table

TABLE = Table(4, "pyproxy")
BUFFER = 64 << 20
FLUSH_CONNTRACK = struct.pack("=IHHII", 20, 1 << 8 | 2, 0x5, 1, 0) + struct.pack("=BBH", 0, 0, 0)
FIRST_PORT = 1024
PACKETS = 20_000
ROUNDS = 7


class Arrivals:
    """Hears of every endpoint that gets into the kernel, and of the moment."""

    def __init__(self, heard: Callable[[str, float], None]) -> None:
        self._heard = heard
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._socket.setblocking(False)
        self._socket.bind((0, 0))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def receive(self) -> None:
        while True:
            try:
                data = self._socket.recv(1 << 17)
            except BlockingIOError:
                return
            now = perf_counter()
            for answer in answers(data):
                if answer.kind == SUBSYSTEM | NEWSETELEM:
                    for ip in endpoints_in(answer.payload):
                        self._heard(ip, now)


def endpoints_in(payload: bytes) -> list[str]:
    """Return the endpoints among the elements that a message tells of."""
    parts = dict(plain_attributes(payload[GENERIC:]))
    if parts.get(2) != b"endpoints\0":
        return []
    data = [element.data for element in elements_in(parts[3])]
    return [str(IPv4Address(value[:4])) for value in data if isinstance(value, bytes)]


def listener_pids() -> list[int]:
    """Return processes, one for each namespace, where somebody listens to all nf_tables changes.

    The kernel looks whether there is a listener in any namespace. Then it writes each element down
    for it, so that to load 100,000 takes two seconds longer, for everybody on the machine.
    """
    found: dict[str, int] = {}
    for path in Path("/proc").glob("[0-9]*/net/netlink"):
        pid = int(path.parts[2])
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/net")
            if namespace not in found and any(map(is_listener, path.read_text().splitlines()[1:])):
                found[namespace] = pid
        except OSError:  # it has ended, or is somebody else's
            continue
    return list(found.values())


def is_listener(line: str) -> bool:
    _sock, protocol, _port, groups, *_ = line.split()
    return int(protocol) == NETLINK_NETFILTER and bool(int(groups, 16) >> NFNLGRP_NFTABLES - 1 & 1)


def endpoint_count() -> int:
    nf = NfTables()
    try:
        return len(nf.elements(TABLE, "endpoints"))
    finally:
        nf.close()


def generation() -> int:
    nf = NfTables()
    try:
        return nf.generation().id
    finally:
        nf.close()


def first_packet_us(cluster_ips: Sequence[str]) -> float:
    """Return what the first packet of a TCP connection costs, from the node itself.

    Each packet is of a new connection. Connection tracking is emptied before each round, and the
    shortest round counts: others who use the machine only ever add.
    """
    packets = [syn(cluster_ips[n * 7 % len(cluster_ips)], n) for n in range(PACKETS)]
    seconds = []
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for _ in range(ROUNDS):
            flush_conntrack()
            started_at = perf_counter()
            for packet, destination in packets:
                raw.sendto(packet, destination)
            seconds.append(perf_counter() - started_at)
    assert is_translated(cluster_ips[0]), "packets were given an endpoint"
    flush_conntrack()
    return min(seconds) / PACKETS * 1e6


def syn(cluster_ip: str, number: int) -> tuple[bytes, tuple[str, int]]:
    """Return a packet that opens a connection from a port of its own, and where to send it.

    The kernel adds the checksum of the IP header. That of TCP has to be right for connection
    tracking to look at the packet.
    """
    source, destination = socket.inet_aton(NODE_IP), socket.inet_aton(cluster_ip)
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40, 0, 0, 64, 6, 0, source, destination)
    tcp = struct.pack(">HHIIBBH", FIRST_PORT + number, PORT, 1, 0, 5 << 4, 0x02, 65535)
    words = sum(struct.unpack(">18H", source + destination + bytes((0, 6, 0, 20)) + tcp + bytes(8)))
    words = (words & 0xFFFF) + (words >> 16)
    return ip + tcp + struct.pack(">HH", ~(words + (words >> 16)) & 0xFFFF, 0), (cluster_ip, 0)


def flush_conntrack() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as netlink:
        netlink.bind((0, 0))
        netlink.send(FLUSH_CONNTRACK)
        netlink.recv(4096)


def is_translated(cluster_ip: str) -> bool:
    flows = list(Conntrack(4).flows([Frontend(cluster_ip, PORT, "TCP")]))
    return bool(flows) and all(flow.backend.ip != cluster_ip for flow in flows)
