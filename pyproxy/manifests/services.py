"""A Service as a person writes it, and as the API server would complete it.

There is no cloud controller behind a file: the deprecated ``spec.loadBalancerIP`` is taken as the
ingress address that such a controller would have reported.
"""

from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, cast

from msgspec import Struct

from pyproxy.manifests.allocation import (
    CLUSTER_IP,
    HEALTH_CHECK,
    Allocation,
    NumberSpace,
    Slot,
)
from pyproxy.manifests.fields import Document, Field, FieldError
from pyproxy.model import PROTOS, Family, ObjectName, Proto, family_of

TYPES: Final = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
POLICIES: Final = ("SingleStack", "PreferDualStack", "RequireDualStack")
FAMILY_NAMES: Final[Mapping[Family, NumberSpace]] = {4: "IPv4", 6: "IPv6"}
_FAMILY_BY_NAME: Final[Mapping[str, Family]] = {"IPv4": 4, "IPv6": 6}


class PortDraft(Struct, frozen=True):
    """One port. A target is a number, or the name of a container's port."""

    name: str
    proto: Proto
    number: int
    target: int | str
    node_port: int | None


class ServiceDraft(Struct, frozen=True):
    """A Service with its defaults, before numbers are allocated.

    ``cluster_ips`` has a key for each family the Service has, and None where the manifest leaves
    the address open. It is empty for a headless Service and for an ExternalName.
    """

    name: ObjectName
    document: Document
    type: str
    ports: tuple[PortDraft, ...]
    cluster_ips: Mapping[Family, str | None]
    has_node_ports: bool
    has_health_check: bool
    health_check_node_port: int | None
    status: Document
    selector: Mapping[str, str]
    publishes_not_ready: bool
    distribution: str

    def slots(self) -> Mapping[Slot, int | None]:
        """Return the numbers that the Service wants; None is any."""
        return {slot: wanted for slot, wanted, _ in self._slots_with_paths()}

    def refusal(self, allocation: Allocation) -> FieldError | None:
        """Return why the Service cannot be: the first of its slots that stays empty."""
        for slot, wanted, path in self._slots_with_paths():
            refusal = allocation.refused.get(slot)
            if refusal is not None and refusal.holder is None:
                return FieldError(f"{path}: {_noun(slot)} is free")
            if refusal is not None and wanted is not None:
                holder = cast(Slot, refusal.holder).service
                return FieldError(f"{path}: {_shown(slot, wanted)} is taken by Service {holder}")
        return None

    def _slots_with_paths(self) -> Iterator[tuple[Slot, int | None, str]]:
        for index, (family, ip) in enumerate(self.cluster_ips.items()):
            number = int(ip_address(ip)) if ip is not None else None
            path = "spec.clusterIP" if index == 0 else f"spec.clusterIPs[{index}]"
            yield Slot(self.name, CLUSTER_IP, FAMILY_NAMES[family]), number, path
        for index, port in enumerate(self.ports):
            if self.has_node_ports or port.node_port is not None:
                slot = Slot(self.name, port.number, port.proto)
                yield slot, port.node_port, f"spec.ports[{index}].nodePort"
        if self.has_health_check:
            slot = Slot(self.name, HEALTH_CHECK, "TCP")
            yield slot, self.health_check_node_port, "spec.healthCheckNodePort"


def read_service(
    name: ObjectName, document: Document, families: tuple[Family, ...]
) -> ServiceDraft:
    """Check a Service and give it the API's defaults; ``families`` are those of --service-cidr.

    Raises FieldError for what the API server would refuse.
    """
    spec = Field(document)["spec"]
    kind = spec["type"].one_of(TYPES, "ClusterIP")
    external_policy = spec["externalTrafficPolicy"].one_of(("Cluster", "Local"), "Cluster")
    spec["internalTrafficPolicy"].one_of(("Cluster", "Local"), "Cluster")
    spec["sessionAffinity"].one_of(("None", "ClientIP"), "None")
    is_balancer = kind == "LoadBalancer"
    allocates = spec["allocateLoadBalancerNodePorts"].is_true(default=True)
    return ServiceDraft(
        name=name,
        document=document,
        type=kind,
        ports=_ports(spec, kind),
        cluster_ips=_cluster_ips(spec, kind, families),
        has_node_ports=kind == "NodePort" or (is_balancer and allocates),
        has_health_check=is_balancer and external_policy == "Local",
        health_check_node_port=spec["healthCheckNodePort"].port(),
        status=_status(Field(document)["status"], spec["loadBalancerIP"] if is_balancer else None),
        selector=spec["selector"].labels(),
        publishes_not_ready=spec["publishNotReadyAddresses"].is_true(),
        distribution=spec["trafficDistribution"].text(),
    )


