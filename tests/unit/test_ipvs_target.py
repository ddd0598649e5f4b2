"""What the kernel is told to reach a state of mode ipvs, and when a destination may go."""

from ipaddress import ip_network

import pytest

from pyproxy.counters import Counts, Entry
from pyproxy.delta import Delta, diff
from pyproxy.model import Address, Frontend
from pyproxy.proxier import _ipvsnl as nl
from pyproxy.proxier._ipvstarget import AT_ONCE, DEFAULTS, IpvsTarget, Settings
from pyproxy.proxier._vips import RTPROT_IPVS, one_port, whole_address
from pyproxy.rules.ipvs import BOUND, Destination, LocalAddress, Server
from pyproxy.rules.nftables import PRESENT, Item
from tests.builders import owner
from tests.fakes.ip_vs import NOTHING, FakeIpvs, FakeTable, FakeVips

WEB = Frontend("10.96.0.1", 80, "TCP")
DNS = Frontend("10.96.0.1", 53, "UDP")
SIGNAL = Frontend("10.96.0.1", 5060, "SCTP")
ONE, TWO = Address("10.244.1.1", 8080), Address("10.244.1.2", 8080)
LOCAL = LocalAddress("10.96.0.1", None, owner())


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def unix(self):
        return self.now


class Node:
    """A node whose kernel is a fake, and a target that writes into it."""

    def __init__(self, **settings):
        self.ipvs, self.vips, self.table = FakeIpvs(), FakeVips(), FakeTable()
        self.clock = Clock()
        self.settings = Settings(**settings)
        self.state = {}
        self.restart()

    def restart(self):
        self.target = IpvsTarget(
            4, self.table, self.clock, lambda: (self.ipvs, self.vips), self.settings
        )

    async def want(self, state):
        """Sync; return how many messages it took."""
        before = len(self.ipvs.sent) + self.ipvs.dumps
        self.refused = await self.target.apply(diff(self.state, state))
        self.state = {key: value for key, value in state.items() if key not in self.refused}
        return len(self.ipvs.sent) + self.ipvs.dumps - before

    async def drained(self):
        """Return what has not gone yet, after the poll at which it may go."""
        await self.target.reap()
        return self.weights()

    async def adopt(self):
        self.state = dict(await self.target.adopt())
        return self.state

    def weights(self, server=WEB):
        return {a: busy.weight for a, busy in self.ipvs.destinations(server).items()}


def state(*addresses, server=WEB, weight=1, scheduler="rr"):
    return {server: Server(scheduler), LOCAL: BOUND} | {
        Destination(server, address): weight for address in addresses
    }


OTHER = Frontend("10.96.0.9", 80, "TCP")


@pytest.fixture
def node():
    return Node()


async def test_what_is_wanted_is_made(node):
    await node.want(state(ONE, TWO))
    assert node.ipvs.known == {WEB: Server("rr")}
    assert node.weights() == {ONE: 1, TWO: 1}
    assert node.vips.local == {whole_address("10.96.0.1")}


@pytest.mark.parametrize("others", [0, 500])
async def test_a_change_of_one_endpoint_is_four_messages_among_any_number_of_servers(node, others):
    rest = {}
    for number in range(others):
        rest |= state(ONE, TWO, server=Frontend("10.96.1.1", number, "TCP"))
    await node.want(rest | state(ONE))
    assert await node.want(rest | state(TWO)) == 4, "new, weight 0, is it idle?, delete"


async def test_what_is_not_as_wanted_is_found_and_left_as_it_is(node):
    wanted = state(ONE, TWO)
    await node.want(wanted)
    assert await node.target.compare(wanted) == ()
    node.vips.local.clear()
    found = await node.target.compare(wanted | state(ONE, weight=3) | {OTHER: Server("rr")})
    assert {d.entry: (d.wanted, d.held) for d in found} == {
        "local address 10.96.0.1": ("a route of ours", None),
        f"destination {ONE} of virtual server {WEB}": ("weight 3", "weight 1"),
        f"virtual server {OTHER}": ("scheduler rr", None),
    }
    assert node.vips.local == set()


