from pyproxy.model import Address, Frontend
from pyproxy.proxier import _ipvsnl as nl
from pyproxy.proxier._ipvsdrain import drained
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
