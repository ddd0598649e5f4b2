"""The EndpointSlices of a Service with a selector, made from the Pods of the manifests.

The rules are those of the EndpointSlice controller: which Pods count, when one is ready, and that a
port named by its target may have another number in each Pod (one slice for each set of numbers).
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Final, NamedTuple

from msgspec import Struct

from pyproxy.manifests.fields import Document, Field
from pyproxy.manifests.services import FAMILY_NAMES, PortDraft, ServiceDraft
from pyproxy.model import PROTOS, Family, ObjectName, family_of

SERVICE_LABEL: Final = "kubernetes.io/service-name"
ZONE_LABEL: Final = "topology.kubernetes.io/zone"

Numbers = tuple[tuple[PortDraft, int], ...]


class ContainerPort(NamedTuple):
    """What a target that is a name stands for."""

    name: str
    proto: str


class Pod(Struct, frozen=True):
    """A Pod, as far as Services see it."""

    name: ObjectName
    labels: Mapping[str, str]
    ips: tuple[str, ...]
    node: str
    ready: bool
    terminating: bool
    ports: Mapping[ContainerPort, int]


def read_pod(name: ObjectName, document: Document) -> Pod | None:
    """Return the Pod, or None for one that has ended or has no address yet."""
    pod = Field(document)
    spec, status = pod["spec"], pod["status"]
    several = [entry["ip"] for entry in status["podIPs"].items()]
    single = status["podIP"]
    ips = tuple(field.ip() for field in several or ([single] if single.text() else []))
    if status["phase"].text() in ("Succeeded", "Failed") or not ips:
        return None
    return Pod(
        name=name,
        labels=pod["metadata"]["labels"].labels(),
        ips=ips,
        node=spec["nodeName"].subdomain() if spec["nodeName"].text() else "",
        ready=_is_ready(status["conditions"]),
        terminating=pod["metadata"]["deletionTimestamp"].value is not None,
        ports=_container_ports(spec),
    )


def read_zone(_: ObjectName, document: Document) -> str:
    """Return the zone of a Node; empty if it has none."""
    return Field(document)["metadata"]["labels"][ZONE_LABEL].label_value()


def complete_slice(name: ObjectName, document: Document) -> Document:
    """Return a slice written by hand as the API server would store it."""
    fields = Field(document)
    metadata = fields["metadata"]
    if metadata["labels"][SERVICE_LABEL].value is not None:
        metadata["labels"][SERVICE_LABEL].label()
    fields["addressType"].one_of(("IPv4", "IPv6", "FQDN"), "")
    own = {"namespace": name.namespace, "name": name.name}
    ports = [_complete_slice_port(field) for field in fields["ports"].items()]
    return {**document, "metadata": {**metadata.mapping(), **own}, "ports": ports}


class PodIndex:
    """The Pods by each of their labels: a selector looks only at those that share its rarest."""

    def __init__(self, pods: Iterable[Pod]) -> None:
        self._pods: dict[tuple[str, str, str], list[Pod]] = {}
        for pod in sorted(pods, key=lambda pod: pod.name):
            for label in pod.labels.items():
                self._pods.setdefault((pod.name.namespace, *label), []).append(pod)

    def selected(self, namespace: str, selector: Mapping[str, str]) -> Sequence[Pod]:
        """Return the Pods with all labels of a selector, by name; an empty one selects none."""
        groups = (self._pods.get((namespace, *label), []) for label in selector.items())
        rarest: Sequence[Pod] = min(groups, key=len, default=())
        return [pod for pod in rarest if selector.items() <= pod.labels.items()]


def slices_of(
    draft: ServiceDraft, pods: Sequence[Pod], zones: Mapping[str, str]
) -> tuple[Document, ...]:
    """Return the slices of a Service over the Pods that it selects, for each of its families."""
    slices = []
    for family in draft.cluster_ips:
        names = (_slice_name(draft.name, family, number) for number in count(1))
        groups = _by_numbers(draft, pods, family)
        for numbers in sorted(groups, key=lambda numbers: [port for _, port in numbers]):
            endpoints = [_endpoint(draft, pod, family, zones) for pod in groups[numbers]]
            slices.append(_slice(next(names), draft.name, family, numbers, endpoints))
    return tuple(slices)


def _complete_slice_port(field: Field) -> Document:
    name = field["name"].text()
    proto = field["protocol"].one_of(PROTOS, "TCP")
    return {
        "name": field["name"].label() if name else "",
        "protocol": proto,
        "port": field["port"].port(),
    }


def _is_ready(conditions: Field) -> bool:
    """A Pod that says nothing of its condition is ready: it was written by hand."""
    entries = conditions.items()
    if not entries:
        return True
    return any(
        entry["type"].value == "Ready" and _is_true(entry["status"].value) for entry in entries
    )


def _is_true(status: object) -> bool:
    # The API's word is "True"; without its quotes, YAML makes it a boolean.
    return status in ("True", True)


def _container_ports(spec: Field) -> Mapping[ContainerPort, int]:
    """Return the named ports; of init containers only those that go on running count."""
    sidecars = [c for c in spec["initContainers"].items() if c["restartPolicy"].value == "Always"]
    ports: dict[ContainerPort, int] = {}
    for container in (*spec["containers"].items(), *sidecars):
        for field in container["ports"].items():
            number, proto = field["containerPort"].port(), field["protocol"].one_of(PROTOS, "TCP")
            if number is None:
                raise field["containerPort"].wrong("it is missing")
            if field["name"].text():
                ports.setdefault(ContainerPort(field["name"].label(), proto), number)
    return ports


def _by_numbers(
    draft: ServiceDraft, pods: Sequence[Pod], family: Family
) -> Mapping[Numbers, list[Pod]]:
    """Group the Pods by the numbers that the Service's targets have in them."""
    groups: dict[Numbers, list[Pod]] = {}
    for pod in pods:
        numbers = tuple(
            (port, number) for port in draft.ports if (number := _number(port, pod)) is not None
        )
        if numbers and any(family_of(ip) == family for ip in pod.ips):
            groups.setdefault(numbers, []).append(pod)
    return groups