async def test_a_busy_destination_takes_no_more_and_goes_when_it_is_idle(node):
    await node.want(state(ONE, TWO))
    node.ipvs.connect(Destination(WEB, ONE), active=1)
    await node.want(state(TWO))
    assert node.weights() == {ONE: 0, TWO: 1}
    node.ipvs.connect(Destination(WEB, ONE), inactive=1)
    await node.target.reap()
    assert node.weights() == {ONE: 0, TWO: 1}, "half closed may be in use"
    node.ipvs.connect(Destination(WEB, ONE))
    await node.target.reap()
    assert node.weights() == {TWO: 1}


async def test_an_idle_destination_goes_at_once(node):
    await node.want(state(ONE, TWO))
    await node.want(state(TWO))
    assert node.weights() == {TWO: 1}


async def test_no_destination_is_waited_for_longer_than_the_limit(node):
    await node.want(state(ONE, TWO))
    node.ipvs.connect(Destination(WEB, ONE), active=1)
    await node.want(state(TWO))
    node.clock.now += DEFAULTS.drain_seconds
    await node.target.reap()
    assert node.weights() == {TWO: 1}


async def test_the_limit_is_the_configured_one():
    node = Node(drain_seconds=30.0)
    await node.want(state(ONE, TWO))
    node.ipvs.connect(Destination(WEB, ONE), active=1)
    await node.want(state(TWO))
    node.clock.now += 29
    assert await node.drained() == {ONE: 0, TWO: 1}
    node.clock.now += 1
    assert await node.drained() == {TWO: 1}


async def test_a_limit_of_nothing_cuts_connections_at_once():
    node = Node(drain_seconds=0.0)
    await node.want(state(ONE, TWO))
    node.ipvs.connect(Destination(WEB, ONE), active=1)
    await node.want(state(TWO))
    assert node.weights() == {TWO: 1}


async def test_a_destination_that_returns_is_resumed_in_place(node):
    await node.want(state(ONE, TWO))
    node.ipvs.connect(Destination(WEB, ONE), active=1)
    await node.want(state(TWO))
    await node.want(state(ONE, TWO))
    assert node.ipvs.sent[-1].command == nl.SET_DEST
    await node.target.reap()
    assert node.weights() == {ONE: 1, TWO: 1}
    assert node.ipvs.destinations(WEB)[ONE].active == 1


async def test_a_server_stays_local_while_its_last_connection_lasts(node):
    await node.want(state(ONE))
    node.ipvs.connect(Destination(WEB, ONE), active=1)
    await node.want({})
    await node.target.reap()
    assert node.weights() == {ONE: 0}
    assert node.vips.local
    node.ipvs.connect(Destination(WEB, ONE), inactive=1)
    await node.target.reap()
    assert not node.ipvs.known
    assert not node.vips.local


async def test_a_server_that_returns_is_resumed_in_place(node):
    await node.want(state(ONE))
    node.ipvs.connect(Destination(WEB, ONE), active=1)
    await node.want({})
    await node.want(state(TWO, scheduler="sh"))
    assert node.ipvs.known == {WEB: Server("sh")}
    assert node.weights() == {ONE: 0, TWO: 1}


async def test_destinations_of_udp_go_at_once(node):
    await node.want(state(ONE, TWO, server=DNS))
    node.ipvs.connect(Destination(DNS, ONE), inactive=1)
    await node.want(state(TWO, server=DNS))
    assert node.weights(DNS) == {TWO: 1}


async def test_servers_of_udp_go_at_once(node):
    await node.want(state(ONE, server=DNS))
    node.ipvs.connect(Destination(DNS, ONE), inactive=1)
    await node.want({})
    assert not node.ipvs.known


