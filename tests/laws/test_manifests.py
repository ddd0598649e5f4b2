"""Laws of manifests: names decide about numbers, neither order nor files nor neighbours."""

from ipaddress import ip_address, ip_network

from hypothesis import assume, given
from hypothesis import strategies as st

from pyproxy.manifests.allocation import Band, Slot, allocate
from pyproxy.manifests.resolve import Manifests, Memory, Settings, resolve
from pyproxy.model import ObjectName
from tests.manifest_builders import SETTINGS, hand_written, node, pod, service

names = st.sampled_from([f"s{number}" for number in range(12)])
node_ports = st.sampled_from([None, 30080, 30081])
cluster_ips = st.sampled_from([None, "10.96.0.5", "10.96.0.6"])
services = st.builds(
    lambda name, kind, node_port, ip, policy: service(
        name,
        type=kind,
        clusterIP=ip,
        ipFamilyPolicy=policy,
        selector={"app": "web"},
        ports=[{"port": 80, "nodePort": node_port if kind != "ClusterIP" else None}],
    ),
    names,
    st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer"]),
    node_ports,
    cluster_ips,
    st.sampled_from(["SingleStack", "PreferDualStack"]),
)
others = st.sampled_from(
    [
        *map(pod, range(1, 4)),
        pod(4, status={"podIPs": [{"ip": "fd00:244::4"}]}),
        node("here", "a"),
        hand_written("x"),
    ]
)
clusters = st.lists(
    services | others,
    max_size=12,
    unique_by=lambda document: (document["kind"], document["metadata"]["name"]),
)
# A small range, so that slots meet.
NARROW = Settings("here", (ip_network("10.96.0.0/27"), ip_network("fd00:10:96::/123")))


def objects_of(files):
    result = resolve(files, Memory(), NARROW)
    return result.objects(), result.memory.held, len(result.faults)


@given(clusters, st.data())
def test_neither_the_order_of_documents_nor_their_files_matter(documents, data):
    shuffled = data.draw(st.permutations(documents))
    cut = data.draw(st.integers(0, len(documents)))
    together = objects_of({"all.yaml": tuple(documents)})
    assert together == objects_of(
        {"a.yaml": tuple(shuffled[:cut]), "b.yaml": tuple(shuffled[cut:])}
    )


@given(clusters)
def test_no_two_services_have_one_number(documents):
    result = resolve({"all.yaml": tuple(documents)}, Memory(), NARROW)
    ips = [ip for s in result.services for ip in (s.cluster_ip4, s.cluster_ip6) if ip]
    ports = [p.node_port for s in result.services for p in s.ports if p.node_port]
    assert len(set(ips)) == len(ips)
    assert len(set(ports)) == len(ports)


@given(clusters)
def test_what_is_allocated_lies_in_the_range(documents):
    ranges = NARROW.service_cidrs
    written = {"10.96.0.5", "10.96.0.6"}
    result = resolve({"all.yaml": tuple(documents)}, Memory(), NARROW)
    ips = {ip for s in result.services for ip in (s.cluster_ip4, s.cluster_ip6) if ip} - written
    assert all(any(ip_address(ip) in network for network in ranges) for ip in ips)


@given(clusters, clusters)
def test_an_unrelated_service_changes_nothing_while_the_process_lives(before, more):
    here = {(d["kind"], d["metadata"]["name"]) for d in before}
    assume(all((d["kind"], d["metadata"]["name"]) not in here for d in more))
    first = resolve({"a.yaml": tuple(before)}, Memory(), NARROW)
    second = resolve({"a.yaml": tuple(before), "b.yaml": tuple(more)}, first.memory, NARROW)
    assert set(first.services) <= set(second.services)


slots = st.builds(
    Slot, st.builds(ObjectName, st.just("default"), names), st.just(80), st.just("TCP")
)


@given(st.sets(slots), slots)
def test_without_memory_an_unrelated_slot_moves_another_only_by_collision(group, extra):
    bands = {"TCP": Band(0, 0, 40)}
    assume(extra not in group)
    alone = allocate(dict.fromkeys(group), {}, bands).granted
    together = allocate(dict.fromkeys({*group, extra}), {}, bands).granted
    moved = {slot for slot in group if alone[slot] != together[slot]}
    taken = {together[extra], *(together[slot] for slot in moved)}
    assert all(alone[slot] in taken for slot in moved)


@given(clusters, clusters)
def test_steps_add_up_to_what_the_last_state_of_good_files_means(before, after):
    manifests = Manifests(SETTINGS)
    first, second = ({"all.yaml": tuple(documents)} for documents in (before, after))
    seen = {change.kind: change.objects for change in manifests.receive(first).changes}
    step = manifests.receive(second)
    assume(not step.errors)
    seen |= {change.kind: change.objects for change in step.changes}
    names_seen = {kind: [obj.name for obj in objects] for kind, objects in seen.items()}
    fresh = resolve(second, Memory(), SETTINGS).objects()
    assert names_seen == {kind: [obj.name for obj in objs] for kind, objs in fresh.items()}


junk = st.sampled_from([None, True, 0, -1, 70000, 1.5, "", "x", "None", "\x00 \n", [], [None], {}])
keys = st.sampled_from(["metadata", "name", "labels", "spec", "ports", "status", "x", 7])
rubbish = st.recursive(
    junk, lambda some: st.lists(some) | st.dictionaries(keys, some), max_leaves=6
)
whole = [
    service(status={"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}}, selector={"app": "web"}),
    service(type="LoadBalancer", externalTrafficPolicy="Local", clusterIPs=["10.96.0.5"]),
    service(type="NodePort", ports=[{"name": "a", "port": 80, "targetPort": "http"}]),
    pod(ports=[{"name": "http", "containerPort": 80}], status={"podIPs": [{"ip": "10.0.0.1"}]}),
    node("here", "a") | {"status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}]}},
    hand_written(),
    {"kind": "ServiceCIDR", "metadata": {"name": "x"}, "spec": {"cidrs": ["10.0.0.0/8"]}},
    {"kind": "List", "items": [service("item")]},
]


@given(st.sampled_from(whole), rubbish, st.data())
def test_no_document_stops_the_others(document, foreign, data):
    bad = spoiled(document, foreign, data)
    step = Manifests(SETTINGS).receive(
        {"bad.yaml": (bad, foreign), "good.yaml": (service("good"),)}
    )
    objects = {change.kind: change.objects for change in step.changes}
    assert "good" in [found.name.name for found in objects["Service"]]
    assert all(error.startswith("bad.yaml: document ") for error in step.errors)
    assert not any("\n" in error for error in step.errors)


def spoiled(value, foreign, data):
    """Put something foreign anywhere in a document."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 3)):
        key = data.draw(st.sampled_from(list(value)))
        return value | {key: spoiled(value[key], foreign, data)}
    if isinstance(value, list) and value:
        return [spoiled(value[0], foreign, data), *value[1:]]
    return foreign
