"""A node's view of objects that no daemon has: the same plan, and nothing written."""

from collections.abc import Mapping, Sequence
from ipaddress import ip_address

from pyproxy.cache import Cache
from pyproxy.config import (
    Config,
    detect_node_ips,
    gate,
    local_cidr,
    masquerade_all,
    node_port_cidrs,
    with_mode,
)
from pyproxy.host import LOOPBACK
from pyproxy.model import ApiObject, Family, Kind, Node, Upsert, family_of
from pyproxy.plan import Planner, Site
from pyproxy.rules.listeners import Surroundings
from pyproxy.topology import Place
from pyproxy.view import FamilyView, View

Objects = Mapping[Kind, Sequence[ApiObject]]
KINDS: tuple[Kind, ...] = ("Service", "EndpointSlice")


def view_of(
    objects: Objects, config: Config, mode: str, node_name: str, families: Sequence[Family]
) -> View:
    """Plan the objects for each family. The node has the addresses of its Node, and no others."""
    config = with_mode(config, mode)
    node = node_in(objects, node_name)
    return View(
        node=node_name,
        mode=mode,
        families=tuple(family_view(family, objects, config, node) for family in families),
        allow_external_ips=gate(config, "AllowServiceExternalIPs"),
        cloud=config.cloud_annotations,
        keeps_client_address=config.userspace.keep_client_address,
        ipvs_scheduler=config.ipvs.scheduler,
    )


def node_in(objects: Objects, name: str) -> Node:
    """Return the Node of this name; one that is not there has nothing but the name."""
    nodes = [obj for obj in objects.get("Node", ()) if isinstance(obj, Node)]
    return next((node for node in nodes if node.name == name), Node(name))


def family_view(family: Family, objects: Objects, config: Config, node: Node) -> FamilyView:
    cache = Cache(
        family,
        allow_external_ips=gate(config, "AllowServiceExternalIPs"),
        cloud=config.cloud_annotations,
    )
    planner = Planner()
    for kind in KINDS:
        for obj in objects.get(kind, ()):
            cache.apply(Upsert(kind, obj))
    ips = detect_node_ips(config, node.ips)
    pods = local_cidr(config, family, node)
    site = Site(
        place=Place(node.name, node.zone),
        node_ip=ips.ip4 if family == 4 else ips.ip6,
        detects_pods=pods is not None,
        masquerade_all=masquerade_all(config, config.mode),
    )
    planner.update(cache.owners(), cache, site)
    own = frozenset(ip for ip in node.ips if family_of(ip) == family)
    ranges = node_port_cidrs(config, family, node.ips)
    serving = own if ranges is None else {
        ip for ip in own if any(ip_address(ip) in network for network in ranges)
    }  # fmt: skip
    around = Surroundings(own, (pods,) if pods is not None else (), (LOOPBACK[family],))
    return FamilyView(family, cache, planner.plan, site, around, frozenset(serving))
