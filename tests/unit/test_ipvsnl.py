"""The messages about virtual servers."""

import pytest

from pyproxy.counters import Counts
from pyproxy.model import Address, Frontend
from pyproxy.proxier import _ipvsnl as nl
from pyproxy.rules.ipvs import Destination, Server

WEB4 = Frontend("10.96.0.1", 80, "TCP")
WEB6 = Frontend("fd96::1", 53, "UDP")


def hexes(text):
    return bytes.fromhex(text.replace(" ", "").replace("\n", ""))


@pytest.mark.parametrize(
    ("request_", "body"),
    [
        pytest.param(
            nl.new_server(WEB4, Server("rr")),
            """5400 0100  0600 0100 0200 0000  0600 0200 0600 0000
            1400 0300 0a600001 00000000 00000000 00000000  0600 0400 0050 0000
            0700 0600 727200 00  0c00 0700 20000000 ffffffff
            0800 0800 00000000  0800 0900 ffffffff""",
            id="a server",
        ),
        pytest.param(
            nl.set_server(WEB6, Server("wlc", 30)),
            """5400 0100  0600 0100 0a00 0000  0600 0200 1100 0000
            1400 0300 fd960000 00000000 00000000 00000001  0600 0400 0035 0000
            0800 0600 776c6300  0c00 0700 21000000 ffffffff
            0800 0800 1e000000  0800 0900 80000000""",
            id="a server of IPv6 that remembers its clients",
        ),
        pytest.param(
            nl.new_server(WEB4, Server("mh")),
            """5400 0100  0600 0100 0200 0000  0600 0200 0600 0000
            1400 0300 0a600001 00000000 00000000 00000000  0600 0400 0050 0000
            0700 0600 6d6800 00  0c00 0700 38000000 ffffffff
            0800 0800 00000000  0800 0900 ffffffff""",
            id="a server whose clients go elsewhere while a destination drains",
        ),
        pytest.param(
            nl.new_destination(Destination(WEB4, Address("10.244.1.1", 8080)), 3),
            """3000 0100  0600 0100 0200 0000  0600 0200 0600 0000
            1400 0300 0a600001 00000000 00000000 00000000  0600 0400 0050 0000
            4000 0200  1400 0100 0af40101 00000000 00000000 00000000  0600 0200 1f90 0000
            0800 0300 00000000  0800 0400 03000000  0800 0500 00000000  0800 0600 00000000""",
            id="a destination",
        ),
        pytest.param(
            nl.delete_destination(Destination(WEB4, Address("10.244.1.1", 8080))),
            """3000 0100  0600 0100 0200 0000  0600 0200 0600 0000
            1400 0300 0a600001 00000000 00000000 00000000  0600 0400 0050 0000
            2000 0200  1400 0100 0af40101 00000000 00000000 00000000  0600 0200 1f90 0000""",
            id="a destination that goes",
        ),
    ],
)
def test_messages_are_what_ip_vs_reads(request_, body):
    assert request_.body == hexes(body)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(
            {
                nl.STATS: bytes(4),
                nl.STATS64: hexes(
                    """0c00 0100 0300000000000000  0c00 0200 1e00000001000000
                    0c00 0300 1400000000000000  0c00 0400 b80b000000000000
                    0c00 0500 d007000000000000  0c00 0600 0000000000000000"""
                ),
            },
            id="of 64 bits",
        ),
        pytest.param(
            {
                nl.STATS: hexes(
                    """0800 0100 03000000  0800 0200 1e000000  0800 0300 14000000
                    0c00 0400 b80b000000000000  0c00 0500 d007000000000000  0800 0600 00000000"""
                )
            },
            id="of 32 bits, of old kernels",
        ),
    ],
)
def test_counters_are_connections_packets_and_bytes_of_both_ways(values):
    many = 1 << 32 if nl.STATS64 in values else 0
    assert nl.counts_of(values) == Counts(
        connections=3, packets_in=30 + many, packets_out=20, bytes_in=3000, bytes_out=2000
    )
