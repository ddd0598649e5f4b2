"""The settings as frozen values, their defaults, and the decisions that follow from them alone.

The structs have the shape of KubeProxyConfiguration v1alpha1. ``encode_name`` of a field is the
name it has in the file; a duration is a number of seconds here and a text such as ``30s`` there.
"""

from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Annotated, Final, Literal, NamedTuple, TypeVar

from msgspec import Meta, Struct, field
from msgspec.structs import replace

from pyproxy.config.text import ConfigError, is_ip, parse_cidr, with_port
from pyproxy.model import Family, Network, Node, family_of

Mode = Literal["auto", "userspace", "iptables", "nftables", "ipvs"]
MODES: Final[tuple[Mode, ...]] = ("auto", "userspace", "iptables", "nftables", "ipvs")
DETECT_LOCAL_MODES: Final = ("ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix")
CLOUDS: Final = ("", "huawei")
# Modes that keep node ports to the node's primary addresses, unless told otherwise.
PRIMARY_BY_DEFAULT: Final = ("nftables", "ipvs")
# Modes that can serve some Services beside another proxy, which has the others.
MODES_BESIDE: Final = ("nftables", "userspace")
NAT_MODES: Final = ("nftables", "iptables")  # whose rules come before virtual servers
PRIMARY: Final = "primary"  # the word that nodePortAddresses may have instead of CIDRs
HEALTHZ_PORT: Final = 10256
METRICS_PORT: Final = 10249

Seconds = Annotated[float, Meta(title="duration")]
Quantity = Annotated[str, Meta(title="quantity")]  # a number of bytes, such as 64Ki

_UPPERCASE_WORDS: Final = {
    "cidr": "CIDR",
    "cidrs": "CIDRs",
    "arp": "ARP",
    "dsr": "DSR",
    "lb": "LB",
}
S = TypeVar("S", bound=Struct)


def file_name(name: str) -> str:
    """Return the name that the file has for a field: ``udp_timeout_seconds`` is ``udpTimeout``."""
    first, *rest = name.removesuffix("_seconds").split("_")
    return first + "".join(_UPPERCASE_WORDS.get(word, word.capitalize()) for word in rest)


class ClientConnection(Struct, frozen=True, rename=file_name):
    """How to reach the API server."""

    kubeconfig: str = ""  # empty and no --master: in-cluster credentials
    accept_content_types: str = ""
    content_type: str = "application/vnd.kubernetes.protobuf"
    qps: float = 5.0
    burst: int = 10


class VModule(Struct, frozen=True, rename=file_name):
    """Another verbosity for the files that match a pattern."""

    file_pattern: str = ""
    verbosity: int = 0


class LogStream(Struct, frozen=True, rename=file_name):
    """Where one log format goes."""

    split_stream: bool = False
    info_buffer_size: Quantity = "0"


class LogOptions(Struct, frozen=True, rename=file_name):
    """The options of each log format."""

    text: LogStream = LogStream()
    json: LogStream = LogStream()


class Logging(Struct, frozen=True, rename=file_name):
    """What is logged, and how."""

    format: str = "text"
    flush_frequency_seconds: Seconds = 5.0
    verbosity: int = 0
    vmodule: tuple[VModule, ...] = ()
    options: LogOptions = LogOptions()


class IPTables(Struct, frozen=True, rename=file_name):
    """Mode iptables; the masquerade fields also count in modes ipvs and userspace."""

    masquerade_bit: int = 14
    masquerade_all: bool = False
    localhost_node_ports: bool = True
    sync_period_seconds: Seconds = 30.0
    min_sync_period_seconds: Seconds = 1.0