def complete(draft: ServiceDraft, granted: Mapping[Slot, int]) -> Document:
    """Return the Service as the API server would store it."""
    spec = dict(Field(draft.document)["spec"].mapping())
    ips = [
        _ip_text(family, granted[Slot(draft.name, CLUSTER_IP, FAMILY_NAMES[family])])
        for family in draft.cluster_ips
    ]
    if ips:
        spec |= {"clusterIP": ips[0], "clusterIPs": ips}
        spec["ipFamilies"] = [FAMILY_NAMES[family] for family in draft.cluster_ips]
    health = granted.get(Slot(draft.name, HEALTH_CHECK, "TCP"), 0)
    spec |= {
        "type": draft.type,
        "sessionAffinity": spec.get("sessionAffinity") or "None",
        "externalTrafficPolicy": spec.get("externalTrafficPolicy") or "Cluster",
        "internalTrafficPolicy": spec.get("internalTrafficPolicy") or "Cluster",
        "healthCheckNodePort": health,
        "ports": [_complete_port(draft, port, granted) for port in draft.ports],
    }
    namespace, name = draft.name
    metadata = {**Field(draft.document)["metadata"].mapping(), "namespace": namespace, "name": name}
    return {**draft.document, "metadata": metadata, "spec": spec, "status": draft.status}


def _complete_port(draft: ServiceDraft, port: PortDraft, granted: Mapping[Slot, int]) -> Document:
    node_port = granted.get(Slot(draft.name, port.number, port.proto), 0)
    return {
        "name": port.name,
        "protocol": port.proto,
        "port": port.number,
        "targetPort": port.target,
        "nodePort": node_port,
    }


def _status(status: Field, deprecated_ip: Field | None) -> Document:
    """Return the status; without any ingress in it, one of ``spec.loadBalancerIP``."""
    if status["loadBalancer"]["ingress"].items():
        return status.mapping()
    if deprecated_ip is None or not deprecated_ip.text():
        return status.mapping()
    return {"loadBalancer": {"ingress": [{"ip": deprecated_ip.ip()}]}}


# --- ports --------------------------------------------------------------------------------------


def _ports(spec: Field, kind: str) -> tuple[PortDraft, ...]:
    fields = spec["ports"].items()
    if not fields and kind != "ExternalName" and spec["clusterIP"].text() != "None":
        raise spec["ports"].wrong("there is none")
    ports: list[PortDraft] = []
    for field in fields:
        port = _port(field, is_only=len(fields) == 1)
        if port.node_port is not None and kind not in ("NodePort", "LoadBalancer"):
            raise field["nodePort"].wrong(f"a Service of type {kind} has none")
        _refuse_repetition(field, port, ports)
        ports.append(port)
    return tuple(ports)


def _port(field: Field, *, is_only: bool) -> PortDraft:
    number = _required_port(field["port"])
    name = field["name"].label() if field["name"].value is not None or not is_only else ""
    target = field["targetPort"]
    return PortDraft(
        name=name,
        proto=cast(Proto, field["protocol"].one_of(PROTOS, "TCP")),
        number=number,
        target=number if target.value is None else _target(target),
        node_port=field["nodePort"].port(),
    )


def _required_port(field: Field) -> int:
    number = field.port()
    if number is None:
        raise field.wrong("it is missing" if field.value is None else "0 is not a port")
    return number


def _target(field: Field) -> int | str:
    """Return a port's number or name; a number in quotes is a number, since no name is one."""
    if isinstance(field.value, str) and not field.value.isdecimal():
        return field.label()
    return _required_port(field)