def _number(port: PortDraft, pod: Pod) -> int | None:
    if isinstance(port.target, int):
        return port.target
    return pod.ports.get(ContainerPort(port.target, port.proto))


def _slice_name(service: ObjectName, family: Family, number: int) -> str:
    base = f"{service.name}-{FAMILY_NAMES[family].lower()}"
    return base if number == 1 else f"{base}-{number}"


def _slice(
    name: str, service: ObjectName, family: Family, numbers: Numbers, endpoints: list[Document]
) -> Document:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": service.namespace,
            "name": name,
            "labels": {SERVICE_LABEL: service.name},
        },
        "addressType": FAMILY_NAMES[family],
        "ports": [
            {"name": port.name, "protocol": port.proto, "port": number} for port, number in numbers
        ],
        "endpoints": endpoints,
    }


def _endpoint(draft: ServiceDraft, pod: Pod, family: Family, zones: Mapping[str, str]) -> Document:
    ready = draft.publishes_not_ready or (pod.ready and not pod.terminating)
    zone = zones.get(pod.node, "")
    return {
        "addresses": [ip for ip in pod.ips if family_of(ip) == family],
        "conditions": {"ready": ready, "serving": pod.ready, "terminating": pod.terminating},
        "nodeName": pod.node,
        "zone": zone,
        "targetRef": {"kind": "Pod", "namespace": pod.name.namespace, "name": pod.name.name},
        "hints": _hints(draft.distribution, pod.node, zone) if ready else {},
    }


def _hints(distribution: str, node: str, zone: str) -> Document:
    """Return the hints that ``spec.trafficDistribution`` asks for: each endpoint serves its own."""
    hints: dict[str, object] = {}
    if zone and distribution in ("PreferClose", "PreferSameZone", "PreferSameNode"):
        hints["forZones"] = [{"name": zone}]
    if node and distribution == "PreferSameNode":
        hints["forNodes"] = [{"name": node}]
    return hints
