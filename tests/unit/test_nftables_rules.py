"""What one owner has in table ``pyproxy``, and how little of it a change touches."""

import re
from functools import partial
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from pyproxy.balancer import BY_CLIENT, BY_CONNECTIONS, SLOTS_EACH, turn_of
from pyproxy.delta import diff
from pyproxy.model import Address, Backend, Pool, ServicePortName
from pyproxy.plan import plan_port
from pyproxy.rules.nft import Verdict, packed_slot, unpacked_key
from pyproxy.rules.nft_affinity import (
    AFFINITY_SET,
    CHAIN,
    LONGEST_TURN,
    clients_of,
    endpoint_identity,
    identity,
    turn,
)
from pyproxy.rules.nftables import Item, Ruleset, compile_owner, frontend_key, guarded
from tests.builders import SITE, VIP, address, endpoint, owner, remote, service_port

RULESET = Ruleset(4, pods=ip_network("10.244.0.0/16"))
ENDPOINT = ("ipv4_addr", "inet_service")
FRONT = ("ipv4_addr", "inet_proto", "inet_service")
is_word = re.compile("[a-zA-Z][-a-zA-Z0-9/_.]*").fullmatch  # nft: identifiers
LONGEST_CHAIN = 255  # NFT_NAME_MAXLEN, less the byte that ends it


def items(*endpoints, before=None, ruleset=RULESET, **fields):
    """The items of a Service port with these endpoints, grown out of those before."""
    found = sorted(endpoints, key=lambda e: str(e.address))
    port = plan_port(service_port(**fields), found, SITE)
    return compile_owner(ruleset, port, before or {})


def slots(found, container="endpoints"):
    """The last part of the address in each slot of the cluster IP, in order."""
    key = frontend_key(plan_port(service_port(), (), SITE).routes[0].frontend)
    numbered = []
    while (data := found.get(Item(container, key + packed_slot(len(numbered))))) is not None:
        ip, _port = unpacked_key(ENDPOINT, data)
        numbered.append(int(ip.rsplit(".", 1)[1]))
    return numbered


def entrances(found):
    """Where each frontend's connections go, or what refuses them."""
    return {
        (item.container, unpacked_key(FRONT if len(item.key) == 12 else FRONT[1:], item.key)): (
            content.data
        )
        for item, content in found.items()
        if item.container in ("service-ips", "node-ports", "no-endpoints", "no-endpoint-node-ports")
    }


def names(found, container=CHAIN):
    return {item.key for item in found if item.container == container}


# --- slots ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "slots_after"),
    [
        pytest.param([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4], id="one more is the last"),
        pytest.param([2, 3], [1, 2, 3], [2, 3, 1], id="also if its address is the first"),
        pytest.param([1, 2, 3, 4], [1, 2, 3], [1, 2, 3], id="the last goes, nobody moves"),
        pytest.param([1, 2, 3, 4], [2, 3, 4], [4, 2, 3], id="the first goes, the last moves"),
        pytest.param([1, 2, 3, 4], [1, 3, 4], [1, 4, 3], id="one in the middle goes"),
        pytest.param([1, 2], [1, 3], [1, 3], id="one is replaced in its place"),
        pytest.param([1], [2], [2], id="the only one is replaced"),
        pytest.param([1, 2], [], [], id="all go"),
        pytest.param([], [2, 1], [1, 2], id="the first of all are in order"),
    ],
)
def test_endpoints_keep_their_slots(before, after, slots_after):
    old = items(*map(endpoint, before))
    assert slots(items(*map(endpoint, after), before=old)) == slots_after


@given(st.sets(st.integers(1, 40), min_size=1), st.integers(1, 40))
def test_one_endpoint_that_comes_or_goes_moves_at_most_one_other(numbers, other):
    old = items(*map(endpoint, numbers))
    new = items(*map(endpoint, numbers ^ {other}), before=old)
    was, is_now = slots(old), slots(new)
    moved = [n for n in numbers - {other} if was.index(n) != is_now.index(n)]
    assert sorted(is_now) == sorted(numbers ^ {other})
    assert len(moved) <= 1
    assert set(moved) <= {was[-1]}, "only the last has lost its slot"


@given(st.lists(st.sets(st.integers(1, 12)), min_size=1, max_size=6))
def test_whatever_came_before_the_slots_hold_the_endpoints(history):
    found = {}
    for numbers in history:
        found = items(*map(endpoint, numbers), before=found)
    assert sorted(slots(found)) == sorted(history[-1])


