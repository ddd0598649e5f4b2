"""Whatever one field of an object says, nobody falls over it, and who is told can find it."""

import copy
import json

from hypothesis import example, given
from hypothesis import strategies as st

from pyproxy.cache import Cache
from pyproxy.kube.decode import decode_event, decode_list
from pyproxy.kube.events import Changed, Skipped, Unreadable
from pyproxy.model import FAMILIES, EndpointSlice, Service, Upsert
from pyproxy.plan import Planner
from pyproxy.rules import iptables, ipvs, listeners, nftables
from tests.builders import SITE

SERVICE = {
    "metadata": {
        "name": "web",
        "namespace": "shop",
        "resourceVersion": "7",
        "labels": {"a": "b"},
        "annotations": {
            "pyproxy.io/weights": "ip/10.244.1.1=2",
            "pyproxy.io/scheduler": "rr",
            "pyproxy.io/load-balancer-traffic": "pass-through",
        },
    },
    "spec": {
        "type": "LoadBalancer",
        "clusterIP": "10.96.0.1",
        "clusterIPs": ["10.96.0.1", "fd00:10:96::1"],
        "ipFamilies": ["IPv4", "IPv6"],
        "ports": [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080}],
        "selector": {"app": "web"},
        "externalIPs": ["198.18.0.1", "fd00:18::1"],
        "loadBalancerSourceRanges": ["203.0.113.0/24"],
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
        "internalTrafficPolicy": "Cluster",
        "externalTrafficPolicy": "Local",
        "healthCheckNodePort": 32000,
    },
    "status": {"loadBalancer": {"ingress": [{"ip": "198.18.0.2", "ipMode": "VIP"}]}},
}
SLICE = {
    "metadata": {
        "name": "web-1",
        "namespace": "shop",
        "resourceVersion": "8",
        "labels": {"kubernetes.io/service-name": "web"},
        "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00Z"},
    },
    "addressType": "IPv4",
    "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    "endpoints": [
        {
            "addresses": ["10.244.1.1"],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "nodeName": "here",
            "zone": "zone-a",
            "targetRef": {"kind": "Pod", "name": "web-1"},
            "hints": {"forZones": [{"name": "zone-a"}], "forNodes": [{"name": "here"}]},
        }
    ],
}
OBJECTS = {"Service": SERVICE, "EndpointSlice": SLICE}
MODES = {
    "nftables": lambda family: nftables.Ruleset(family),
    "iptables": lambda family: iptables.Ruleset(family),
    "ipvs": lambda family: ipvs.Ruleset(nftables.Ruleset(family), ("192.0.2.11",)),
}
COMPILERS = {"nftables": nftables, "iptables": iptables, "ipvs": ipvs}

digits = st.integers(1, 5000).map("9".__mul__)
odd_texts = st.one_of(
    st.sampled_from(
        ["", " ", "None", "0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "1.2.3.4/0",
         "::", "::1", "fe80::1%eth0", "::ffff:1.2.3.4", "fd00::/0", "a/b=c,=,", "pod/*=0",
         "9999-12-31T23:59:59.9Z", "ClientIP", "Local", "ExternalName", "SCTP", "UDP"]
    ),
    digits,
    digits.map("1.2.3.{}".format),
    digits.map("1.2.3.4/{}".format),
    digits.map("ip/1.2.3.{}=1".format),
    st.text(max_size=20),
)  # fmt: skip
odd_values = st.one_of(
    odd_texts,
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 65535, 65536, 2**31, 2**63, 2**70, 1.5]),
    st.sampled_from([[], {}, [None], [[]], [{}], {"": None}]),
    st.lists(odd_texts, max_size=3),
)


def paths(value, before=()):
    """Every way into an object but that to its name."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for step, inner in items:
        path = (*before, step)
        if path not in {("metadata", "name"), ("metadata", "namespace"), ("metadata",)}:
            yield path
        if isinstance(inner, dict | list):
            yield from paths(inner, path)


def with_value(obj, path, value):
    changed = copy.deepcopy(obj)
    inner = changed
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return changed


@st.composite
def odd_objects(draw):
    kind = draw(st.sampled_from(sorted(OBJECTS)))
    path = draw(st.sampled_from(list(paths(OBJECTS[kind]))))
    return kind, path, draw(odd_values)


WEIGHTS = ("metadata", "annotations", "pyproxy.io/weights")


@given(odd_objects())
@example(("Service", WEIGHTS, "ip/1.2.3." + "9" * 5000 + "=1"))
@example(("Service", ("spec", "externalIPs", 0), "1.2.3." + "9" * 5000))
@example(("Service", ("spec", "loadBalancerSourceRanges", 0), "1.2.3.4/" + "9" * 5000))
@example(("EndpointSlice", ("endpoints", 0, "addresses", 0), "1.2.3." + "9" * 5000))
@example(("Service", ("metadata", "resourceVersion"), "9" * 5000))
def test_one_odd_field_is_read_planned_and_compiled_or_named(found):
    kind, path, value = found
    odd = with_value(OBJECTS[kind], path, value)
    event = decode_event(json.dumps({"type": "MODIFIED", "object": odd}).encode(), kind)
    match event:
        case Unreadable(error=error):
            assert error.startswith(f"{kind} shop/{OBJECTS[kind]['metadata']['name']}: ")
            where = error.split(": ")[1].split("[...]")[0]  # of a map, not the key
            assert named(path).startswith(where) or where.startswith(named(path)), error
        case Changed(obj=Service() | EndpointSlice() as obj):
            assert all(len(warning) < 300 for warning in obj.warnings)
            compile_all(obj)
        case _:
            assert isinstance(event, Skipped)


@given(odd_objects())
def test_one_odd_object_keeps_no_other_from_being_listed(found):
    kind, path, value = found
    odd, good = with_value(OBJECTS[kind], path, value), copy.deepcopy(OBJECTS[kind])
    good["metadata"]["name"] = "good"
    page = decode_list(json.dumps({"metadata": {}, "items": [odd, good]}).encode(), kind)
    assert "good" in {obj.name.name for obj in page.objects}
    assert len(page.objects) + len(page.errors) <= 2


def named(path):
    """The path as messages write it: ``spec.ports[0].port``."""
    return "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in path).lstrip(".")


def compile_all(obj):
    """Make what each mode would write if this object and its good counterpart were all."""
    others = {Service: ("EndpointSlice", SLICE), EndpointSlice: ("Service", SERVICE)}
    kind, other = others[type(obj)]
    event = decode_event(json.dumps({"type": "ADDED", "object": other}).encode(), kind)
    for family in FAMILIES:
        cache, planner = Cache(family), Planner()
        cache.apply(Upsert(kind, event.obj))
        cache.apply(Upsert(type(obj).__name__, obj))
        planner.update(cache.owners(), cache, SITE)
        assert not planner.plan.failed
        for plan in planner.plan.ports.values():
            listeners.compile_owner(plan)
            for mode, compiler in COMPILERS.items():
                compiler.compile_owner(MODES[mode](family), plan, {})
