"""What is wrong with settings, and what is only worth a word at the start."""

import re
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from msgspec.structs import replace

from pyproxy.config import (
    CAPTURES,
    CLOUDS,
    DETECT_LOCAL_MODES,
    GATES,
    HEALTHZ_PORT,
    IPVS,
    METRICS_PORT,
    MODES,
    PRIMARY,
    SERVICE_METRICS,
    SOCKET_LB,
    Config,
    LogOptions,
    Userspace,
    VModule,
    Winkernel,
    cluster_cidrs,
    file_name,
    gate,
    is_beside,
    networks_of,
    setting,
)
from pyproxy.config.text import (
    address_problem,
    did_you_mean,
    duration_text,
    is_ip,
    parse_cidr,
    split_address,
)
from pyproxy.model import Family, family_of

LOG_FORMATS: Final = ("text", "json")
# Metrics are hidden a release before they go; this is the release before the one we stand for.
HIDDEN_METRICS_VERSION: Final = "1.35"

_RANGES: Final = (
    ("iptables.masquerade_bit", 0, 31),
    ("nftables.masquerade_bit", 0, 31),
    ("oom_score_adj", -1000, 1000),
    ("userspace.workers", 0, 64),
)
_NOT_NEGATIVE: Final = (
    "client_connection.burst",
    "logging.flush_frequency_seconds",
    "logging.verbosity",
    "conntrack.max_per_core",
    "conntrack.min",
    "conntrack.tcp_established_timeout_seconds",
    "conntrack.tcp_close_wait_timeout_seconds",
    "conntrack.udp_timeout_seconds",
    "conntrack.udp_stream_timeout_seconds",
    "userspace.drain_timeout_seconds",
)
SHORTEST_ANNOTATION_SECONDS: Final = 5.0  # each node writes; the API server has the sum
_NOT_NEGATIVE_IN_IPVS: Final = (
    "ipvs.tcp_timeout_seconds",
    "ipvs.tcp_fin_timeout_seconds",
    "ipvs.udp_timeout_seconds",
    "ipvs.drain_timeout_seconds",
)
_NEEDED_TO_DETECT: Final = {
    "BridgeInterface": "detect_local.bridge_interface",
    "InterfaceNamePrefix": "detect_local.interface_name_prefix",
}
_WHY_NOT_BESIDE: Final = {
    "iptables": "its chains are kube-proxy's own",
    "ipvs": "kube-proxy removes virtual servers that it does not know",
}
_LABEL_VALUE: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_QUANTITY: Final = re.compile(r"\d+(\.\d+)?([kMGTPE]|[KMGTPE]i)?")


def validate(config: Config) -> tuple[str, ...]:
    """Return everything that is wrong, each as ``field: message``."""
    return (
        *_gate_problems(config),
        *_number_problems(config),
        *_logging_problems(config),
        *_address_problems(config),
        *_mode_problems(config),
        *_period_problems(config),
        *_ipvs_problems(config),
        *_detect_local_problems(config),
        *_own_problems(config),
        *_beside_problems(config),
        *_node_port_problems(config.node_port_addresses),
    )


def _gate_problems(config: Config) -> Iterator[str]:
    for name, on in config.feature_gates.items():
        known = GATES.get(name)
        if known is not None and known.stage == "locked" and on != known.default:
            yield f"featureGates: {name} is always {_text(known.default)} and cannot be changed"


def _number_problems(config: Config) -> Iterator[str]:
    for path, low, high in _RANGES:
        value = _number(config, path)
        if not low <= value <= high:
            yield f"{_field(path)}: {value} is not between {low} and {high}"
    yield from _negative(config, _NOT_NEGATIVE)
    if config.config_sync_period_seconds <= 0:
        yield _not_positive("config_sync_period_seconds", config.config_sync_period_seconds)