class IPVS(Struct, frozen=True, rename=file_name):
    """Mode ipvs. A timeout of zero leaves the kernel's.

    The last two settings are our own: kube-proxy has none of these names.
    """

    sync_period_seconds: Seconds = 30.0
    min_sync_period_seconds: Seconds = 0.0
    scheduler: str = ""
    exclude_cidrs: tuple[str, ...] = ()
    strict_arp: bool = False
    tcp_timeout_seconds: Seconds = 0.0
    tcp_fin_timeout_seconds: Seconds = 0.0
    udp_timeout_seconds: Seconds = 0.0
    bind_addresses: bool = False  # show Service addresses on the device kube-ipvs0
    drain_timeout_seconds: Seconds = 900.0  # for the last connections of an endpoint; 0 cuts them


class NFTables(Struct, frozen=True, rename=file_name):
    """Mode nftables. A sync costs what changed, so that by default none waits for another."""

    masquerade_bit: int = 14
    masquerade_all: bool = False
    sync_period_seconds: Seconds = 30.0
    min_sync_period_seconds: Seconds = 0.0


Capture = Literal["auto", "sk_lookup", "tproxy", "listeners"]
CAPTURES: Final[tuple[Capture, ...]] = ("auto", "sk_lookup", "tproxy", "listeners")
SOCKET_LB: Final = ("auto", "off")
SERVICE_METRICS: Final = ("off", "service", "endpoint")


class Userspace(Struct, frozen=True, rename=file_name):
    """Mode userspace. A block of our own: kube-proxy has no such mode any more."""

    capture: str = "auto"  # how packets for Services come to our sockets
    socket_lb: str = "auto"  # choose the endpoint when a socket connects, where the kernel can
    cgroup: str = ""  # whose processes it is for; empty is the root, in the host's own namespace
    keep_client_address: bool = True  # where the plan says so
    drain_timeout_seconds: Seconds = 5.0  # after SIGTERM, until a successor has taken over
    workers: int = 0  # processes that relay; 0: one for each core, up to 4; 1: this one
    runtime_dir: str = ""  # where a successor finds this process; empty is /run/pyproxy


class Winkernel(Struct, frozen=True, rename=file_name):
    """A mode of Windows: read and ignored."""

    network_name: str = ""
    source_vip: str = ""
    enable_dsr: bool = False
    root_hns_endpoint_name: str = ""
    forward_health_check_vip: bool = False


class DetectLocal(Struct, frozen=True, rename=file_name):
    """What two of the ways to recognise a local pod need to know."""

    bridge_interface: str = ""
    interface_name_prefix: str = ""


class Conntrack(Struct, frozen=True, rename=file_name):
    """Connection tracking; zero leaves the kernel's value."""

    max_per_core: int = 32768
    min: int = 131072
    tcp_established_timeout_seconds: Seconds = 86400.0
    tcp_close_wait_timeout_seconds: Seconds = 3600.0
    tcp_be_liberal: bool = False
    udp_timeout_seconds: Seconds = 0.0
    udp_stream_timeout_seconds: Seconds = 0.0
    end_forbidden_flows: bool = True  # pyproxy's own: those that new, stricter rules forbid


class Config(Struct, frozen=True, rename=file_name):
    """KubeProxyConfiguration v1alpha1. Made from nothing, it holds the defaults."""

    feature_gates: Mapping[str, bool] = field(default_factory=dict)
    client_connection: ClientConnection = ClientConnection()
    logging: Logging = Logging()
    hostname_override: str = ""
    bind_address: str = "0.0.0.0"
    healthz_bind_address: str = f"0.0.0.0:{HEALTHZ_PORT}"
    metrics_bind_address: str = f"127.0.0.1:{METRICS_PORT}"
    bind_address_hard_fail: bool = False
    enable_profiling: bool = False
    show_hidden_metrics_for_version: str = ""
    mode: str = "auto"
    iptables: IPTables = IPTables()
    ipvs: IPVS = IPVS()
    nftables: NFTables = NFTables()
    userspace: Userspace = Userspace()
    winkernel: Winkernel = Winkernel()
    detect_local_mode: str = "ClusterCIDR"
    detect_local: DetectLocal = DetectLocal()
    cluster_cidr: str = ""
    node_port_addresses: tuple[str, ...] = ()
    oom_score_adj: int = -999
    conntrack: Conntrack = Conntrack()
    config_sync_period_seconds: Seconds = 900.0
    port_range: str = ""
    service_metrics: str = "off"  # pyproxy's own: what is counted apart
    cloud_annotations: str = ""  # pyproxy's own: the cloud whose annotations count
    service_proxy_name: str = ""  # pyproxy's own: the label of the only Services to serve
    programmed_annotation_period_seconds: Seconds = 0.0  # pyproxy's own, of the Node; 0: never
    windows_run_as_service: bool = False


