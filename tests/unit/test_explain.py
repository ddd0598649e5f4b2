"""What ``explain`` says: the object and the field that decided, in one sentence."""

from ipaddress import ip_network

import pytest

from pyproxy.cache import Cache
from pyproxy.explain import explain
from pyproxy.model import Address, Endpoint, Upsert, WeightRule
from pyproxy.plan import Planner, Site
from pyproxy.rules.listeners import Surroundings
from pyproxy.services import service_ports, why_no_ports
from pyproxy.topology import Place
from pyproxy.view import FamilyView, NotThereError, QueryError, View
from tests.builders import (
    VIP,
    address,
    draining,
    endpoint,
    endpoint_slice,
    remote,
    service,
)

NODE_IP = "192.0.2.11"
POD = "10.244.1.9"
EXTERNAL = {"type": "LoadBalancer", "load_balancer_ips": ("198.18.0.1",)}
LOCAL = {**EXTERNAL, "external_local": True}
THERE = Endpoint(address(7), node="node-b")
THERE_TOO = Endpoint(address(8), node="node-c")


def view(
    *objects,
    mode="nftables",
    ipvs_scheduler="",
    node_port_ips=(NODE_IP,),
    allow_external_ips=True,
    cloud="",
    keeps_client_address=True,
    **site,
):
    cache = Cache(4, allow_external_ips=allow_external_ips, cloud=cloud)
    planner = Planner()
    for obj in objects:
        cache.apply(Upsert(type(obj).__name__, obj))
    where = Site(Place("node-a", "zone-a"), node_ip=NODE_IP, **site)
    planner.update(cache.owners(), cache, where)
    around = Surroundings(
        frozenset({NODE_IP, "192.0.2.12"}),
        (ip_network("10.244.1.0/24"),),
        (ip_network("127.0.0.0/8"),),
    )
    ips = frozenset(node_port_ips)
    family = FamilyView(4, cache, planner.plan, where, around, ips)
    return View(
        "node-a", mode, (family,), allow_external_ips, cloud, keeps_client_address, ipvs_scheduler
    )


def web(*endpoints, **fields):
    made = service(selector="app=web", **fields)
    return made, endpoint_slice("web-x", *endpoints)


def here(number, **rest):
    return endpoint(number, node="node-a", **rest)


def cases(objects, kind="ClusterIP", **world):
    found = explain(view(*objects, **world), {"service": "default/web"})
    (frontend,) = [f for f in found.frontends if f.kind == kind]
    return {origin: case for case in frontend.cases for origin in case.origins}


def reason(objects, kind="ClusterIP", origin="outside", **world):
    case = cases(objects, kind, **world)[origin]
    return f"{case.action}: {case.reason} [{case.object}: {case.field}]"


WEB = "Service default/web"