def _logging_problems(config: Config) -> Iterator[str]:
    logging = config.logging
    if logging.format not in LOG_FORMATS:
        yield f"logging.format: {_not_one_of(logging.format, LOG_FORMATS)}"
    elif logging.vmodule and logging.format != "text":
        yield "logging.vmodule: works with the format text only"
    yield from _vmodule_problems(logging.vmodule)
    if logging.options != LogOptions() and not gate(config, "LoggingAlphaOptions"):
        yield "logging.options: need the feature gate LoggingAlphaOptions"
    for name, stream in (("text", logging.options.text), ("json", logging.options.json)):
        if not _QUANTITY.fullmatch(stream.info_buffer_size):
            size = stream.info_buffer_size
            yield f'logging.options.{name}.infoBufferSize: "{size}" is not a size such as 64Ki'


def _vmodule_problems(vmodule: Sequence[VModule]) -> Iterator[str]:
    for index, item in enumerate(vmodule):
        path = f"logging.vmodule[{index}]"
        if not item.file_pattern or set(item.file_pattern) & set(",="):
            yield f'{path}.filePattern: "{item.file_pattern}" is not a name or pattern of a file'
        if item.verbosity < 0:
            yield f"{path}.verbosity: {item.verbosity} is negative"


def _address_problems(config: Config) -> Iterator[str]:
    if not is_ip(config.bind_address):
        yield f'bindAddress: "{config.bind_address}" is not an IP address'
    if config.healthz_bind_address and (problem := address_problem(config.healthz_bind_address)):
        yield f"healthzBindAddress: {problem}"
    if problem := address_problem(config.metrics_bind_address):
        yield f"metricsBindAddress: {problem}"
    version = config.show_hidden_metrics_for_version
    if version not in ("", HIDDEN_METRICS_VERSION):
        yield (
            f'showHiddenMetricsForVersion: "{version}" is not {HIDDEN_METRICS_VERSION}, '
            "the only version that means something"
        )


def _mode_problems(config: Config) -> Iterator[str]:
    if config.mode not in MODES:
        yield f"mode: {_not_one_of(config.mode, MODES)}"
    own = config.userspace
    if own.capture not in CAPTURES:
        yield f"userspace.capture: {_not_one_of(own.capture, CAPTURES)}"
    if own.socket_lb not in SOCKET_LB:
        yield f"userspace.socketLB: {_not_one_of(own.socket_lb, SOCKET_LB)}"
    if own.cgroup and not own.cgroup.startswith("/"):
        yield f'userspace.cgroup: "{own.cgroup}" is not an absolute path'
    if own.runtime_dir and not own.runtime_dir.startswith("/"):
        yield f'userspace.runtimeDir: "{own.runtime_dir}" is not an absolute path'


def _period_problems(config: Config) -> Iterator[str]:
    blocks = {"ipvs": ("ipvs",), "nftables": ("nftables",), "auto": ("iptables", "nftables")}
    for block in blocks.get(config.mode, ("iptables",)):
        longest = _number(config, f"{block}.sync_period_seconds")
        shortest = _number(config, f"{block}.min_sync_period_seconds")
        if longest <= 0:
            yield _not_positive(f"{block}.sync_period_seconds", longest)
        yield from _negative(config, (f"{block}.min_sync_period_seconds",))
        if shortest > longest:
            yield (
                f"{block}.minSyncPeriod: {duration_text(shortest)} is longer than "
                f"{block}.syncPeriod, {duration_text(longest)}"
            )


def _ipvs_problems(config: Config) -> Iterator[str]:
    if config.mode == "ipvs":
        yield from _negative(config, _NOT_NEGATIVE_IN_IPVS)
        yield from _cidr_problems("ipvs.excludeCIDRs", config.ipvs.exclude_cidrs)


def _own_problems(config: Config) -> Iterator[str]:
    if config.service_metrics not in SERVICE_METRICS:
        yield f"serviceMetrics: {_not_one_of(config.service_metrics, SERVICE_METRICS)}"
    if config.cloud_annotations not in CLOUDS:
        yield f"cloudAnnotations: {_not_one_of(config.cloud_annotations, CLOUDS[1:])}"
    period = config.programmed_annotation_period_seconds
    if period and period < SHORTEST_ANNOTATION_SECONDS:
        shortest = duration_text(SHORTEST_ANNOTATION_SECONDS)
        yield f"programmedAnnotationPeriod: {duration_text(period)} is less than {shortest}"