async def test_very_many_that_go_are_left_to_the_next_poll(node):
    many = {}
    for number in range(AT_ONCE + 1):
        many |= state(ONE, server=Frontend("10.96.1.1", number, "TCP"))
    await node.want(many)
    await node.want({})
    assert node.ipvs.known
    await node.target.reap()
    assert not node.ipvs.known


async def test_a_restart_finds_what_is_there_and_goes_on_waiting(node):
    await node.want(state(ONE, TWO))
    node.ipvs.connect(Destination(WEB, ONE), active=1)
    await node.want(state(TWO))
    node.restart()
    assert await node.adopt() == {
        WEB: Server("rr"),
        Destination(WEB, ONE): 0,
        Destination(WEB, TWO): 1,
        LOCAL._replace(owner=None): BOUND,
    }
    await node.want(state(TWO))
    assert node.weights() == {ONE: 0, TWO: 1}
    assert node.vips.local, "another owner of the address is no reason to take it away"
    node.ipvs.connect(Destination(WEB, ONE))
    await node.target.reap()
    assert node.weights() == {TWO: 1}


async def test_a_restart_goes_on_waiting_for_a_server_that_goes_and_no_longer_than_the_limit(node):
    await node.want(state(ONE))
    node.ipvs.connect(Destination(WEB, ONE), active=1)
    await node.want({})
    node.restart()
    await node.adopt()
    await node.want({})
    assert await node.drained() == {ONE: 0}
    assert node.vips.local
    node.clock.now += DEFAULTS.drain_seconds
    await node.target.reap()
    assert not node.ipvs.known
    assert not node.vips.local


async def test_an_endpoint_that_returns_after_a_restart_is_resumed_in_place(node):
    await node.want(state(ONE, TWO))
    node.ipvs.connect(Destination(WEB, ONE), active=1)
    await node.want(state(TWO))
    node.restart()
    await node.adopt()
    await node.want(state(ONE, TWO))
    assert await node.drained() == {ONE: 1, TWO: 1}
    assert node.ipvs.destinations(WEB)[ONE].active == 1


async def test_what_waits_for_its_end_is_not_found_again_by_the_same_process(node):
    await node.want(state(ONE, TWO))
    node.ipvs.connect(Destination(WEB, ONE), active=1)
    await node.want(state(TWO))
    assert Destination(WEB, ONE) not in await node.adopt()


async def test_servers_that_others_made_are_taken_over(node):
    made_by_others(node)
    await node.want(state(ONE))
    assert node.ipvs.known == {WEB: Server("rr")}
    assert node.weights() == {ONE: 1}


async def test_servers_that_others_made_in_excluded_ranges_are_left_alone():
    node = Node(excluded=(ip_network("10.96.0.0/24"),))
    made_by_others(node)
    assert not await node.adopt()
    await node.want(state(TWO))
    told = "10.96.0.1:80/TCP: somebody else's virtual server, which ipvs.excludeCIDRs leaves alone"
    assert node.refused == {WEB: told, Destination(WEB, TWO): told}
    assert node.ipvs.known == {WEB: Server("wlc")}
    assert node.weights() == {ONE: 5}
    await node.want({})
    assert node.weights() == {ONE: 5}
    assert await node.target.differing_servers() == []


async def test_our_own_servers_in_excluded_ranges_come_and_go_as_all_others():
    node = Node(excluded=(ip_network("10.96.0.0/24"),))
    await node.want(state(ONE))
    await node.want(state(TWO, scheduler="sh"))
    assert node.ipvs.known == {WEB: Server("sh")}
    await node.want({})
    assert not node.ipvs.known


def made_by_others(node):
    node.ipvs.known[WEB] = Server("wlc")
    node.ipvs.backends[WEB] = {ONE: nl.Busy(5, 0, 0)}
    node.ipvs.foreign.add(WEB)