# --- defaults -----------------------------------------------------------------------------------

_ZERO_MEANS_DEFAULT: Final = (
    "client_connection.content_type",
    "client_connection.qps",
    "client_connection.burst",
    "logging.format",
    "logging.flush_frequency_seconds",
    "bind_address",
    "mode",
    "iptables.sync_period_seconds",
    "iptables.min_sync_period_seconds",
    "ipvs.sync_period_seconds",
    "nftables.sync_period_seconds",
    "userspace.capture",
    "userspace.socket_lb",
    "detect_local_mode",
    "service_metrics",
    "config_sync_period_seconds",
)


def with_defaults(config: Config) -> Config:
    """Fill in what a file leaves empty or zero, as kube-proxy does."""
    defaults = Config()
    for path in _ZERO_MEANS_DEFAULT:
        if not setting(config, path):
            config = with_setting(config, path, setting(defaults, path))
    ipv6 = ":" in config.bind_address
    healthz = config.healthz_bind_address or ("::" if ipv6 else "0.0.0.0")
    metrics = config.metrics_bind_address or ("::1" if ipv6 else "127.0.0.1")
    return replace(
        config,
        healthz_bind_address=with_port(healthz, HEALTHZ_PORT),
        metrics_bind_address=with_port(metrics, METRICS_PORT),
    )


def with_mode(config: Config, mode: str) -> Config:
    """Return the settings for this mode, with the defaults that depend on it."""
    addresses = config.node_port_addresses
    if mode in PRIMARY_BY_DEFAULT and not addresses:
        addresses = (PRIMARY,)
    return replace(config, mode=mode, node_port_addresses=addresses)


def setting(values: Struct, path: str) -> object:
    """Return what a dotted path such as ``conntrack.min`` leads to."""
    found: object = values
    for name in path.split("."):
        found = getattr(found, name)
    return found


def with_setting(values: S, path: str, value: object) -> S:
    """Return the settings with another value at a dotted path."""
    name, _, rest = path.partition(".")
    inner = getattr(values, name)
    return replace(values, **{name: with_setting(inner, rest, value) if rest else value})


# --- feature gates ------------------------------------------------------------------------------


class Gate(NamedTuple):
    """A feature gate: what it is without being set, and whether it may be set otherwise."""

    default: bool
    stage: Literal["alpha", "beta", "stable", "locked", "group"]


GATES: Final[Mapping[str, Gate]] = {
    "AllAlpha": Gate(False, "group"),
    "AllBeta": Gate(False, "group"),
    "AllowServiceExternalIPs": Gate(True, "stable"),
    "ComponentFlagz": Gate(True, "beta"),
    "ComponentStatusz": Gate(True, "beta"),
    "LoggingAlphaOptions": Gate(False, "alpha"),
    "LoggingBetaOptions": Gate(True, "beta"),
    "MultiCIDRServiceAllocator": Gate(True, "locked"),
    "NFTablesProxyMode": Gate(True, "locked"),
    "NativeHistograms": Gate(False, "alpha"),
    "PreferSameTrafficDistribution": Gate(True, "locked"),
}


def gate(config: Config, name: str) -> bool:
    """Say whether a feature is on."""
    known = GATES[name]
    group = {"alpha": "AllAlpha", "beta": "AllBeta"}.get(known.stage, "")
    by_group = config.feature_gates.get(group, known.default)
    return config.feature_gates.get(name, by_group)


