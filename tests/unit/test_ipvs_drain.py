from errno import EMFILE, ENOBUFS, ENOENT

import pytest

from pyproxy.config import Config
from pyproxy.model import Address, Frontend
from pyproxy.proxier import _ipvsdrain
from pyproxy.proxier import _ipvsnl as nl
from pyproxy.proxier._ipvsdrain import connections, drained, revived
from pyproxy.rules.ipvs import Destination, Server
from tests.fakes.ip_vs import FakeIpvs

WEB, IDLE, DNS = (
    Frontend("10.96.0.1", 80, "TCP"),
    Frontend("10.96.0.2", 80, "TCP"),
    Frontend("10.96.0.3", 53, "UDP"),
)
A, B, C = (Address(f"10.244.0.{number}", 8080) for number in (1, 2, 3))


def kernel():
    """Three virtual servers, each with the same destinations."""
    ipvs = FakeIpvs()
    for server in (WEB, IDLE, DNS):
        ipvs.carry_out([nl.new_server(server, Server("rr"))])
        ipvs.carry_out(
            [nl.new_destination(Destination(server, address), 1) for address in (A, B, C)]
        )
    return ipvs


def test_what_has_connections_gets_no_more_and_all_else_goes():
    ipvs = kernel()
    ipvs.connect(Destination(WEB, A), active=1)
    ipvs.connect(Destination(WEB, B), inactive=7)
    ipvs.connect(Destination(DNS, A), active=1)
    busy, requests = drained(ipvs, (WEB, IDLE, DNS))
    assert busy == {WEB}
    assert ipvs.carry_out(requests) == []
    assert ipvs.servers().keys() == {WEB}
    assert {a: found.weight for a, found in ipvs.destinations(WEB).items()} == {A: 0}


def test_looking_again_changes_nothing_until_the_last_connection_ends():
    ipvs = kernel()
    ipvs.connect(Destination(WEB, A), active=1)
    ipvs.carry_out(drained(ipvs, (WEB, IDLE, DNS))[1])
    assert drained(ipvs, (WEB,)) == ({WEB}, [])
    ipvs.connect(Destination(WEB, A), inactive=1)
    busy, requests = drained(ipvs, (WEB,))
    ipvs.carry_out(requests)
    assert (busy, ipvs.servers()) == (frozenset(), {})


ENTRIES = """\
Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData
TCP C0000232 8B8C 0A600001 0050 0AF40001 1F90 SYN_SENT         99
TCP C0000232 8B8E 0A600001 0050 0AF40001 1F90 TIME_WAIT        99
TCP C0000232 8B90 0A600001 0050 0AF40002 1F90 ESTABLISHED     899
UDP C0000232 8B92 0A600003 0035 0AF40002 1F90 UDP             299
TCP fd00:0000:0000:0000:0000:0000:0000:0001 8B8C fd00:0010:0096:0000:0000:0000:0000:0001 0050 \
fd00:0010:0244:0000:0000:0000:0000:0002 1F90 SYN_SENT         99
"""
WEB6 = Frontend("fd00:10:96::1", 80, "TCP")


def test_answers_to_later_connections_from_the_same_port_are_told_from_connections():
    assert revived(ENTRIES.splitlines()) == {
        Destination(WEB, A): 1,
        Destination(WEB6, Address("fd00:10:244::2", 8080)): 1,
    }


def test_nobody_waits_for_them(tmp_path, monkeypatch):
    (tmp_path / "ip_vs_conn").write_text(ENTRIES)
    monkeypatch.setattr(_ipvsdrain, "ENTRIES", tmp_path / "ip_vs_conn")
    ipvs = kernel()
    ipvs.connect(Destination(WEB, A), active=1, inactive=1)
    ipvs.connect(Destination(WEB, B), active=1)
    ipvs.carry_out(drained(ipvs, (WEB, IDLE, DNS))[1])
    assert ipvs.destinations(WEB).keys() == {B}


def failing(monkeypatch, code):
    def opened(_family):
        raise OSError(code, "no netlink")

    monkeypatch.setattr(_ipvsdrain, "Ipvs", opened)


async def test_a_kernel_without_virtual_servers_holds_no_connections(monkeypatch):
    failing(monkeypatch, ENOENT)
    assert await connections((4, 6), Config()) == 0


@pytest.mark.parametrize("code", [EMFILE, ENOBUFS])
async def test_connections_that_cannot_be_counted_are_not_none(code, monkeypatch):
    failing(monkeypatch, code)
    with pytest.raises(OSError, match="no netlink"):
        await connections((4, 6), Config())
