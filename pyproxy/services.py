"""The ports of a Service as one family sees them."""

from pyproxy.model import Family, Network, Service, ServicePort, ServicePortName, family_of


def service_ports(
    service: Service, family: Family, *, allow_external_ips: bool = True, cloud: str = ""
) -> tuple[ServicePort, ...]:
    """Return what a proxier of ``family`` must serve for ``service``, in the order of its ports.

    Empty for headless Services, for ExternalName, and for a Service without a cluster IP of the
    family. ``allow_external_ips`` is the feature gate AllowServiceExternalIPs, ``cloud`` the
    cloud whose annotations count.
    """
    cluster_ip = service.cluster_ip4 if family == 4 else service.cluster_ip6
    if cluster_ip is None or service.type == "ExternalName":
        return ()  # ``why_no_ports`` says which
    external_local = service.external_local and is_exposed(service)
    external_ips = of_family(service.external_ips, family) if allow_external_ips else ()
    balancer_traffic = service.balancer_traffic or (
        service.cloud_traffic if cloud == "huawei" else None
    )
    load_balancer_ips = of_family(service.load_balancer_ips, family)
    if balancer_traffic in ("short-circuit", "local-else-pass-through"):
        # Without being told so, a node leaves these to the load balancer whole (ipMode Proxy).
        load_balancer_ips += of_family(service.proxied_ips, family)
    source_ranges = ranges_of_family(service.source_ranges, family)
    health = service.health_check_node_port if service.type == "LoadBalancer" else 0
    return tuple(
        ServicePort(
            name=ServicePortName(*service.name, port.name, port.proto),
            cluster_ip=cluster_ip,
            port=port.port,
            node_port=port.node_port,
            external_ips=external_ips,
            load_balancer_ips=load_balancer_ips,
            source_ranges=source_ranges,
            affinity_seconds=service.affinity_seconds,
            internal_local=service.internal_local,
            external_local=external_local,
            health_check_node_port=health if external_local else 0,
            scheduler=service.scheduler,
            weights=service.weights,
            balancer_traffic=balancer_traffic or "short-circuit",
        )
        for port in service.ports
    )


def why_no_ports(service: Service, family: Family) -> str | None:
    """Say why a family has nothing to serve for a Service; None where it has its ports."""
    if service.type == "ExternalName":
        return "type: ExternalName is an alias in DNS; no node serves it"
    if service.cluster_ip4 is None and service.cluster_ip6 is None:
        return "clusterIP: None (headless); DNS leads clients to its endpoints, not a node"
    if (service.cluster_ip4 if family == 4 else service.cluster_ip6) is None:
        return f"clusterIPs: there is none of IPv{family}"
    return None if service.ports else "ports: there are none"


def is_exposed(service: Service) -> bool:
    """Say whether the external traffic policy counts: it is ignored for internal Services."""
    return service.type in ("LoadBalancer", "NodePort") or bool(service.external_ips)


def of_family(ips: tuple[str, ...], family: Family) -> tuple[str, ...]:
    return tuple(ip for ip in ips if family_of(ip) == family) if ips else ()


def ranges_of_family(ranges: tuple[Network, ...], family: Family) -> tuple[Network, ...]:
    """Return the ranges of a family; one that covers everything makes the others pointless."""
    own = tuple(network for network in ranges if network.version == family)
    return () if any(network.prefixlen == 0 for network in own) else own