async def test_a_scheduler_that_the_kernel_lacks_is_told_of_the_server(node):
    await node.want(state(ONE, scheduler="best"))
    assert node.refused[WEB] == (
        "cannot make a virtual server for 10.96.0.1:80/TCP: no such scheduler"
    )
    assert Destination(WEB, ONE) in node.refused


async def test_scheduler_dh_has_no_destinations_that_drain(node):
    await node.want(state(ONE, TWO, scheduler="dh"))
    node.ipvs.connect(Destination(WEB, ONE), active=1)
    await node.want(state(TWO, scheduler="dh"))
    assert node.weights() == {TWO: 1}


async def test_the_table_masks_before_a_server_serves_and_goes_on_refusing_until_then(node):
    mask, refusal = Item("node-ports", b"key"), Item("refusals", b"key")
    await node.want({refusal: PRESENT})
    seen, apply = [], node.table.apply

    async def watched(delta):
        seen.append((set(delta.added), set(delta.removed), set(node.ipvs.servers())))
        return await apply(delta)

    node.table.apply = watched
    await node.want(state(ONE) | {mask: PRESENT})
    assert seen == [({mask}, set(), set()), (set(), {refusal}, {WEB})]


async def test_the_table_refuses_before_a_server_goes(node):
    item = Item("served", b"key")
    await node.want(state(ONE) | {item: PRESENT})
    assert node.table.items == {item: PRESENT}
    await node.want(state(ONE))
    assert not node.table.items


async def test_one_port_of_an_address_is_found_again(node):
    key = LocalAddress("203.0.113.7", Frontend("203.0.113.7", 80, "TCP"))
    await node.target.apply(Delta({key: BOUND}, {}, {}))
    assert node.vips.local == {one_port(key.only, RTPROT_IPVS)}
    assert await node.adopt() == {key: BOUND}


async def test_who_looks_finds_what_others_changed(node):
    await node.want(state(ONE, TWO) | state(ONE, server=DNS))
    assert await node.target.differing_servers() == []
    assert await node.target.differing_destinations(0, 10) == []
    node.ipvs.backends[WEB] = {ONE: nl.Busy(9, 0, 0), Address("10.9.9.9", 1): nl.Busy(1, 0, 0)}
    assert await node.target.differing_destinations(0, 10) == [
        "10.96.0.1:80/TCP -> 10.244.1.1:8080 has weight 9, not 1",
        "10.96.0.1:80/TCP -> 10.244.1.2:8080 is gone",
        "10.96.0.1:80/TCP -> 10.9.9.9:1 was added",
    ]
    node.ipvs.known = {WEB: Server("lc"), SIGNAL: Server("rr")}
    node.vips.local.clear()
    assert await node.target.differing_servers() == [
        "10.96.0.1:80/TCP has scheduler lc, not rr",
        "10.96.0.1:53/UDP is gone",
        "10.96.0.1:5060/SCTP was added",
        "10.96.0.1 is not local",
    ]


async def test_what_went_through_is_counted_for_each_server_and_destination(node):
    await node.want(state(ONE, TWO))
    busy = Counts(connections=3, packets_in=30, packets_out=20, bytes_in=3000, bytes_out=2000)
    node.ipvs.counts = {WEB: busy, Destination(WEB, ONE): busy}
    assert await node.target.counters(by_endpoint=False) == [Entry(WEB, None, busy)]
    assert await node.target.counters(by_endpoint=True) == [
        Entry(WEB, None, busy),
        Entry(Destination(WEB, ONE), ONE, busy),
        Entry(Destination(WEB, TWO), TWO, NOTHING),
    ]


async def test_after_a_failure_nothing_waits_that_still_takes_connections(node):
    await node.want(state(ONE, TWO))
    node.ipvs.connect(Destination(WEB, ONE), active=1)
    node.table.apply = None  # it cannot be called
    with pytest.raises(TypeError):
        await node.target.apply(diff(node.state, state(TWO)))
    assert (await node.adopt())[Destination(WEB, ONE)] == 1
