import pytest

from pyproxy.balancer import BY_CLIENT, BY_CONNECTIONS
from pyproxy.model import Backend, Forward, Frontend, Pool, Route
from pyproxy.rules.shares import shares
from tests.builders import VIP, address

MODES = ("nftables", "iptables", "ipvs", "userspace")
WEIGHTED, EVEN, VARIES = [0.75, 0.25], [0.5, 0.5], None


def pool(*weights, **fields):
    return Pool(tuple(Backend(address(n), w) for n, w in enumerate(weights, 1)), **fields)


def route(inside, outside):
    forward = Forward(inside)
    return Route(Frontend(VIP, 80, "TCP"), "LoadBalancer", forward, forward, Forward(outside))


@pytest.mark.parametrize(
    ("scheduler", "by_mode"),
    [
        pytest.param(None, [WEIGHTED] * 4, id="by weight unless told otherwise"),
        pytest.param("wrr", [WEIGHTED] * 4, id="wrr"),
        pytest.param("random", [WEIGHTED] * 4, id="random"),
        pytest.param("rr", [EVEN] * 4, id="rr minds no weights"),
        *(
            pytest.param(
                name, [WEIGHTED, WEIGHTED, VARIES, VARIES], id=f"{name}: rules cannot count"
            )
            for name in sorted(BY_CONNECTIONS)
        ),
        *(
            pytest.param(name, [VARIES] * 4, id=f"{name}: the client decides")
            for name in sorted(BY_CLIENT)
        ),
    ],
)
def test_each_mode_has_the_shares_that_it_gives(scheduler, by_mode):
    given = pool(3, 1, scheduler=scheduler)
    assert [shares(mode, route(given, given), given) for mode in MODES] == by_mode


@pytest.mark.parametrize("mode", MODES)
def test_one_backend_gets_all_whatever_chooses(mode):
    alone = pool(5, scheduler="lc")
    assert shares(mode, route(alone, alone), alone) == [1.0]


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [("", WEIGHTED), ("rr", WEIGHTED), ("wrr", WEIGHTED), ("lc", VARIES), ("mh", VARIES)],
)
def test_in_ipvs_the_scheduler_of_the_node_counts(scheduler, expected):
    given = pool(3, 1)
    assert shares("ipvs", route(given, given), given, scheduler) == expected


def test_in_ipvs_the_table_picks_where_no_virtual_server_does():
    brief = pool(3, 1, scheduler="lc", affinity_seconds=60)
    assert shares("ipvs", route(brief, brief), brief) == WEIGHTED, "clients are soon forgotten"
    whole, local = pool(3, 1, scheduler="lc"), pool(1, 1, scheduler="lc")
    apart = route(whole, local)
    assert shares("ipvs", apart, whole) == WEIGHTED, "pods reach more than strangers"
    assert shares("ipvs", apart, local) is VARIES