# --- decisions ----------------------------------------------------------------------------------


def node_name(config: Config, hostname: str) -> str:
    """Return the name of this Node."""
    name = (config.hostname_override or hostname).strip().lower()
    if not name:
        source = "hostnameOverride" if config.hostname_override else "hostname"
        raise ConfigError(f"{source}: the name of this node is empty")
    return name


def sync_periods(config: Config, mode: str) -> tuple[float, float]:
    """Return the longest and the shortest time between two syncs, in seconds.

    Mode userspace has no block of its own and no shortest time: a sync costs what changed.
    """
    if mode == "userspace":
        return config.iptables.sync_period_seconds, 0.0
    blocks: Mapping[str, IPVS | NFTables] = {"ipvs": config.ipvs, "nftables": config.nftables}
    block = blocks.get(mode, config.iptables)
    return block.sync_period_seconds, block.min_sync_period_seconds


def masquerade_all(config: Config, mode: str) -> bool:
    return (config.nftables if mode == "nftables" else config.iptables).masquerade_all


def is_beside(config: Config) -> bool:
    """Say whether another proxy serves the node, and this one only the Services with its name.

    What no Service of ours has is then not ours to answer, to set or to remove.
    """
    return bool(config.service_proxy_name)


class NodeIPs(NamedTuple):
    """This node's address in each family; a loopback address stands in for one not known."""

    primary: Family
    ip4: str
    ip6: str


def detect_node_ips(config: Config, known: Sequence[str]) -> NodeIPs:
    """Choose the node's addresses from those the Node has and the bind address, which wins."""
    bind = config.bind_address
    if is_ip(bind) and not (ip := ip_address(bind)).is_unspecified:
        known = (str(ip), *known)
    by_family = {family_of(ip): ip for ip in reversed(known)}  # the first of each family
    primary = family_of(known[0]) if known else 4
    return NodeIPs(primary, by_family.get(4, "127.0.0.1"), by_family.get(6, "::1"))


def node_port_cidrs(
    config: Config, family: Family, node_ips: Sequence[str]
) -> tuple[Network, ...] | None:
    """Return the ranges whose addresses serve node ports; None is every address of the node."""
    cidrs = config.node_port_addresses
    if cidrs == (PRIMARY,):
        of_family = (ip for ip in node_ips if family_of(ip) == family)
        first = next((ip for ip in of_family if not ip_address(ip).is_loopback), None)
        cidrs = (f"{first}/{32 if family == 4 else 128}",) if first else ()
    networks = networks_of(cidrs, family)
    return None if not networks or any(n.prefixlen == 0 for n in networks) else networks


def local_cidr(config: Config, family: Family, node: Node | None) -> Network | None:
    """Return the range of local pods, where this is how they are recognised."""
    cidrs: Sequence[str] = ()
    if config.detect_local_mode == "ClusterCIDR":
        cidrs = cluster_cidrs(config)
    elif config.detect_local_mode == "NodeCIDR" and node is not None:
        cidrs = node.pod_cidrs
    return next(iter(networks_of(cidrs, family)), None)


def local_pods(
    config: Config, family: Family, node: Node | None, any_suffix: str
) -> Network | str | None:
    """Return what rules recognise local pods by: a range, or an interface (perhaps a pattern)."""
    match config.detect_local_mode:
        case "BridgeInterface":
            return config.detect_local.bridge_interface
        case "InterfaceNamePrefix":
            return f"{config.detect_local.interface_name_prefix}{any_suffix}"
        case _:
            return local_cidr(config, family, node)


def cluster_cidrs(config: Config) -> tuple[str, ...]:
    return tuple(config.cluster_cidr.split(",")) if config.cluster_cidr else ()


def networks_of(cidrs: Sequence[str], family: Family) -> tuple[Network, ...]:
    """Return the networks of one family, in order; what is not a CIDR is skipped."""
    networks = (parse_cidr(cidr) for cidr in cidrs)
    return tuple(n for n in networks if n is not None and n.version == family)
