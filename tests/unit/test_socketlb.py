import pytest

from pyproxy.model import (
    Address,
    Backend,
    Drop,
    Forward,
    Frontend,
    Pool,
    Reject,
    Route,
    ServicePortName,
)
from pyproxy.rules import socketlb
from pyproxy.rules.listeners import Listener
from pyproxy.rules.socketlb import FOR_NODE, FOR_PODS, REFUSE, SERVING, changes, content

A, B, C = (Backend(Address(f"10.244.1.{n}", 8080)) for n in (1, 2, 3))
TCP = Frontend("10.96.0.1", 80, "TCP")
UDP = Frontend("10.96.0.1", 53, "UDP")
NODE_PORT = Frontend("", 30080, "TCP")


def forward(*backends, **fields):
    return Forward(Pool(backends, **fields))


def listener(frontend, from_pod, from_node=None, *, serving=(), **fields):
    owner = ServicePortName("default", "web", "", frontend.proto)
    route = Route(frontend, "ClusterIP", from_pod, from_node or from_pod, Drop(), **fields)
    return Listener(owner, route, frozenset(serving))


def made(frontend, *actions, before=None, **fields):
    return content(frontend, listener(frontend, *actions, **fields), before, start=7)


def lists(found):
    """The backends by list and slot, as a person would write them."""
    named = {}
    for slot, backend in found.slots.items():
        number, key = socketlb.SLOT.unpack(slot)
        named.setdefault(key[-1], {})[number] = printed(backend)
    return named


def printed(backend):
    ip, port, _zero = socketlb.BACKEND.unpack(backend)
    assert ip[:12] == socketlb.MAPPED
    return f"{'.'.join(map(str, ip[12:]))}:{int.from_bytes(port, 'big')}"


def test_both_origins_share_the_list_of_equal_pools():
    found = made(TCP, forward(A, B), forward(A, B))
    assert lists(found) == {FOR_PODS: {0: "10.244.1.1:8080", 1: "10.244.1.2:8080"}}
    assert socketlb.FRONTEND.unpack(found.value)[:6] == (2, 2, FOR_PODS, FOR_PODS, 7, 0)


def test_origins_with_pools_of_their_own_have_lists_of_their_own():
    found = made(TCP, forward(A), forward(B, C))
    assert {number: len(slots) for number, slots in lists(found).items()} == {
        FOR_PODS: 1,
        FOR_NODE: 2,
    }
    assert socketlb.FRONTEND.unpack(found.value)[:4] == (1, 2, FOR_PODS, FOR_NODE)


@pytest.mark.parametrize(
    ("from_pod", "from_node", "counts"),
    [
        pytest.param(Reject(), Reject(), (REFUSE, REFUSE), id="refused to both"),
        pytest.param(forward(A), Drop(), (1, 0), id="silence is the listeners'"),
        pytest.param(Drop(), forward(A), (0, 1), id="silence to pods"),
    ],
)
def test_each_origin_has_its_action(from_pod, from_node, counts):
    assert socketlb.FRONTEND.unpack(made(TCP, from_pod, from_node).value)[:2] == counts


def test_a_pod_whose_address_is_to_be_hidden_is_left_to_the_listeners():
    hidden = Forward(Pool((A,)), masquerade=True)
    assert socketlb.FRONTEND.unpack(made(TCP, hidden, hidden).value)[:2] == (0, 1)
    assert socketlb.FRONTEND.unpack(made(TCP, forward(A), hidden).value)[:2] == (1, 1)


@pytest.mark.parametrize(
    ("frontend", "action", "fields"),
    [
        pytest.param(TCP, Drop(), {}, id="silence"),
        pytest.param(TCP, forward(A), {"allowed_sources": ()}, id="source ranges"),
        pytest.param(TCP, forward(A, scheduler="lc"), {}, id="least connections"),
        pytest.param(TCP, forward(A, scheduler="sh"), {}, id="a hash of the source"),
        pytest.param(Frontend("10.96.0.1", 80, "SCTP"), forward(A), {}, id="SCTP"),
    ],
)
def test_what_programs_cannot_decide_is_left_to_the_listeners(frontend, action, fields):
    assert made(frontend, action, **fields) is None


def test_weights_are_slots():
    heavy = Backend(A.address, 3)
    slots = lists(made(TCP, forward(heavy, B)))[FOR_PODS]
    assert sorted(slots) == [0, 1, 2, 3]
    assert sorted(slots.values()) == ["10.244.1.1:8080"] * 3 + ["10.244.1.2:8080"]


def test_a_random_choice_and_an_affinity_are_told_to_the_programs():
    found = made(TCP, forward(A, scheduler="random", affinity_seconds=10))
    *_, affinity, owner, at_random, _zero = socketlb.FRONTEND.unpack(found.value)
    assert (affinity, at_random) == (10_000_000_000, 1)
    assert owner == socketlb.owner_id(listener(TCP, forward(A)))


def test_all_addresses_of_an_owner_share_its_affinity():
    one, two = (made(f, forward(A, affinity_seconds=10)) for f in (TCP, NODE_PORT))
    assert one.value[32:40] == two.value[32:40]


def test_a_node_port_has_no_address_and_is_told_from_the_unspecified_one():
    node_port = made(NODE_PORT, forward(A))
    unspecified = made(Frontend("::", 30080, "TCP"), forward(A))
    assert node_port.key[:16] == bytes(16)
    assert node_port.key != unspecified.key


def test_members_are_kept_where_somebody_may_return_to_them():
    assert made(TCP, forward(A)).members == frozenset()
    affine = made(TCP, forward(A, B, affinity_seconds=1)).members
    assert {printed(member[20:]) for member in affine} == {"10.244.1.1:8080", "10.244.1.2:8080"}
    [serving] = made(UDP, forward(A), serving=[C.address]).members
    assert (serving[19], printed(serving[20:])) == (SERVING, "10.244.1.3:8080")


def test_a_backend_that_goes_moves_at_most_one_other():
    before = made(TCP, forward(A, B, C))
    after = made(TCP, forward(B, C), before=before)
    moved = {slot for slot in after.slots if after.slots[slot] != before.slots[slot]}
    assert len(moved) == 1
    assert sorted(after.slots.values()) == sorted(made(TCP, forward(B, C)).slots.values())


def test_what_stays_is_not_written():
    before = made(TCP, forward(A, B))
    again = content(TCP, listener(TCP, forward(A, B)), before, start=99)
    assert list(changes(before, again)) == []
