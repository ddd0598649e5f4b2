"""The fields of API objects that a proxy reads, under the API's own names.

msgspec skips everything else without building it: managedFields are most of the bytes. Labels and
annotations are structs for the same reason. A list may be null wherever the API allows that.
"""

from typing import Annotated, Any

from msgspec import UNSET, Meta, Raw, Struct, field

from pyproxy.model import Proto

PortNumber = Annotated[int, Meta(ge=1, le=65535)]
OptionalPortNumber = Annotated[int, Meta(ge=0, le=65535)]


class Wire(Struct, rename="camel", gc=False):
    """Lives only while it is decoded."""


# --- Service ------------------------------------------------------------------------------------


class ServiceLabels(Wire):
    proxy_name: Any = field(default=UNSET, name="service.kubernetes.io/service-proxy-name")


class ServiceAnnotations(Wire):
    weights: str = field(default="", name="pyproxy.io/weights")
    scheduler: str = field(default="", name="pyproxy.io/scheduler")
    balancer_traffic: str = field(default="", name="pyproxy.io/load-balancer-traffic")
    elb_pass_through: str = field(default="", name="kubernetes.io/elb.pass-through")
    elb_class: str = field(default="", name="kubernetes.io/elb.class")


class ServiceMetadata(Wire):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""
    labels: ServiceLabels | None = None
    annotations: ServiceAnnotations | None = None


class ServicePort(Wire):
    port: PortNumber
    name: str | None = None
    protocol: Proto | None = None
    node_port: OptionalPortNumber | None = None


class ClientIP(Wire):
    timeout_seconds: int | None = None


class SessionAffinityConfig(Wire):
    client_ip: ClientIP | None = field(default=None, name="clientIP")


class ServiceSpec(Wire):
    type: str = ""
    cluster_ip: str = field(default="", name="clusterIP")
    cluster_ips: list[str] | None = field(default=None, name="clusterIPs")
    ip_families: list[str] | None = None
    ports: list[ServicePort] | None = None
    selector: dict[str, str] | None = None
    external_ips: list[str] | None = field(default=None, name="externalIPs")
    load_balancer_source_ranges: list[str] | None = None
    session_affinity: str | None = None
    session_affinity_config: SessionAffinityConfig | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str | None = None
    health_check_node_port: OptionalPortNumber | None = None


class Ingress(Wire):
    ip: str | None = None
    ip_mode: str | None = None
    hostname: str | None = None


class LoadBalancerStatus(Wire):
    ingress: list[Ingress] | None = None


class ServiceStatus(Wire):
    load_balancer: LoadBalancerStatus | None = None


class Service(Wire):
    metadata: ServiceMetadata
    spec: ServiceSpec
    status: ServiceStatus | None = None


# --- EndpointSlice ------------------------------------------------------------------------------


class SliceLabels(Wire):
    service: str = field(default="", name="kubernetes.io/service-name")
    headless: Any = field(default=UNSET, name="service.kubernetes.io/headless")


class SliceAnnotations(Wire):
    trigger_time: str = field(default="", name="endpoints.kubernetes.io/last-change-trigger-time")


class SliceMetadata(Wire):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""
    labels: SliceLabels | None = None
    annotations: SliceAnnotations | None = None


class SlicePort(Wire):
    name: str | None = None
    port: OptionalPortNumber | None = None
    protocol: Proto | None = None


class Conditions(Wire):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Named(Wire):
    name: str


class Hints(Wire):
    for_zones: list[Named] | None = None
    for_nodes: list[Named] | None = None


class TargetRef(Wire):
    kind: str = ""
    name: str = ""


class Endpoint(Wire):
    addresses: list[str] | None = None
    conditions: Conditions | None = None
    node_name: str | None = None
    zone: str | None = None
    target_ref: TargetRef | None = None
    hints: Hints | None = None


class EndpointSlice(Wire):
    metadata: SliceMetadata
    address_type: str = ""
    ports: list[SlicePort] | None = None
    endpoints: list[Endpoint] | None = None


# --- Node and ServiceCIDR -----------------------------------------------------------------------


class NodeLabels(Wire):
    zone: str = field(default="", name="topology.kubernetes.io/zone")


class NodeMetadata(Wire):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""
    uid: str = ""
    deletion_timestamp: Any = None  # YAML makes it a datetime
    labels: NodeLabels | None = None


class Taint(Wire):
    key: str = ""


class NodeSpec(Wire):
    pod_cidr: str = field(default="", name="podCIDR")
    pod_cidrs: list[str] | None = field(default=None, name="podCIDRs")
    taints: list[Taint] | None = None


class NodeAddress(Wire):
    type: str = ""
    address: str = ""


class NodeStatus(Wire):
    addresses: list[NodeAddress] | None = None


class Node(Wire):
    metadata: NodeMetadata
    spec: NodeSpec | None = None
    status: NodeStatus | None = None


class PlainMetadata(Wire):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""


class ServiceCIDRSpec(Wire):
    cidrs: list[str] | None = None


class ServiceCIDR(Wire):
    metadata: PlainMetadata
    spec: ServiceCIDRSpec | None = None


Metadata = ServiceMetadata | SliceMetadata | NodeMetadata | PlainMetadata
Object = Service | EndpointSlice | Node | ServiceCIDR


# --- what surrounds objects ---------------------------------------------------------------------


class WatchEvent(Wire):
    type: str
    object: Raw


class Reference(Wire):
    """Any object, as far as its name."""

    metadata: PlainMetadata


class BookmarkAnnotations(Wire):
    initial_events_end: Any = field(default=UNSET, name="k8s.io/initial-events-end")


class BookmarkMetadata(Wire):
    resource_version: str = ""
    annotations: BookmarkAnnotations | None = None


class Bookmark(Wire):
    metadata: BookmarkMetadata


class Cause(Wire):
    reason: str = ""


class StatusDetails(Wire):
    causes: list[Cause] | None = None
    retry_after_seconds: float | None = None


class Status(Wire):
    code: int = 0
    reason: str = ""
    message: str = ""
    details: StatusDetails | None = None


class ListMetadata(Wire):
    resource_version: str = ""
    continue_token: str = field(default="", name="continue")


class ObjectList(Wire):
    metadata: ListMetadata
    items: list[Raw] | None = None


def is_set(value: object) -> bool:
    """Say whether a label is present, whatever its value."""
    return value is not UNSET