@pytest.mark.parametrize(
    ("objects", "kind", "expected"),
    [
        pytest.param(
            web(here(1), THERE), "ClusterIP",
            f"forward: internalTrafficPolicy: Cluster, so it may be any ready endpoint (2) "
            f"[{WEB}: spec.internalTrafficPolicy]",
            id="policy Cluster",
        ),
        pytest.param(
            web(THERE, THERE_TOO, **LOCAL), "LoadBalancer",
            "drop: externalTrafficPolicy: Local and no ready endpoint on node-a; endpoints exist "
            f"on node-b, node-c [{WEB}: spec.externalTrafficPolicy]",
            id="policy Local, endpoints elsewhere",
        ),
        pytest.param(
            web(here(1, ready=False, serving=False), THERE, **LOCAL), "LoadBalancer",
            "drop: externalTrafficPolicy: Local and no ready endpoint on node-a (1 endpoint there "
            f"is not); endpoints exist on node-b [{WEB}: spec.externalTrafficPolicy]",
            id="policy Local, the one here is not ready",
        ),
        pytest.param(
            web(here(1), THERE, **LOCAL), "LoadBalancer",
            "forward: externalTrafficPolicy: Local, and 1 ready endpoint is on node-a "
            f"[{WEB}: spec.externalTrafficPolicy]",
            id="policy Local, one here",
        ),
        pytest.param(
            web(THERE, internal_local=True), "ClusterIP",
            "drop: internalTrafficPolicy: Local and no ready endpoint on node-a; endpoints exist "
            f"on node-b [{WEB}: spec.internalTrafficPolicy]",
            id="internal policy Local",
        ),
        pytest.param(
            web(draining(1)), "ClusterIP",
            "forward: no endpoint is ready, so those that still serve while they terminate are "
            "used (1) [EndpointSlice web-x: endpoints[].conditions]",
            id="draining",
        ),
        pytest.param(
            web(here(1, zones=["zone-a"]), remote(2, zones=["zone-b"])), "ClusterIP",
            "forward: hints leave 1 of 2 ready endpoints to zone-a "
            "[EndpointSlice web-x: endpoints[].hints.forZones]",
            id="zone hints",
        ),
        pytest.param(
            web(here(1, nodes=["node-a"]), remote(2, nodes=["node-b"])), "ClusterIP",
            "forward: hints leave 1 of 2 ready endpoints to node-a "
            "[EndpointSlice web-x: endpoints[].hints.forNodes]",
            id="node hints",
        ),
        pytest.param(
            web(), "ClusterIP",
            "reject: selector app=web matches no ready pod: EndpointSlice web-x has 0 endpoints "
            f"[{WEB}: spec.selector]",
            id="an empty slice",
        ),
        pytest.param(
            web()[:1], "ClusterIP",
            "reject: selector app=web matches no ready pod: no EndpointSlice of IPv4 "
            f"[{WEB}: spec.selector]",
            id="no slice",
        ),
        pytest.param(
            (service(),), "ClusterIP",
            "reject: it has no selector, and nobody has made an EndpointSlice of IPv4 for it "
            f"[{WEB}: spec.selector]",
            id="no slice and no selector",
        ),
        pytest.param(
            (service(), endpoint_slice("web-x")), "ClusterIP",
            "reject: EndpointSlice web-x has 0 endpoints [EndpointSlice web-x: endpoints]",
            id="an empty slice by hand",
        ),
        pytest.param(
            (service(), endpoint_slice("web-x", here(1), port="http")), "ClusterIP",
            'reject: no port is "" (TCP); there is: "http" (TCP) '
            "[EndpointSlice web-x: ports[].name]",
            id="another port name",
        ),
        pytest.param(
            web(here(1, ready=False, serving=False)), "ClusterIP",
            "reject: its only endpoint is not ready: 10.244.1.1:8080 ready=false "
            "[EndpointSlice web-x: endpoints[].conditions.ready]",
            id="not ready",
        ),
    ],
)  # fmt: skip
def test_the_reason_names_what_decided(objects, kind, expected):
    assert reason(objects, kind) == expected


def test_weights_of_zero_are_named():
    objects = web(here(1), THERE, weights=(WeightRule("ip", "10.244.1.1", 0),) * 1)
    assert "any ready endpoint (1, and 1 of weight 0 get none)" in reason(objects)
    nothing = (WeightRule("ip", "10.244.1.1", 0), WeightRule("node", "node-b", 0))
    assert reason(web(here(1), THERE, weights=nothing)) == (
        "reject: pyproxy.io/weights gives all 2 endpoints the weight 0 "
        f"[{WEB}: metadata.annotations]"
    )


def test_endpoints_have_the_probability_of_their_weight():
    objects = web(here(1), THERE, weights=(WeightRule("ip", "10.244.1.1", 3),))
    shares = cases(objects)["pod"].endpoints
    assert [(share.address, share.probability) for share in shares] == [
        ("10.244.1.1:8080", 0.75), ("10.244.1.7:8080", 0.25),
    ]  # fmt: skip
    by_load = cases(web(here(1), THERE, scheduler="lc"), mode="userspace")
    assert [share.probability for share in by_load["pod"].endpoints] == [None, None]
    by_node = cases(objects, mode="ipvs", ipvs_scheduler="lc")
    assert [share.probability for share in by_node["pod"].endpoints] == [None, None]


