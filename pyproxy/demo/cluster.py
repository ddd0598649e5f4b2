"""The demo's cluster as values: its machines, its pods, and the objects that describe them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, Literal, NamedTuple

import yaml

from pyproxy.model import Address, FrontendKind, family_of

Object = Mapping[str, Any]
Phase = Literal["starting", "ready", "terminating"]

CLUSTER_CIDRS = ("10.244.0.0/16", "fd00:10:244::/48")
SERVICE_CIDRS = ("10.96.0.0/16", "fd00:10:96::/112")
LOAD_BALANCER_CIDR = "198.18.0.0/16"
GATEWAY_IPS = ("192.0.2.1", "2001:db8::1")
POD_LABELS = {"app": "my-nginx"}
POD_PORT = 80


class Machine(NamedTuple):
    """What is plugged into the underlay: a node, or the client outside."""

    name: str
    ips: tuple[str, ...]


class Node(NamedTuple):
    """A node and its share of the cluster's addresses."""

    machine: Machine
    pod_cidrs: tuple[str, ...]
    pod_gateways: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.machine.name

    @property
    def ips(self) -> frozenset[str]:
        """Return all its addresses: pods on the node see the one their link has."""
        return frozenset(self.machine.ips + self.pod_gateways)


class Pod(NamedTuple):
    name: str
    node: str
    ips: tuple[str, ...]


class ServiceAddress(NamedTuple):
    """An address of a Service, and which kind it is."""

    service: str
    kind: FrontendKind
    address: Address
    local: bool = False  # externalTrafficPolicy: Local, and it applies to this address


def _node(number: int) -> Node:
    return Node(
        machine=Machine(f"node-{number}", (f"192.0.2.1{number}", f"2001:db8::1{number}")),
        pod_cidrs=(f"10.244.{number}.0/24", f"fd00:10:244:{number}::/64"),
        pod_gateways=(f"10.244.{number}.1", f"fd00:10:244:{number}::1"),
    )


def _pod(name: str, node: int, host: int) -> Pod:
    return Pod(name, f"node-{node}", (f"10.244.{node}.{host}", f"fd00:10:244:{node}::{host}"))


NODES = (_node(1), _node(2))
CLIENT = Machine("client", ("192.0.2.50", "2001:db8::50"))
SHELL = _pod("shell", 1, 100)  # the pod that asks
PODS = tuple(_pod(f"nginx-{n}", 1 if n <= 3 else 2, 10 + n) for n in range(1, 7))
REPLACEMENTS = tuple(_pod(f"nginx-{n}", 1, 10 + n) for n in range(7, 10))


def node_object(node: Node) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node.name, "labels": {"kubernetes.io/hostname": node.name}},
        "spec": {"podCIDR": node.pod_cidrs[0], "podCIDRs": list(node.pod_cidrs)},
        "status": {
            "addresses": [{"type": "InternalIP", "address": ip} for ip in node.machine.ips],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def pod_object(pod: Pod, phase: Phase) -> Object:
    metadata: dict[str, Any] = {
        "name": pod.name,
        "namespace": "default",
        "labels": dict(POD_LABELS),
    }
    if phase == "terminating":
        metadata |= {"deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": 30}
    # A container that ends gracefully still passes its probe: it serves while it terminates.
    ready = "False" if phase == "starting" else "True"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {
            "nodeName": pod.node,
            "containers": [
                {"name": "nginx", "ports": [{"name": "http", "containerPort": POD_PORT}]}
            ],
        },
        "status": {
            "phase": "Running",
            "podIP": pod.ips[0],
            "podIPs": [{"ip": ip} for ip in pod.ips],
            "conditions": [{"type": "Ready", "status": ready}],
        },
    }


def service_objects(*, ipv6: bool) -> tuple[Object, ...]:
    """Return the Services; without IPv6, those of them that have both families keep one."""
    text = resources.files("pyproxy.demo").joinpath("services.yaml").read_text(encoding="utf-8")
    return tuple(obj if ipv6 else _single_stack(obj) for obj in yaml.safe_load_all(text))


def _single_stack(service: Object) -> Object:
    dual = ("clusterIPs", "ipFamilies", "ipFamilyPolicy")
    spec = {key: value for key, value in service["spec"].items() if key not in dual}
    return {**service, "spec": spec}


def service_addresses(services: Iterable[Object], node: Node) -> tuple[ServiceAddress, ...]:
    """Return the addresses that the Services have by their YAML; a node port counts on ``node``."""
    return tuple(found for service in services for found in _addresses_of(service, node))


def _addresses_of(service: Object, node: Node) -> Iterator[ServiceAddress]:
    name, spec = service["metadata"]["name"], service["spec"]
    port = spec["ports"][0]
    local = spec.get("externalTrafficPolicy") == "Local"
    cluster_ip = spec.get("clusterIP")
    for ip in spec.get("clusterIPs", [cluster_ip] if cluster_ip else []):
        yield ServiceAddress(name, "ClusterIP", Address(ip, port["port"]))
    if "nodePort" in port:
        yield ServiceAddress(
            name, "NodePort", Address(node.machine.ips[0], port["nodePort"]), local
        )
    for ingress in service.get("status", {}).get("loadBalancer", {}).get("ingress", ()):
        yield ServiceAddress(name, "LoadBalancer", Address(ingress["ip"], port["port"]), local)


def selects(service: Object, labels: Mapping[str, str]) -> bool:
    return bool(service["spec"]["selector"].items() <= labels.items())


def of_families(ips: Sequence[str], *, ipv6: bool) -> tuple[str, ...]:
    return tuple(ip for ip in ips if ipv6 or family_of(ip) == 4)
