"""The plan as rows: what it takes to know which flows go on is not lost on the way."""

from ipaddress import ip_network

import msgspec
from msgspec import structs

from pyproxy.model import Drop, Forward, Pool
from pyproxy.plan import plan_port
from pyproxy.planned import PlanRow, planned_route, port_plan
from pyproxy.rules.flows import Pending
from tests.builders import SITE, endpoint, remote, service_port

LB = {"load_balancer_ips": ("203.0.113.7",), "node_port": 30080}


def plan(*endpoints, **fields):
    return plan_port(service_port(**LB | fields), endpoints, SITE)


def sent(port):
    """Return a plan as another process reads it."""
    routes = tuple(map(planned_route, port.routes))
    row = PlanRow(4, *port.owner, routes, tuple(sorted(port.serving)))
    return port_plan(msgspec.json.decode(msgspec.json.encode(row), type=PlanRow))


def review(old, new):
    pending = Pending(ends_forbidden=True)
    pending.take({old.owner: old})
    pending.note([old.owner])
    return pending.take({new.owner: new})


def test_a_plan_that_was_sent_condemns_the_same_flows():
    before = plan(endpoint(1), remote(2), remote(3))
    after = plan(
        endpoint(1), remote(2), external_local=True, source_ranges=(ip_network("192.0.2.0/24"),)
    )
    found = review(before, after)
    assert found
    assert review(sent(before), sent(after)) == found


def test_actions_and_what_is_allowed_come_through():
    port = plan(remote(2), external_local=True, source_ranges=(ip_network("192.0.2.0/24"),))
    assert any(isinstance(route.from_outside, Drop) for route in port.routes)
    bare = [
        structs.replace(route, from_pod=plain(route.from_pod), from_node=plain(route.from_node))
        for route in port.routes
    ]
    cluster_ip = structs.replace(bare[0], from_outside=plain(bare[0].from_outside))
    assert list(sent(port).routes) == [cluster_ip, *bare[1:]]


def plain(action):
    return Forward(Pool(action.pool.backends)) if isinstance(action, Forward) else action
