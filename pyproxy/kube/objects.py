"""One API object, in the API's own words, into the value of the model that it means.

What an object says in a way nobody can use (a bad address among good ones, a misspelt annotation)
becomes one of its warnings, and the rest of the object counts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from sys import intern
from typing import Final, TypeVar

from pyproxy.ip import canonical_ip, parse_network
from pyproxy.kube import wire
from pyproxy.kube.annotations import (
    AnnotationError,
    clipped,
    parse_balancer_traffic,
    parse_elb_pass_through,
    parse_scheduler,
    parse_trigger_time,
    parse_weights,
)
from pyproxy.model import (
    Address,
    ApiObject,
    Endpoint,
    EndpointSlice,
    Family,
    Network,
    Node,
    ObjectName,
    PortKey,
    Proto,
    Service,
    ServiceCIDR,
    SpecPort,
    family_of,
)

T = TypeVar("T")

DEFAULT_AFFINITY_SECONDS: Final = 10800
MAX_AFFINITY_SECONDS: Final = 86400
PROXY_NAME: Final = "service.kubernetes.io/service-proxy-name"
DELETION_TAINT: Final = "ToBeDeletedByClusterAutoscaler"

_NO_ANNOTATIONS: Final = wire.ServiceAnnotations()
_NOBODYS: Final = ("0.0.0.0", "::")
_FAMILY_BY_NAME: Final[dict[str, Family]] = {"IPv4": 4, "IPv6": 6}


def build(name: ObjectName, obj: wire.Object) -> ApiObject:
    """Return the value that ``obj`` means; it is ours, see ``why_not_ours``."""
    match obj:
        case wire.Service():
            return _service(name, obj)
        case wire.EndpointSlice():
            return _endpoint_slice(name, obj)
        case wire.Node():
            return _node(name, obj)
        case wire.ServiceCIDR():
            return _service_cidr(name, obj)


def selector_of_services(proxy_name: str) -> str:
    """Return the labels of the Services that are ours; without a name, of those that have none."""
    return f"{PROXY_NAME}={proxy_name}" if proxy_name else f"!{PROXY_NAME}"


def why_not_ours(obj: wire.Object, proxy_name: str) -> str | None:
    """Repeat what the API server selects for us: nobody selects in a file.

    EndpointSlices are ours whatever their Service's label: it is copied to them late.
    """
    match obj:
        case wire.Service():
            return _why_not_our_service(obj.metadata.labels, proxy_name)
        case wire.EndpointSlice():
            return _why_not_our_slice(obj.metadata.labels, obj.address_type)
        case wire.Node() | wire.ServiceCIDR():
            return None


def _why_not_our_service(labels: wire.ServiceLabels | None, proxy_name: str) -> str | None:
    has_label = labels is not None and wire.is_set(labels.proxy_name)
    if not proxy_name:
        return f"it has the label {PROXY_NAME}" if has_label else None
    if labels is None or labels.proxy_name != proxy_name:
        return f"it has no label {PROXY_NAME}: {proxy_name}"
    return None


def _why_not_our_slice(labels: wire.SliceLabels | None, address_type: str) -> str | None:
    if labels is None or not labels.service:
        return "it has no label kubernetes.io/service-name"
    if wire.is_set(labels.headless):
        return "it has the label service.kubernetes.io/headless"
    if address_type not in _FAMILY_BY_NAME:
        return f'its addressType is "{address_type}"'
    return None


def _address(text: str) -> str | None:
    """Return the address that ``text`` means; None if it is none, such as that of nobody.

    To listen at 0.0.0.0 is to listen everywhere, and who connects to it reaches itself.
    """
    ip = canonical_ip(text)
    return ip if ip not in _NOBODYS else None


# --- Service ------------------------------------------------------------------------------------


def _service(name: ObjectName, obj: wire.Service) -> Service:
    spec = obj.spec
    warnings: list[str] = []
    cluster_ip4, cluster_ip6 = _cluster_ips(spec, warnings)
    said = obj.metadata.annotations or _NO_ANNOTATIONS
    return Service(
        name=name,
        type=intern(spec.type) or "ClusterIP",
        cluster_ip4=cluster_ip4,
        cluster_ip6=cluster_ip6,
        ports=tuple(map(_spec_port, spec.ports or ())),
        external_ips=_addresses("spec.externalIPs", spec.external_ips or (), warnings),
        load_balancer_ips=_load_balancer_ips(obj.status, (None, "VIP"), warnings),
        proxied_ips=_load_balancer_ips(obj.status, ("Proxy",), warnings),
        source_ranges=_source_ranges(spec.load_balancer_source_ranges or (), warnings),
        affinity_seconds=_affinity_seconds(spec, warnings),
        internal_local=spec.internal_traffic_policy == "Local",
        external_local=spec.external_traffic_policy == "Local",
        health_check_node_port=spec.health_check_node_port or 0,
        weights=_annotation(parse_weights, said.weights, (), warnings),
        scheduler=_annotation(parse_scheduler, said.scheduler, None, warnings),
        balancer_traffic=_annotation(parse_balancer_traffic, said.balancer_traffic, None, warnings),
        cloud_traffic=_annotation(parse_elb_pass_through, said.elb_pass_through, None, warnings),
        warnings=tuple(warnings),
        resource_version=obj.metadata.resource_version,
        selector=_selector(spec.selector),
        hostnames=_hostnames(obj.status),
        elb_class=said.elb_class,
    )


def _selector(labels: Mapping[str, str] | None) -> str:
    return ",".join([f"{name}={value}" for name, value in labels.items()]) if labels else ""


def _cluster_ips(spec: wire.ServiceSpec, warnings: list[str]) -> tuple[str | None, str | None]:
    if spec.type == "ExternalName" or spec.cluster_ip in ("", "None"):
        return None, None
    texts = [spec.cluster_ip] if not spec.ip_families else spec.cluster_ips or []
    ips: dict[Family, str] = {}
    for index, text in enumerate(texts):
        ip = _address(text)
        declared = spec.ip_families[index : index + 1] if spec.ip_families else None
        if ip is None:
            warnings.append(f'spec.clusterIPs[{index}]: "{clipped(text)}" is not an address')
        elif declared is None or declared == [f"IPv{family_of(ip)}"]:
            ips.setdefault(family_of(ip), ip)
        else:
            warnings.append(f"spec.clusterIPs[{index}]: {ip} is not of the family in ipFamilies")
    return ips.get(4), ips.get(6)


def _spec_port(port: wire.ServicePort) -> SpecPort:
    return SpecPort(intern(port.name or ""), port.protocol or "TCP", port.port, port.node_port or 0)


def _addresses(field: str, texts: Iterable[str], warnings: list[str]) -> tuple[str, ...]:
    """Return the addresses, each once. Blank text is passed over: the API has always let it in."""
    ips: dict[str, None] = {}
    for text in texts:
        ip = _address(text.strip())
        if ip is not None:
            ips[ip] = None
        elif text.strip():
            warnings.append(f'{field}: "{clipped(text)}" is not an address; it is ignored')
    return tuple(ips)


def _load_balancer_ips(
    status: wire.ServiceStatus | None, modes: Sequence[str | None], warnings: list[str]
) -> tuple[str, ...]:
    if status is None or status.load_balancer is None or not status.load_balancer.ingress:
        return ()
    ingress = [i.ip for i in status.load_balancer.ingress if i.ip and i.ip_mode in modes]
    return _addresses("status.loadBalancer.ingress", ingress, warnings)


def _hostnames(status: wire.ServiceStatus | None) -> tuple[str, ...]:
    """Return the names that stand where an address would: a node has nothing to match."""
    if status is None or status.load_balancer is None or not status.load_balancer.ingress:
        return ()
    return tuple(i.hostname for i in status.load_balancer.ingress if i.hostname and not i.ip)


def _source_ranges(texts: Iterable[str], warnings: list[str]) -> tuple[Network, ...]:
    networks: dict[Network, None] = {}
    for text in texts:
        network = parse_network(text)
        if network is None:
            warnings.append(
                f'spec.loadBalancerSourceRanges: "{clipped(text)}" is not a range; it is ignored'
            )
        else:
            networks[network] = None
    return tuple(networks)


def _affinity_seconds(spec: wire.ServiceSpec, warnings: list[str]) -> int | None:
    if spec.session_affinity != "ClientIP":
        return None
    config = spec.session_affinity_config
    client_ip = config.client_ip if config is not None else None
    seconds = client_ip.timeout_seconds if client_ip is not None else None
    if seconds is None:
        return DEFAULT_AFFINITY_SECONDS
    if 1 <= seconds <= MAX_AFFINITY_SECONDS:
        return seconds
    warnings.append(
        f"spec.sessionAffinityConfig.clientIP.timeoutSeconds: {seconds} is not 1 to "
        f"{MAX_AFFINITY_SECONDS}; {DEFAULT_AFFINITY_SECONDS} is used"
    )
    return DEFAULT_AFFINITY_SECONDS


def _annotation(parse: Callable[[str], T], text: str, otherwise: T, warnings: list[str]) -> T:
    if not text:
        return otherwise
    try:
        return parse(text)
    except AnnotationError as error:
        warnings.append(str(error))
        return otherwise


# --- EndpointSlice ------------------------------------------------------------------------------


def _endpoint_slice(name: ObjectName, obj: wire.EndpointSlice) -> EndpointSlice:
    metadata = obj.metadata
    assert metadata.labels is not None, "a slice without a service label is skipped"
    warnings: list[str] = []
    family = _FAMILY_BY_NAME[obj.address_type]
    return EndpointSlice(
        name=name,
        service=ObjectName(name.namespace, intern(metadata.labels.service)),
        family=family,
        endpoints=_endpoints_by_port(obj, family, warnings),
        triggered_at=_triggered_at(metadata.annotations, warnings),
        warnings=tuple(warnings),
        resource_version=metadata.resource_version,
    )


def _endpoints_by_port(
    obj: wire.EndpointSlice, family: Family, warnings: list[str]
) -> dict[PortKey, tuple[Endpoint, ...]]:
    """Return every endpoint at every port; without a name or a number a port means nothing."""
    ports = [port for port in obj.ports or () if port.name is not None and port.port]
    found: list[tuple[PortKey, int, list[Endpoint]]] = [
        (_port_key(port.name or "", port.protocol or "TCP"), port.port or 0, []) for port in ports
    ]
    for index, endpoint in enumerate(obj.endpoints or ()):
        # The API defines further addresses of an endpoint as without meaning.
        text = endpoint.addresses[0] if endpoint.addresses else ""
        ip = _address(text)
        if ip is None or family_of(ip) != family:
            trouble = (
                f'"{clipped(text)}" is not an IPv{family} address' if text else "there is none"
            )
            warnings.append(f"endpoints[{index}].addresses: {trouble}; the endpoint is ignored")
        else:
            said = _what_it_says(endpoint)
            for _, number, endpoints in found:
                endpoints.append(Endpoint(Address(ip, number), *said))
    by_port: dict[PortKey, tuple[Endpoint, ...]] = {}
    for key, _, endpoints in found:
        if endpoints:
            by_port[key] = (*by_port.get(key, ()), *endpoints)
    return by_port


def _what_it_says(
    endpoint: wire.Endpoint,
) -> tuple[bool, bool, bool, str, str, str, frozenset[str], frozenset[str]]:
    """Return what an endpoint says for every port, in the order of ``Endpoint``.

    Conditions that are not told mean a healthy endpoint.
    """
    conditions = endpoint.conditions or _NO_CONDITIONS
    target, hints = endpoint.target_ref, endpoint.hints
    return (
        conditions.ready is not False,
        conditions.serving is not False,
        conditions.terminating is True,
        # A few nodes and zones stand at very many endpoints: keep one string of each.
        intern(endpoint.node_name or ""),
        intern(endpoint.zone or ""),
        target.name if target is not None and target.kind == "Pod" else "",
        _NOWHERE if hints is None else _names(hints.for_zones),
        _NOWHERE if hints is None else _names(hints.for_nodes),
    )


_NO_CONDITIONS: Final = wire.Conditions()
_NOWHERE: Final[frozenset[str]] = frozenset()


def _names(named: Sequence[wire.Named] | None) -> frozenset[str]:
    return _shared_names(*[intern(entry.name) for entry in named]) if named else _NOWHERE


@lru_cache(maxsize=4096)
def _shared_names(*names: str) -> frozenset[str]:
    return frozenset(names)


@lru_cache(maxsize=4096)
def _port_key(name: str, proto: Proto) -> PortKey:
    return PortKey(name, proto)


def _triggered_at(annotations: wire.SliceAnnotations | None, warnings: list[str]) -> float | None:
    if annotations is None or not annotations.trigger_time:
        return None
    try:
        return parse_trigger_time(annotations.trigger_time)
    except AnnotationError as error:
        warnings.append(str(error))
        return None


# --- Node and ServiceCIDR -----------------------------------------------------------------------


def _node(name: ObjectName, obj: wire.Node) -> Node:
    metadata, spec = obj.metadata, obj.spec or wire.NodeSpec()
    addresses = (obj.status.addresses if obj.status is not None else None) or ()
    tainted = any(taint.key == DELETION_TAINT for taint in spec.taints or ())
    return Node(
        name=name.name,
        zone=intern(metadata.labels.zone) if metadata.labels is not None else "",
        ips=(*_ips_of(addresses, "InternalIP"), *_ips_of(addresses, "ExternalIP")),
        pod_cidrs=_cidrs(spec.pod_cidrs or [spec.pod_cidr]),
        uid=metadata.uid,
        eligible=metadata.deletion_timestamp is None and not tainted,
    )


def _ips_of(addresses: Sequence[wire.NodeAddress], kind: str) -> tuple[str, ...]:
    ips = [canonical_ip(entry.address) for entry in addresses if entry.type == kind]
    return tuple(ip for ip in ips if ip is not None)


def _cidrs(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(str(network) for network in map(parse_network, texts) if network is not None)


def _service_cidr(name: ObjectName, obj: wire.ServiceCIDR) -> ServiceCIDR:
    return ServiceCIDR(name.name, _cidrs((obj.spec and obj.spec.cidrs) or ()))
