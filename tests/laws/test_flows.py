from ipaddress import ip_network

from hypothesis import given
from hypothesis import strategies as st

from pyproxy.model import Address, Endpoint, Forward, Frontend
from pyproxy.plan import Site, plan_port
from pyproxy.rules.flows import Flow, Pending, affected, breaks, broken, condemned, lookup, stale
from pyproxy.rules.listeners import Surroundings, action_for
from tests.builders import HERE, VIP, address, owner, service_port

CLIENTS = ("198.51.100.50", "203.0.113.9", "10.244.1.99", "192.0.2.11")
LB_IP = "203.0.113.8"
AROUND = Surroundings(frozenset({"192.0.2.11"}), (ip_network("10.244.1.0/24"),))
NODE_PORTS = (30053, 30054)
backends = st.integers(1, 4).map(address)


@st.composite
def endpoint_sets(draw):
    numbers = draw(st.sets(st.integers(1, 4)))
    return tuple(
        Endpoint(
            address(number),
            ready=draw(st.booleans()),
            serving=draw(st.booleans()),
            terminating=draw(st.booleans()),
            node=draw(st.sampled_from(["here", "elsewhere"])),
            node_hints=draw(st.sampled_from([frozenset(), frozenset({"here"}), frozenset({"x"})])),
            zone_hints=draw(st.sampled_from([frozenset(), frozenset({"zone-a"})])),
        )
        for number in sorted(numbers)
    )


@st.composite
def rules(draw):
    return {
        "internal_local": draw(st.booleans()),
        "external_local": draw(st.booleans()),
        "node_port": draw(st.sampled_from([0, *NODE_PORTS])),
        "load_balancer_ips": draw(st.sampled_from([(), (LB_IP,)])),
        "source_ranges": draw(st.sampled_from([(), ("203.0.113.0/24",), ("10.0.0.0/8",)])),
    }


def planned(endpoints, fields, *, proto="UDP", detects_pods=True):
    port = service_port(name=owner("dns", proto=proto), port=53, **fields)
    return plan_port(port, endpoints, Site(HERE, "192.0.2.11", detects_pods=detects_pods))


def plans(**fixed):
    return st.builds(lambda e, f: planned(e, f, **fixed), endpoint_sets(), rules())


@st.composite
def flows(draw, proto="UDP"):
    targets = [(VIP, 53), (LB_IP, 53), *(("192.0.2.11", port) for port in NODE_PORTS)]
    destination = Address(*draw(st.sampled_from(targets)))
    backend = draw(st.one_of(backends, st.just(destination)))
    source = Address(draw(st.sampled_from(CLIENTS)), draw(st.integers(1024, 65535)))
    return Flow(proto, source, destination, backend, b"")


def frontends_of(flow):
    ip, port = flow.destination
    return {Frontend(ip, port, flow.proto), Frontend("", port, flow.proto)}


@given(st.none() | plans(), plans(), flows())
def test_no_flow_becomes_stale_at_a_frontend_that_is_not_looked_at(old, new, flow):
    before = lookup([old] if old is not None else [])
    if stale(flow, lookup([new])) and not stale(flow, before):
        assert frontends_of(flow) & affected(old, new)


@given(plans(), flows())
def test_a_stale_flow_has_a_backend_that_does_not_serve(port, flow):
    if stale(flow, lookup([port])):
        assert flow.backend not in port.serving


@given(endpoint_sets(), endpoint_sets(), rules(), st.sampled_from(["TCP", "UDP", "SCTP"]))
def test_endpoints_that_change_break_nothing(before, after, fields, proto):
    old, new = planned(before, fields, proto=proto), planned(after, fields, proto=proto)
    assert broken(old, new) == ()


@given(plans(proto="TCP"), plans(proto="TCP"), flows("TCP"), st.booleans())
def test_no_flow_is_broken_that_the_new_plan_would_let_through(old, new, flow, knows_pods):
    around = AROUND if knows_pods else Surroundings(AROUND.node_ips)
    routes = {route.frontend: route for route in new.routes}
    for rule in broken(old, new):
        if rule.frontend not in frontends_of(flow) or not breaks(flow, rule, around):
            continue
        route = routes.get(rule.frontend)
        if route is None:
            assert rule.frontend.ip == ""
        else:
            action = action_for(route, flow.source.ip, AROUND)
            assert not isinstance(action, Forward) or flow.backend not in {
                backend.address for backend in action.pool.backends
            }


@given(
    st.lists(st.none() | plans(), min_size=1, max_size=6),
    st.lists(flows(), max_size=8),
    st.booleans(),
)
def test_reviews_leave_no_stale_flow_behind(history, found, ends_forbidden):
    """Whatever the history, what its reviews condemn includes all that is stale in the end."""
    pending, left = Pending(ends_forbidden=ends_forbidden), list(found)
    for port in history:
        ports = {port.owner: port} if port is not None else {}
        pending.note({owner("dns", proto="UDP")})
        review = pending.take(ports)
        gone = set(condemned(left, review, AROUND))
        assert all(frontends_of(flow) & review.frontends for flow in gone)
        left = [flow for flow in left if flow not in gone]
        assert not any(stale(flow, lookup(ports.values())) for flow in left)