def _refuse_repetition(field: Field, port: PortDraft, earlier: list[PortDraft]) -> None:
    for other in earlier:
        if other.name == port.name:
            raise field["name"].wrong(f"{field['name'].shown()} is there twice")
        if (other.number, other.proto) == (port.number, port.proto):
            raise field["port"].wrong(f"{port.number}/{port.proto} is there twice")
        if (port.node_port, port.proto) == (other.node_port, other.proto) and port.node_port:
            raise field["nodePort"].wrong(f"{port.node_port}/{port.proto} is there twice")


# --- cluster IPs and families -------------------------------------------------------------------


def _cluster_ips(
    spec: Field, kind: str, families: tuple[Family, ...]
) -> Mapping[Family, str | None]:
    """Return the Service's families in their order, each with the address if one is written."""
    written = _written_ips(spec) if kind != "ExternalName" else None
    if written is None:
        if kind in ("NodePort", "LoadBalancer"):
            raise spec["clusterIP"].wrong(f"a Service of type {kind} needs one")
        return {}
    wanted = _families(spec, written) or {families[0] if families else 4: None}
    _apply_policy(spec["ipFamilyPolicy"], wanted, families)
    for family, ip in wanted.items():
        if ip is None and family not in families:
            reason = f"there is no --service-cidr of {FAMILY_NAMES[family]} to take an address from"
            raise spec["clusterIP"].wrong(reason)
    return wanted


def _families(spec: Field, written: tuple[str, ...]) -> dict[Family, str | None]:
    """Return the families that ``ipFamilies`` or an address names, in this order."""
    families: dict[Family, str | None] = {}
    for index, field in enumerate(spec["ipFamilies"].items()):
        families[_family(field, written[index : index + 1])] = None
    for ip in written:
        if families.get(family_of(ip)) is not None:
            raise spec["clusterIPs"].wrong("both are of one family")
        families[family_of(ip)] = ip
    return families


def _written_ips(spec: Field) -> tuple[str, ...] | None:
    """Return the addresses in the manifest, or None for a headless Service."""
    single, several = spec["clusterIP"], spec["clusterIPs"].items()
    texts = [field.text() for field in several]
    if "None" in (single.text(), *texts[:1]):
        return None
    fields = several or ((single,) if single.text() else ())
    ips = tuple(_cluster_ip(field) for field in fields)
    if single.text() and single.ip() != ips[0]:
        raise single.wrong(f"{single.shown()} is not the first of clusterIPs")
    if len(ips) > 2:
        raise spec["clusterIPs"].wrong("there are more than two")
    return ips


def _cluster_ip(field: Field) -> str:
    ip = field.ip()
    address = ip_address(ip)
    if address.is_loopback or address.is_multicast or address.is_unspecified:
        raise field.wrong(f"{ip} cannot be the address of a Service")
    return ip


def _family(field: Field, written: tuple[str, ...]) -> Family:
    family = _FAMILY_BY_NAME[field.one_of(tuple(_FAMILY_BY_NAME), "")]
    if written and family_of(written[0]) != family:
        raise field.wrong(f"{field.shown()} is not the family of {written[0]}")
    return family


def _apply_policy(
    field: Field, wanted: dict[Family, str | None], families: tuple[Family, ...]
) -> None:
    policy = field.one_of(POLICIES, "SingleStack" if len(wanted) == 1 else "RequireDualStack")
    if policy == "SingleStack" and len(wanted) > 1:
        raise field.wrong("SingleStack, and there are two families")
    if policy == "SingleStack":
        return
    other: Family = 6 if 4 in wanted else 4
    if policy == "RequireDualStack" or other in families:
        wanted.setdefault(other, None)


# --- slots in words -----------------------------------------------------------------------------


def _noun(slot: Slot) -> str:
    return (
        f"no {slot.space} address of --service-cidr" if slot.port == CLUSTER_IP else "no node port"
    )


def _shown(slot: Slot, number: int) -> str:
    if slot.port == CLUSTER_IP:
        return _ip_text(_FAMILY_BY_NAME[slot.space], number)
    return f"{number}/{slot.space}"


def _ip_text(family: Family, number: int) -> str:
    return str(IPv4Address(number) if family == 4 else IPv6Address(number))