@pytest.mark.parametrize(
    ("fields", "kind", "expected"),
    [
        pytest.param({}, "ClusterIP", {"pod": "", "node": "the client is no pod of this node"},
                     id="cluster IP"),
        pytest.param(EXTERNAL, "LoadBalancer",
                     dict.fromkeys(("pod", "outside"), "externalTrafficPolicy: Cluster, so replies "
                                   "must pass through this node"), id="external"),
        pytest.param(LOCAL, "LoadBalancer",
                     {"pod": "", "outside": "", "node": "the connection is the node's own"},
                     id="external, policy Local"),
    ],
)  # fmt: skip
def test_masquerading_has_a_reason(fields, kind, expected):
    found = cases(web(here(1), **fields), kind)
    assert {origin: found[origin].masquerade_reason for origin in expected} == expected
    assert all(found[o].masquerade == bool(text) for o, text in expected.items())


def test_in_mode_userspace_backends_see_the_client_only_where_answers_come_back():
    found = cases(web(here(1), **LOCAL), "LoadBalancer", mode="userspace")
    assert {o: (c.masquerade, c.masquerade_reason) for o, c in found.items()} == {
        "pod": (False, "only where answers would not come back by this node"),
        "node": (True, "the connection is the node's own"),
        "outside": (False, "only where answers would not come back by this node"),
    }
    never = cases(web(here(1)), mode="userspace", keeps_client_address=False)["pod"]
    assert never.masquerade_reason == "mode userspace makes a connection of its own"


# --- one connection -------------------------------------------------------------------------------


def connection(objects, to, sender="outside", **world):
    return explain(view(*objects, **world), {"from": sender, "to": to})


def only(explanation):
    ((case,),) = [frontend.cases for frontend in explanation.frontends]
    return case


@pytest.mark.parametrize(
    ("sender", "about", "origin"),
    [
        ("outside", "from outside", "outside"),
        ("node", "from 192.0.2.11 (the node itself)", "node"),
        ("203.0.113.9", "from 203.0.113.9 (outside)", "outside"),
        (POD, "from 10.244.1.9 (a pod)", "pod"),
        ("192.0.2.12", "from 192.0.2.12 (the node itself)", "node"),
        ("pod/default/web-1", "from 10.244.1.1 (a pod)", "pod"),
    ],
)
def test_a_connection_has_an_origin(sender, about, origin):
    objects = web(Endpoint(address(1), node="node-a", pod="web-1"))
    found = connection(objects, f"{VIP}:80", sender)
    assert found.about == f"{about} to {VIP}:80/TCP"
    assert only(found).origins == (origin,)


def test_a_client_outside_the_source_ranges_is_told_so():
    ranges = (ip_network("203.0.113.0/24"),)
    objects = web(here(1), **EXTERNAL, source_ranges=ranges)
    found = only(connection(objects, "198.18.0.1:80", "198.51.100.7"))
    assert (found.action, found.field) == ("drop", "spec.loadBalancerSourceRanges")
    expected = "client 198.51.100.7 is outside loadBalancerSourceRanges 203.0.113.0/24"
    assert found.reason == expected
    assert only(connection(objects, "198.18.0.1:80", "203.0.113.7")).action == "forward"
    assert only(connection(objects, f"{VIP}:80", "198.51.100.7")).action == "forward"