def _beside_problems(config: Config) -> Iterator[str]:
    name = config.service_proxy_name
    if name and not _LABEL_VALUE.fullmatch(name):
        yield f'serviceProxyName: "{name}" is not what a label can have for a value'
    reason = _WHY_NOT_BESIDE.get(config.mode)
    if name and reason:
        yield f"serviceProxyName: mode {config.mode} cannot be beside another proxy: {reason}"


def _detect_local_problems(config: Config) -> Iterator[str]:
    mode = config.detect_local_mode
    if mode not in DETECT_LOCAL_MODES:
        yield f"detectLocalMode: {_not_one_of(mode, DETECT_LOCAL_MODES)}"
    if mode == "ClusterCIDR":
        yield from _cluster_cidr_problems(cluster_cidrs(config))
    needed = _NEEDED_TO_DETECT.get(mode)
    if needed and not setting(config, needed):
        yield f"{_field(needed)}: is needed by detectLocalMode {mode}"


def _cluster_cidr_problems(cidrs: Sequence[str]) -> Iterator[str]:
    problems = [problem for cidr in cidrs for problem in _cidr_problem("clusterCIDR", cidr)]
    yield from problems
    if not problems and (len(cidrs) > 2 or len({family_of(cidr) for cidr in cidrs}) < len(cidrs)):
        yield f'clusterCIDR: "{",".join(cidrs)}" has more than one range of a family'


def _node_port_problems(cidrs: Sequence[str]) -> Iterator[str]:
    for index, cidr in enumerate(cidrs):
        path = f"nodePortAddresses[{index}]"
        if cidr != PRIMARY:
            yield from _cidr_problem(path, cidr)
        elif len(cidrs) > 1:
            yield f'{path}: "{PRIMARY}" stands alone or not at all'


def _cidr_problems(path: str, cidrs: Sequence[str]) -> Iterator[str]:
    for index, cidr in enumerate(cidrs):
        yield from _cidr_problem(f"{path}[{index}]", cidr)


def _cidr_problem(path: str, cidr: str) -> Iterator[str]:
    if parse_cidr(cidr) is None:
        yield f'{path}: "{cidr}" is not a CIDR such as 10.0.0.0/8 or fd00::/64'


def _number(config: Config, path: str) -> float:
    value = setting(config, path)
    assert isinstance(value, int | float), f"{path} is in a table of numbers"
    return value


def _negative(config: Config, paths: Sequence[str]) -> Iterator[str]:
    for path in paths:
        value = _number(config, path)
        if value < 0:
            yield f"{_field(path)}: {_shown(path, value)} is negative"


def _not_positive(path: str, value: float) -> str:
    return f"{_field(path)}: {_shown(path, value)} is not more than zero"


def _not_one_of(name: str, known: Sequence[str]) -> str:
    return f'"{name}" is not one of {", ".join(known)}{did_you_mean(name, known)}'


def _field(path: str) -> str:
    return ".".join(file_name(name) for name in path.split("."))


def _shown(path: str, value: float) -> str:
    return duration_text(value) if path.endswith("_seconds") else str(value)


def _text(value: bool) -> str:
    return "true" if value else "false"


# --- warnings -----------------------------------------------------------------------------------


def warnings(config: Config) -> tuple[str, ...]:
    """Return what an operator may want to change, though it works."""
    return tuple(_warnings(config))


def other_defaults(config: Config) -> Iterator[str]:
    """Yield where what is not set means something else to kube-proxy, in the mode that is."""
    if config.mode == "ipvs" and not config.node_port_addresses:
        yield (
            "nodePortAddresses: unset, which in mode ipvs is the node's primary addresses, as in "
            "mode nftables; kube-proxy's mode ipvs has all: 0.0.0.0/0 and ::/0"
        )