def test_one_endpoint_of_a_hundred_is_a_handful_of_changes():
    """For each frontend: the element that says how many there are, and a slot; then hairpin."""
    fields = {"node_port": 30080, "load_balancer_ips": ("198.18.0.1",)}
    old = items(*map(endpoint, range(1, 101)), **fields)
    more = diff(old, items(*map(endpoint, range(1, 102)), before=old, **fields))
    fewer = diff(old, items(*map(endpoint, range(2, 101)), before=old, **fields))
    for delta in (more, fewer):
        touched = {*delta.added, *delta.changed, *delta.removed}
        elements = [item for item in touched if item.container != CHAIN]
        assert len(elements) <= 3 * 3 + 1
        assert all("/" not in item.key for item in touched - {*elements}), "chains are shared"


@pytest.mark.parametrize(
    ("scheduler", "chain"),
    [
        pytest.param(None, "pick-2", id="at random unless told otherwise"),
        *(
            pytest.param(name, "pick-2", id=f"{name}: connections cannot be counted")
            for name in sorted(BY_CONNECTIONS)
        ),
        pytest.param("rr", "pick-rr-2", id="in turn"),
        pytest.param("wrr", "pick-rr-2", id="in turn, with weights"),
        *(
            pytest.param(name, "pick-sh-2", id=f"{name}: by the source")
            for name in sorted(BY_CLIENT)
        ),
    ],
)
def test_a_scheduler_chooses_the_chain(scheduler, chain):
    found = items(endpoint(1), endpoint(2), scheduler=scheduler)
    assert entrances(found) == {("service-ips", (VIP, "TCP", 80)): Verdict("goto", chain)}
    assert names(found) == {chain}


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "slots_of_each"),
    [
        pytest.param({1: 3, 2: 1}, [1, 1, 1, 2], id="a slot for each unit of weight"),
        pytest.param({1: 100, 2: 50}, [1, 1, 2], id="as few as the ratio needs"),
        pytest.param({1: 0, 2: 3}, [2], id="none for weight zero, and one is as good as three"),
        pytest.param({1: 7, 2: 7}, [1, 2], id="equal weights are no weights"),
        pytest.param({1: 0, 2: 0}, [], id="all zero is nobody"),
    ],
)
def test_weights_are_numbers_of_slots(weights, slots_of_each):
    rules = [("ip", address(number).ip, weight) for number, weight in weights.items()]
    assert sorted(slots(items(*map(endpoint, weights), weights=rules))) == slots_of_each


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=300))
def test_a_pool_has_at_most_256_slots_or_16_for_each_backend(weights):
    backends = [
        Backend(Address(f"10.1.{n // 250}.{n % 250}", 80), w) for n, w in enumerate(weights)
    ]
    found = turn(Pool(tuple(backends)))
    assert len(found) <= max(LONGEST_TURN, SLOTS_EACH * len(weights))
    assert set(found) == {b.address for b in backends}, "nobody is left out"
    if sum(weights) <= LONGEST_TURN:
        assert sorted(found) == sorted(turn_of(Pool(tuple(backends))))


# --- traffic policies and refusals ----------------------------------------------------------------

GOTO = partial(Verdict, "goto")
LB = {"load_balancer_ips": ("198.18.0.1",), "external_local": True}


@pytest.mark.parametrize(
    ("endpoints", "fields", "expected"),
    [
        pytest.param([], {}, ("no-endpoints", GOTO("refuse")), id="no endpoint refuses"),
        pytest.param(
            [remote(1)], {"internal_local": True}, ("no-endpoints", Verdict("drop")),
            id="policy Local and endpoints elsewhere only is silent",
        ),
        pytest.param(
            [endpoint(1)], {}, ("service-ips", GOTO("pick-1")), id="an endpoint gets it",
        ),
    ],
)  # fmt: skip
def test_a_cluster_ip_is_in_one_map_only(endpoints, fields, expected):
    container, verdict = expected
    found = entrances(items(*endpoints, **fields))
    assert found == {(container, (VIP, "TCP", 80)): verdict}


@pytest.mark.parametrize(
    ("endpoints", "chain"),
    [
        pytest.param([endpoint(1), remote(2)], "local-pick-2-pick-local-1", id="of both kinds"),
        pytest.param([endpoint(1), endpoint(2)], "local-pick-2-pick-2", id="all are here"),
        pytest.param([remote(1), remote(2)], "local-pick-2-nothing", id="none is here"),
    ],
)
def test_strangers_reach_local_endpoints_under_policy_local(endpoints, chain):
    found = items(*endpoints, **LB)
    where = ("service-ips", ("198.18.0.1", "TCP", 80))
    assert entrances(found)[where] == GOTO(chain)
    used = {s.map for rules in found.values() if isinstance(rules, tuple)
            for rule in rules for s in rule.statements if hasattr(s, "map")}  # fmt: skip
    assert used <= {item.container for item in found}, "each map that is picked from has slots"


