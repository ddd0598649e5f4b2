"""Why this node leaves an address alone, and what else is worth knowing of a Service. Pure."""

from collections.abc import Iterator

from pyproxy.health import rfc3339
from pyproxy.model import Proto, Service
from pyproxy.reasons import listed
from pyproxy.services import why_no_ports
from pyproxy.topology import is_local
from pyproxy.view import FamilyView, View

DEDICATED = "performance"  # of kubernetes.io/elb.class: a dedicated Huawei Cloud load balancer


def not_ours(view: View, service: Service) -> Iterator[tuple[str, str]]:
    """Yield each address of a Service that this node does not serve, and why."""
    families = {family.family for family in view.families}
    reasons = [why_no_ports(service, family) for family in sorted(families)]
    if reasons and all(reasons):
        yield str(service.name), str(reasons[0])
    served = {
        ip for f in view.families for p in f.cache.ports(service.name) for ip in p.load_balancer_ips
    }
    for ip in service.proxied_ips:
        if ip not in served:
            yield ip, f"{ip} has ipMode Proxy, so this node leaves it to the load balancer"
    for name in service.hostnames:
        yield name, f"status has the host name {name} and no address: nothing for a node to match"
    if not view.allow_external_ips:
        for ip in service.external_ips:
            yield ip, f"{ip} is in externalIPs, and the feature gate AllowServiceExternalIPs is off"


def owner_of(
    view: View, family: FamilyView, ip: str, port: int, proto: Proto
) -> tuple[Service | None, str]:
    """Return whose address a destination without a route is, and why it has none."""
    for service in family.cache.services().values():
        if ip in own_addresses(service):
            for address, reason in not_ours(view, service):
                if address == ip:
                    return service, reason
            served = [f"{p.port}/{p.name.proto}" for p in family.cache.ports(service.name)]
            return service, (
                f"{ip} is of Service {service.name}, which has no port {port}/{proto}: "
                f"it has {listed(served)}"
            )
    return None, nobody(family, ip, port, proto)


def own_addresses(service: Service) -> tuple[str | None, ...]:
    return (
        service.cluster_ip4, service.cluster_ip6, *service.external_ips,
        *service.load_balancer_ips, *service.proxied_ips,
    )  # fmt: skip


def nobody(family: FamilyView, ip: str, port: int, proto: Proto) -> str:
    """Say why an address that no Service has is not served."""
    if ip not in family.around.node_ips:
        for service in family.cache.services():
            for part in family.cache.slices(service):
                if any(e.address == (ip, port) for found in part.endpoints.values() for e in found):
                    return f"{ip}:{port} is an endpoint of Service {service}, not a frontend"
        return f"no Service has the address {ip}"
    taken = any(
        p.node_port == port and p.name.proto == proto
        for service in family.cache.services()
        for p in family.cache.ports(service)
    )
    if taken:
        return f"nodePortAddresses leaves {ip} out of the addresses that serve node ports"
    return f"{ip} is this node's, and no Service has the node port {port}/{proto}"


def age(view: View) -> Iterator[str]:
    """Yield that objects are old, where the API server was away when this process began."""
    if view.as_of:
        kinds = listed(sorted(f"{kind}s" for kind in view.as_of))
        moment = rfc3339(min(view.as_of.values()))
        yield (
            f"the API server is away: {kinds} are as they were at {moment}, from the state on disk"
        )


def remarks(view: View, service: Service) -> Iterator[str]:
    """Yield what is odd about a Service, and the known dead ends of cloud annotations."""
    yield from service.warnings
    yield from pass_through(view, service)
    for family in view.families:
        for port in family.cache.ports(service.name):
            if port.name not in family.plan.ports:  # else its frontends say so
                yield from family.refusals(port.name)


def pass_through(view: View, service: Service) -> Iterator[str]:
    """Yield where annotations of a cloud count for nothing, or lead nowhere."""
    asked = service.cloud_traffic is not None and service.balancer_traffic is None
    if asked and view.cloud != "huawei":
        yield (
            f"annotation kubernetes.io/elb.pass-through asks {service.cloud_traffic}, and counts "
            "only with --cloud-annotations=huawei: this node goes by ipMode"
        )
    here = listed(sorted(local_endpoints(view, service)))
    if here and service.elb_class == DEDICATED and passes(view, service):
        yield (
            f"annotation asks pass-through, backend on this node ({here}): a dedicated ELB "
            "(kubernetes.io/elb.class: performance) cannot hairpin, so clients on this node that "
            "are given it get no answer; local-else-pass-through avoids that"
        )


def passes(view: View, service: Service) -> bool:
    """Say whether connections of this node's pods go by the load balancer."""
    ports = [port for family in view.families for port in family.cache.ports(service.name)]
    if any(port.balancer_traffic == "pass-through" for port in ports):
        return True
    return any("ipMode Proxy" in reason for _address, reason in not_ours(view, service))


def local_endpoints(view: View, service: Service) -> set[str]:
    return {
        endpoint.address.ip
        for family in view.families
        for port in family.cache.ports(service.name)
        for endpoint in family.cache.endpoints(port.name)
        if is_local(endpoint, family.site.place)
    }