def _warnings(config: Config) -> Iterator[str]:
    if not config.node_port_addresses:
        yield (
            "nodePortAddresses: unset, so node ports answer on every address of the node; "
            '"primary" would keep them to the node\'s own'
        )
    for name in config.feature_gates.keys() - GATES.keys():
        # kube-proxy knows the gates of all of Kubernetes, and clusters give it the whole list.
        yield f'featureGates: "{name}" means nothing here{did_you_mean(name, GATES)}'
    if config.mode not in ("auto", "ipvs") and _ipvs_is_set(config.ipvs):
        yield f"ipvs: is accepted, and has no effect in mode {config.mode}"
    if config.mode not in ("auto", "userspace") and config.userspace != Userspace():
        yield f"userspace: is accepted, and has no effect in mode {config.mode}"
    if config.winkernel != Winkernel() or config.windows_run_as_service:
        yield "winkernel: is accepted, and has no effect on Linux"
    yield from _beside_warnings(config)
    if config.port_range:
        yield "portRange: is accepted, and has no effect any more"


def _beside_warnings(config: Config) -> Iterator[str]:
    if not is_beside(config):
        return
    ports = {"healthz_bind_address": HEALTHZ_PORT, "metrics_bind_address": METRICS_PORT}
    for path, port in ports.items():
        host = split_address(str(setting(config, path)))
        if host and host[1] == str(port):
            yield (
                f"{_field(path)}: port {port} is that of the proxy that serves the other Services; "
                "give this one another"
            )


def _ipvs_is_set(ipvs: IPVS) -> bool:
    """Say whether more is set than the periods, which people set in every block alike."""
    return IPVS() != replace(
        ipvs,
        sync_period_seconds=IPVS().sync_period_seconds,
        min_sync_period_seconds=IPVS().min_sync_period_seconds,
    )


class FamilyProblems(NamedTuple):
    """Settings of a family that the node does not have: to be told, and reasons to stop."""

    warnings: tuple[str, ...]
    errors: tuple[str, ...]


def family_problems(
    config: Config, primary: Family, pod_cidrs: Sequence[str], *, dual_stack: bool
) -> FamilyProblems:
    """Compare settings with the families that this node serves."""
    told: list[str] = []
    fatal: list[str] = []
    here = f"IPv{primary}"
    by_cluster = config.detect_local_mode == "ClusterCIDR"
    if _all_of_other_family(cluster_cidrs(config), primary):
        stop = by_cluster and not dual_stack
        (fatal if stop else told).append(
            f'clusterCIDR: "{config.cluster_cidr}" has no {here} range, and this node is {here}'
        )
    if _all_of_other_family(pod_cidrs, primary):
        (fatal if config.detect_local_mode == "NodeCIDR" else told).append(
            f"the podCIDRs of the Node, {', '.join(pod_cidrs)}, have no {here} range"
        )
    told += _node_port_family_warnings(config, primary, pod_cidrs)
    if not dual_stack:
        told += _single_stack_warnings(config, primary)
    return FamilyProblems(tuple(told), tuple(fatal))


def _node_port_family_warnings(
    config: Config, primary: Family, pod_cidrs: Sequence[str]
) -> Iterator[str]:
    cidrs = [cidr for cidr in config.node_port_addresses if cidr != PRIMARY]
    if not cidrs:
        return
    other: Family = 6 if primary == 4 else 4
    pods = (*cluster_cidrs(config), *pod_cidrs)
    if not networks_of(cidrs, primary):
        yield f"nodePortAddresses: no IPv{primary} range, so all IPv{primary} addresses serve"
    elif networks_of(pods, other) and not networks_of(cidrs, other):
        yield f"nodePortAddresses: no IPv{other} range, so all IPv{other} addresses serve"


def _single_stack_warnings(config: Config, primary: Family) -> Iterator[str]:
    if _all_of_other_family(config.ipvs.exclude_cidrs, primary):
        yield f"ipvs.excludeCIDRs: no IPv{primary} range, and this node is IPv{primary} only"
    for path in ("healthz_bind_address", "metrics_bind_address"):
        host = split_address(str(setting(config, path)))
        if host and host[0] not in ("0.0.0.0", "::") and family_of(host[0]) != primary:
            yield f"{_field(path)}: is not an IPv{primary} address, as all of this node are"


def _all_of_other_family(cidrs: Sequence[str], family: Family) -> bool:
    return bool(cidrs) and not networks_of(cidrs, family)