def test_a_backend_that_may_reach_itself_is_masqueraded_then():
    objects = web(here(1), THERE)
    found = only(connection(objects, f"{VIP}:80", "10.244.1.1"))
    assert (found.masquerade, found.masquerade_reason) == (
        False, "only where 10.244.1.1 would answer itself (hairpin)",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("objects", "to", "expected"),
    [
        pytest.param(
            web(here(1), proxied_ips=("198.18.0.2",)), "198.18.0.2:80",
            "198.18.0.2 has ipMode Proxy, so this node leaves it to the load balancer",
            id="ipMode Proxy",
        ),
        pytest.param(
            web(here(1)), f"{VIP}:81",
            f"{VIP} is of Service default/web, which has no port 81/TCP: it has 80/TCP",
            id="another port",
        ),
        pytest.param(
            web(here(1)), f"{VIP}:80/udp",
            f"{VIP} is of Service default/web, which has no port 80/UDP: it has 80/TCP",
            id="another protocol",
        ),
        pytest.param(
            web(here(1)), "10.244.1.1:8080",
            "10.244.1.1:8080 is an endpoint of Service default/web, not a frontend",
            id="an endpoint",
        ),
        pytest.param(
            web(here(1)), "203.0.113.1:80", "no Service has the address 203.0.113.1", id="nobody"
        ),
        pytest.param(
            web(here(1)), f"{NODE_IP}:30080",
            f"{NODE_IP} is this node's, and no Service has the node port 30080/TCP",
            id="no node port",
        ),
        pytest.param(
            web(here(1), ports=(("", "TCP", 80, 30080),)), "192.0.2.12:30080",
            "nodePortAddresses leaves 192.0.2.12 out of the addresses that serve node ports",
            id="not this address",
        ),
    ],
)  # fmt: skip
def test_what_is_not_ours_has_a_reason(objects, to, expected):
    (found,) = connection(objects, to).not_ours
    assert found.reason == expected


def test_a_node_port_is_matched_after_addresses():
    objects = web(here(1), ports=(("", "TCP", 80, 30080),))
    (found,) = connection(objects, f"{NODE_IP}:30080").frontends
    assert (found.frontend, found.kind) == ("node:30080/TCP", "NodePort")


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ({}, "it needs a service, or from and to"),
        ({"to": "nowhere"}, "to: nowhere is not IP:PORT"),
        ({"to": "10.96.0.1:0"}, "to: 10.96.0.1:0 is not IP:PORT"),
        ({"to": "10.96.0.1:80/icmp"}, "to: icmp is not tcp, udp or sctp"),
        ({"to": "10.96.0.1:80", "from": "me"}, "from: me is not node, outside, pod/"),
        ({"to": "10.96.0.1:80", "from": "::1"}, "from: ::1 cannot connect to an address of IPv4"),
    ],
)
def test_a_question_that_makes_no_sense_names_what_is_wrong(query, error):
    with pytest.raises(QueryError, match=error):
        explain(view(), query)


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ({"service": "default/other"}, "Service default/other: there is none"),
        ({"to": "[::1]:80"}, "to: node-a serves no IPv6"),
        ({"to": "10.96.0.1:80", "from": "pod/a/b"}, "from: no EndpointSlice of IPv4 names pod a/b"),
    ],
)
def test_what_is_not_there_is_named(query, error):
    with pytest.raises(NotThereError, match=error):
        explain(view(), query)


# --- remarks --------------------------------------------------------------------------------------


def remarks(objects, **world):
    return explain(view(*objects, **world), {"service": "default/web"}).remarks


def test_pass_through_and_a_backend_here_is_a_dead_end_of_a_dedicated_elb():
    asked = {**EXTERNAL, "balancer_traffic": "pass-through", "elb_class": "performance"}
    (dead_end,) = remarks(web(here(1), **asked))
    assert "backend on this node (10.244.1.1): a dedicated ELB" in dead_end
    assert remarks(web(THERE, **asked)) == ()
    (dead_end,) = remarks(web(here(1), proxied_ips=("198.18.0.2",), elb_class="performance"))
    assert "cannot hairpin" in dead_end
    asked["balancer_traffic"] = "local-else-pass-through"
    assert remarks(web(here(1), **asked)) == ()
    assert remarks(web(here(1), **EXTERNAL)) == ()


