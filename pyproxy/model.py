"""The domain's immutable values.

Values that exist by the hundred thousand are frozen msgspec structs: they are built in C and
take half the memory of a dataclass. Keys are named tuples. Addresses are canonical strings, made
so once, by ``ip.canonical_ip``; only source ranges keep the types of ``ipaddress``.
"""

from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from typing import Literal, NamedTuple, get_args

from msgspec import Struct

Family = Literal[4, 6]
Proto = Literal["TCP", "UDP", "SCTP"]
Network = IPv4Network | IPv6Network
FrontendKind = Literal["ClusterIP", "ExternalIP", "LoadBalancer", "NodePort"]
Scheduler = Literal["rr", "wrr", "random", "lc", "wlc", "sh", "dh", "mh", "sed", "nq"]
# Who carries what pods and the node send to a load balancer's address: this node, the load
# balancer, or the one where an endpoint is here and else the other.
BalancerTraffic = Literal["short-circuit", "pass-through", "local-else-pass-through"]

FAMILIES: tuple[Family, ...] = (4, 6)
WILDCARD: Mapping[Family, str] = {4: "0.0.0.0", 6: "::"}
PROTOS: tuple[Proto, ...] = ("TCP", "UDP", "SCTP")
SCHEDULERS: tuple[Scheduler, ...] = get_args(Scheduler)
BALANCER_TRAFFIC: tuple[BalancerTraffic, ...] = get_args(BalancerTraffic)


def family_of(ip: str) -> Family:
    """Return the family of a canonical address."""
    return 6 if ":" in ip else 4


class ObjectName(NamedTuple):
    """The namespace and name of an API object; the namespace of a Node is empty."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


class PortKey(NamedTuple):
    """What matches a Service's port with the ports of its EndpointSlices."""

    name: str
    proto: Proto


class ServicePortName(NamedTuple):
    """The unit that is balanced: the owner of frontends and of everything a mode keeps for them."""

    namespace: str
    service: str
    port: str
    proto: Proto

    @property
    def service_name(self) -> ObjectName:
        return ObjectName(self.namespace, self.service)

    def __str__(self) -> str:
        """Print ``namespace/name:port``, as kube-proxy does in comments, events and logs."""
        name = f"{self.namespace}/{self.service}"
        return f"{name}:{self.port}" if self.port else name


class Address(NamedTuple):
    """Where packets are sent."""

    ip: str
    port: int

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


# --- API objects, as decoded --------------------------------------------------------------------


class SpecPort(Struct, frozen=True, gc=False):
    """One entry of ``spec.ports`` of a Service."""

    name: str
    proto: Proto
    port: int
    node_port: int = 0  # 0: none


class WeightRule(Struct, frozen=True, gc=False):
    """One ``SELECTOR=WEIGHT`` of the annotation ``pyproxy.io/weights``."""

    kind: Literal["ip", "pod", "node", "zone"]
    pattern: str
    weight: int


class Service(Struct, frozen=True):
    """A Service, both families, reduced to what a proxy may look at."""

    name: ObjectName
    type: str = "ClusterIP"
    cluster_ip4: str | None = None
    cluster_ip6: str | None = None
    ports: tuple[SpecPort, ...] = ()
    external_ips: tuple[str, ...] = ()
    load_balancer_ips: tuple[str, ...] = ()  # of status, ipMode VIP or absent
    proxied_ips: tuple[str, ...] = ()  # of status, ipMode Proxy
    source_ranges: tuple[Network, ...] = ()
    affinity_seconds: int | None = None  # None: no session affinity
    internal_local: bool = False
    external_local: bool = False  # as written; it counts only where a Service is exposed
    health_check_node_port: int = 0
    scheduler: Scheduler | None = None  # None: the mode's default
    weights: tuple[WeightRule, ...] = ()
    balancer_traffic: BalancerTraffic | None = None  # None: ipMode says it
    cloud_traffic: BalancerTraffic | None = None  # as a cloud's annotation has it
    warnings: tuple[str, ...] = ()  # what was wrong with it and ignored, for the log
    # What nothing depends on, and people ask about.
    resource_version: str = ""
    selector: str = ""  # as kubectl prints it; empty: whoever made its slices chose
    hostnames: tuple[str, ...] = ()  # of status, where there is no address
    elb_class: str = ""  # annotation kubernetes.io/elb.class


class Endpoint(Struct, frozen=True, gc=False):
    """A member of a Service, with its conditions. Addresses of an EndpointSlice end up here."""

    address: Address
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    node: str = ""  # empty: not known, hence not local
    zone: str = ""
    pod: str = ""
    zone_hints: frozenset[str] = frozenset()
    node_hints: frozenset[str] = frozenset()


class EndpointSlice(Struct, frozen=True):
    """An EndpointSlice of one family: its endpoints for each of its usable ports."""

    name: ObjectName
    service: ObjectName
    family: Family
    endpoints: Mapping[PortKey, tuple[Endpoint, ...]]
    triggered_at: float | None = None  # annotation last-change-trigger-time, Unix seconds
    warnings: tuple[str, ...] = ()
    resource_version: str = ""