def test_a_pool_of_policy_local_and_one_of_all_are_two_chains_with_affinity():
    fields = {"internal_local": True, "node_port": 30080, "affinity_seconds": 600}
    found = items(endpoint(1), remote(2), **fields)
    name = identity(owner())
    assert entrances(found) == {
        ("service-ips", (VIP, "TCP", 80)): GOTO(f"local-{name}"),
        ("node-ports", ("TCP", 30080)): GOTO(f"external-{name}"),
    }
    pools = {f"local-{name}", f"service-{name}", f"external-{name}"}
    assert pools <= names(found)
    assert len(found[Item(CHAIN, f"service-{name}", owner())]) == 3, "two known clients, a pick"
    assert len(found[Item(CHAIN, f"local-{name}", owner())]) == 2


def test_affinity_has_a_set_of_clients_for_each_endpoint_and_no_slots():
    found = items(endpoint(1), endpoint(2), affinity_seconds=600)
    of_endpoints = [endpoint_identity(owner(), address(number)) for number in (1, 2)]
    assert names(found, AFFINITY_SET) == {clients_of(name, 600) for name in of_endpoints}
    assert slots(found) == []
    longer = items(endpoint(1), affinity_seconds=601)
    assert not names(found, AFFINITY_SET) & names(longer, AFFINITY_SET), "another time-out"


# --- source ranges --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "intervals"),
    [
        pytest.param(["10.0.0.0/8"], ["10.0.0.0-10.255.255.255"], id="one"),
        pytest.param(
            ["10.1.0.0/16", "10.0.0.0/8"], ["10.0.0.0-10.255.255.255"], id="one in the other"
        ),
        pytest.param(["10.0.0.0/9", "10.128.0.0/9"], ["10.0.0.0-10.255.255.255"], id="halves"),
        pytest.param(["10.0.0.0/8", "10.0.0.0/8"], ["10.0.0.0-10.255.255.255"], id="twice"),
        pytest.param(
            ["192.0.2.7/32", "10.0.0.0/24"], ["10.0.0.0-10.0.0.255", "192.0.2.7-192.0.2.7"],
            id="apart",
        ),
    ],
)  # fmt: skip
def test_source_ranges_that_overlap_are_one_interval(sources, intervals):
    route = plan_port(service_port(), (), SITE).routes[0]
    key = frontend_key(route.frontend)
    found = guarded(key, structs.replace(route, allowed_sources=tuple(map(ip_network, sources))))
    allowed = [
        f"{first}-{last}"
        for item, element in sorted(found.items())
        if item.container == "allowed"
        for first, last in [
            (unpacked_key((*FRONT, "ipv4_addr"), k)[3] for k in (element.key, element.key_end))
        ]
    ]
    assert (Item("guarded", key) in found, allowed) == (True, intervals)


# --- names ----------------------------------------------------------------------------------------

labels = st.text("ab-", min_size=1, max_size=3) | st.sampled_from(["a" * 63, "a" * 62 + "b"])
owners = st.builds(
    ServicePortName, labels, labels, labels | st.just(""), st.sampled_from(["TCP", "UDP", "SCTP"])
)


@given(st.lists(owners, min_size=2, max_size=2, unique=True))
def test_distinct_owners_have_distinct_names(two):
    one, other = two
    assert identity(one) != identity(other)
    assert endpoint_identity(one, address(1)) != endpoint_identity(other, address(1))
    assert endpoint_identity(one, address(1)) != endpoint_identity(one, address(2))
    assert endpoint_identity(one, address(1, 80)) != endpoint_identity(one, address(1, 8080))


@given(owners, st.sampled_from(["10.244.1.1", "fd00:10:244:1:1111:2222:3333:4444"]))
def test_names_fit_into_the_kernel_and_into_nft(name, ip):
    of_endpoint = endpoint_identity(name, Address(ip, 65535))
    chains = [f"{word}-{identity(name)}" for word in ("service", "local", "external")]
    for text in [*chains, f"endpoint-{of_endpoint}", clients_of(of_endpoint, 86400)]:
        assert len(text) <= LONGEST_CHAIN
        assert is_word(text)