def test_an_annotation_of_a_cloud_that_does_not_count_is_told():
    (told,) = remarks(web(here(1), **EXTERNAL, cloud_traffic="pass-through"))
    assert "counts only with --cloud-annotations=huawei" in told
    assert remarks(web(here(1), **EXTERNAL, cloud_traffic="pass-through"), cloud="huawei") == ()


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        pytest.param(
            web(here(1), **EXTERNAL, balancer_traffic="pass-through"),
            "pass: pyproxy.io/load-balancer-traffic asks pass-through: what pods and the node send "
            "goes by the load balancer",
            id="pass-through",
        ),
        pytest.param(
            web(THERE, **EXTERNAL, balancer_traffic="local-else-pass-through"),
            "pass: pyproxy.io/load-balancer-traffic asks local-else-pass-through, and no ready "
            "endpoint is on node-a",
            id="none here",
        ),
        pytest.param(
            web(here(1), THERE, **EXTERNAL, balancer_traffic="local-else-pass-through"),
            "forward: pyproxy.io/load-balancer-traffic asks local-else-pass-through, and 1 "
            "endpoint is on node-a",
            id="one here",
        ),
    ],
)
def test_who_carries_pods_traffic_to_a_load_balancer_is_the_annotations_to_say(objects, expected):
    case = cases(objects, "LoadBalancer")["pod"]
    assert f"{case.action}: {case.reason}" == expected
    assert case.field == "metadata.annotations[pyproxy.io/load-balancer-traffic]"
    assert cases(objects, "LoadBalancer")["outside"].action == "forward"


def test_source_ranges_are_not_for_what_passes_by():
    ranges = (ip_network("203.0.113.0/24"),)
    asked = {**EXTERNAL, "source_ranges": ranges, "balancer_traffic": "pass-through"}
    assert only(connection(web(here(1), **asked), "198.18.0.1:80", POD)).action == "pass"
    assert only(connection(web(here(1), **asked), "198.18.0.1:80", "8.8.8.8")).action == "drop"


def test_an_address_of_ip_mode_proxy_that_the_annotation_gives_to_this_node_is_ours():
    objects = web(here(1), proxied_ips=("198.18.0.2",), balancer_traffic="short-circuit")
    found = explain(view(*objects), {"service": "default/web"})
    assert found.not_ours == ()
    assert "198.18.0.2:80/TCP" in [f.frontend for f in found.frontends]


@pytest.mark.parametrize(
    "query", [{"service": "default/web"}, {"to": "10.96.0.1:80"}, {"to": "10.9.9.9:80"}]
)
def test_what_is_known_from_the_disk_only_is_said_to_be_old(query):
    old = view(*web(THERE))._replace(as_of={"Service": 1000.0, "EndpointSlice": 990.0})
    assert explain(old, query).remarks == (
        "the API server is away: EndpointSlices, Services are as they were at "
        "1970-01-01T00:16:30Z, from the state on disk",
    )


def test_what_was_wrong_with_a_service_is_repeated():
    assert remarks(web(here(1), warnings=("spec.x: odd",))) == ("spec.x: odd",)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"ip": None}, "clusterIP: None (headless)"),
        ({"type": "ExternalName"}, "type: ExternalName"),
        ({"ip": None, "cluster_ip6": "fd00::1"}, "clusterIPs: there is none of IPv4"),
        ({"ports": ()}, "ports: there are none"),
        ({}, None),
    ],
)
def test_a_service_without_ports_has_a_reason_and_others_none(fields, expected):
    made = service(**fields)
    found = why_no_ports(made, 4)
    assert found is None if expected is None else found.startswith(expected)
    assert (found is None) == bool(service_ports(made, 4))


def test_external_ips_are_not_ours_where_the_gate_is_off():
    objects = web(here(1), external_ips=("198.18.0.9",))
    (found,) = explain(
        view(*objects, allow_external_ips=False), {"service": "default/web"}
    ).not_ours
    assert found.reason == (
        "198.18.0.9 is in externalIPs, and the feature gate AllowServiceExternalIPs is off"
    )


def test_a_host_name_is_nothing_for_a_node():
    (found,) = explain(
        view(*web(here(1), hostnames=("lb.example",))), {"service": "default/web"}
    ).not_ours
    assert (found.address, "no address" in found.reason) == ("lb.example", True)


def test_an_address_is_what_is_asked_of_ipv6_too():
    with pytest.raises(QueryError, match="is not IP:PORT"):
        explain(view(), {"to": str(Address("fe80", 80))})