class Node(Struct, frozen=True):
    """This node, as the API server knows it."""

    name: str
    zone: str = ""
    ips: tuple[str, ...] = ()  # InternalIP first, then ExternalIP
    pod_cidrs: tuple[str, ...] = ()
    uid: str = ""
    eligible: bool = True  # neither being deleted nor tainted for deletion by the autoscaler


class ServiceCIDR(Struct, frozen=True):
    """A range that cluster IPs are allocated from."""

    name: str
    cidrs: tuple[str, ...]


ApiObject = Service | EndpointSlice | Node | ServiceCIDR
Kind = Literal["Service", "EndpointSlice", "Node", "ServiceCIDR"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GATING: tuple[Kind, ...] = ("Service", "EndpointSlice", "Node")  # needed for a first sync


def object_name(obj: ApiObject) -> ObjectName:
    """Return an object's name; Nodes and ServiceCIDRs are in no namespace."""
    return obj.name if isinstance(obj.name, ObjectName) else ObjectName("", obj.name)


# --- what a source says -------------------------------------------------------------------------


class Upsert(Struct, frozen=True):
    """An object is now so."""

    kind: Kind
    obj: ApiObject


class Remove(Struct, frozen=True):
    """An object is gone (or not ours any more)."""

    kind: Kind
    name: ObjectName


class Replace(Struct, frozen=True):
    """These are all objects of this kind; whatever is not among them is gone.

    ``as_of`` is when that was so, in Unix seconds, of a state on disk; None: it is so now.
    """

    kind: Kind
    objects: tuple[ApiObject, ...]
    as_of: float | None = None


Change = Upsert | Remove | Replace


# --- one family's view of a Service port --------------------------------------------------------


class ServicePort(Struct, frozen=True):
    """One port of one Service as one family sees it: the input of a plan."""

    name: ServicePortName
    cluster_ip: str
    port: int
    node_port: int = 0
    external_ips: tuple[str, ...] = ()
    load_balancer_ips: tuple[str, ...] = ()
    source_ranges: tuple[Network, ...] = ()  # empty: everybody
    affinity_seconds: int | None = None
    internal_local: bool = False
    external_local: bool = False
    health_check_node_port: int = 0
    scheduler: Scheduler | None = None
    weights: tuple[WeightRule, ...] = ()
    balancer_traffic: BalancerTraffic = "short-circuit"

    @property
    def externally_accessible(self) -> bool:
        return bool(self.node_port or self.external_ips or self.load_balancer_ips)


# --- the plan ---------------------------------------------------------------------------------


class Frontend(NamedTuple):
    """Where packets arrive. The address of a node port is empty: the mode knows which it serves."""

    ip: str
    port: int
    proto: Proto

    def __str__(self) -> str:
        where = Address(self.ip, self.port) if self.ip else f"node:{self.port}"
        return f"{where}/{self.proto}"

    @classmethod
    def parse(cls, text: str) -> "Frontend":
        """Read what a frontend prints as. Raises ``ValueError``."""
        where, _, proto = text.rpartition("/")
        ip, _, port = where.rpartition(":")
        known = PROTOS[PROTOS.index(proto)]
        return cls("" if ip == "node" else ip.strip("[]"), int(port), known)


class Backend(NamedTuple):
    """A member of a pool."""

    address: Address
    weight: int = 1
    is_local: bool = False


class Pool(Struct, frozen=True):
    """The backends one frontend may use, in the order of their printed addresses; never empty."""

    backends: tuple[Backend, ...]
    scheduler: Scheduler | None = None
    affinity_seconds: int | None = None


class Forward(Struct, frozen=True):
    """Give the connection a backend of the pool."""

    pool: Pool
    masquerade: bool = False


class Reject(Struct, frozen=True):
    """Refuse at once: no usable endpoint exists anywhere."""


class Drop(Struct, frozen=True):
    """Stay silent: endpoints exist, and policy keeps them from this node."""


class Pass(Struct, frozen=True):
    """Leave it alone: the load balancer that has the address is to see it."""


Action = Forward | Reject | Drop | Pass


class Route(Struct, frozen=True):
    """What to do with packets that arrive at a frontend, for each origin of a connection.

    ``allowed_sources`` of None admits everybody; any other source is dropped, unless what it
    sends is none of this node's business.
    """

    frontend: Frontend
    kind: FrontendKind
    from_pod: Action
    from_node: Action
    from_outside: Action
    allowed_sources: tuple[Network, ...] | None = None


class HealthPort(Struct, frozen=True):
    """A Service's health check node port and the addresses of its ready endpoints on this node."""

    port: int
    local_ips: frozenset[str]


class PortPlan(Struct, frozen=True):
    """This node's duty for one owner, in one family.

    ``serving`` has the addresses of all serving endpoints of the cluster: flows of a protocol
    without connections stay with their backend while it is among them (kube-proxy: conntrack
    clean-up looks at serving endpoints, not at policy).
    """

    owner: ServicePortName
    routes: tuple[Route, ...]
    serving: frozenset[Address] = frozenset()
    health: HealthPort | None = None
    no_local_internal: bool = False  # internal policy Local, endpoints only elsewhere
    no_local_external: bool = False
