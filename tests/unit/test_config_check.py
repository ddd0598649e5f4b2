# ruff: noqa: E501 - a row of the table is a setting and the line that a user reads
import pytest

from pyproxy.config import Config, VModule, with_mode, with_setting
from pyproxy.config.check import FamilyProblems, family_problems, validate, warnings


def config_with(**settings):
    """Build from paths, ``__`` for the dot: ``conntrack__min=-1``."""
    config = Config()
    for path, value in settings.items():
        config = with_setting(config, path.replace("__", "."), value)
    return config


CASES = [
    (
        {"service_proxy_name": "a b"},
        'serviceProxyName: "a b" is not what a label can have for a value',
    ),
    (
        {"service_proxy_name": "a", "mode": "iptables"},
        "serviceProxyName: mode iptables cannot be beside another proxy: its chains are kube-proxy's own",
    ),
    (
        {"service_proxy_name": "a", "mode": "ipvs"},
        "serviceProxyName: mode ipvs cannot be beside another proxy: kube-proxy removes virtual servers that it does not know",
    ),
    (
        {"feature_gates": {"NFTablesProxyMode": False}},
        "featureGates: NFTablesProxyMode is always true and cannot be changed",
    ),
    ({"client_connection__burst": -1}, "clientConnection.burst: -1 is negative"),
    ({"logging__format": "xml"}, 'logging.format: "xml" is not one of text, json'),
    ({"logging__verbosity": -1}, "logging.verbosity: -1 is negative"),
    ({"logging__flush_frequency_seconds": -1.0}, "logging.flushFrequency: -1s is negative"),
    (
        {"logging__vmodule": (VModule("a=b", 1),)},
        'logging.vmodule[0].filePattern: "a=b" is not a name or pattern of a file',
    ),
    (
        {"logging__vmodule": (VModule("", 1),)},
        'logging.vmodule[0].filePattern: "" is not a name or pattern of a file',
    ),
    ({"logging__vmodule": (VModule("a", -1),)}, "logging.vmodule[0].verbosity: -1 is negative"),
    (
        {"logging__vmodule": (VModule("a", 1),), "logging__format": "json"},
        "logging.vmodule: works with the format text only",
    ),
    (
        {"logging__options__json__split_stream": True},
        "logging.options: need the feature gate LoggingAlphaOptions",
    ),
    (
        {
            "logging__options__text__info_buffer_size": "1 K",
            "feature_gates": {"LoggingAlphaOptions": True},
        },
        'logging.options.text.infoBufferSize: "1 K" is not a size such as 64Ki',
    ),
    ({"bind_address": "0.0.0"}, 'bindAddress: "0.0.0" is not an IP address'),
    ({"healthz_bind_address": "127.0.0.1"}, 'healthzBindAddress: "127.0.0.1" is not IP:port'),
    (
        {"healthz_bind_address": "127.0.0.1:0"},
        'healthzBindAddress: "0" is not a port between 1 and 65535',
    ),
    ({"metrics_bind_address": ""}, 'metricsBindAddress: "" is not IP:port'),
    ({"metrics_bind_address": "here:1"}, 'metricsBindAddress: "here" is not an IP address'),
    (
        {"show_hidden_metrics_for_version": "1.30"},
        'showHiddenMetricsForVersion: "1.30" is not 1.35, the only version that means something',
    ),
    (
        {"mode": "nftable"},
        'mode: "nftable" is not one of auto, userspace, iptables, nftables, ipvs (did you mean nftables?)',
    ),
    (
        {"mode": "kernelspace"},
        'mode: "kernelspace" is not one of auto, userspace, iptables, nftables, ipvs (did you mean userspace?)',
    ),
    ({"iptables__masquerade_bit": 99}, "iptables.masqueradeBit: 99 is not between 0 and 31"),
    (
        {"iptables__masquerade_bit": -1, "mode": "ipvs"},
        "iptables.masqueradeBit: -1 is not between 0 and 31",
    ),
    ({"nftables__masquerade_bit": 32}, "nftables.masqueradeBit: 32 is not between 0 and 31"),
    (
        {
            "mode": "iptables",
            "iptables__sync_period_seconds": -1.0,
            "iptables__min_sync_period_seconds": -1.0,
        },
        "iptables.syncPeriod: -1s is not more than zero",
        "iptables.minSyncPeriod: -1s is negative",
    ),
    (
        {"mode": "userspace", "iptables__min_sync_period_seconds": 31.0},
        "iptables.minSyncPeriod: 31s is longer than iptables.syncPeriod, 30s",
    ),
    (
        {"nftables__sync_period_seconds": 0.5, "nftables__min_sync_period_seconds": 1.0}
        | {"mode": "nftables"},
        "nftables.minSyncPeriod: 1s is longer than nftables.syncPeriod, 500ms",
    ),
    (
        {"mode": "ipvs", "ipvs__sync_period_seconds": 0.0},
        "ipvs.syncPeriod: 0s is not more than zero",
    ),
    (
        {
            "mode": "auto",
            "iptables__min_sync_period_seconds": 60.0,
            "nftables__min_sync_period_seconds": 60.0,
        },
        "iptables.minSyncPeriod: 1m0s is longer than iptables.syncPeriod, 30s",
        "nftables.minSyncPeriod: 1m0s is longer than nftables.syncPeriod, 30s",
    ),
    ({"mode": "ipvs", "ipvs__tcp_timeout_seconds": -1.0}, "ipvs.tcpTimeout: -1s is negative"),
    (
        {"mode": "ipvs", "ipvs__tcp_fin_timeout_seconds": -1.0},
        "ipvs.tcpFinTimeout: -1s is negative",
    ),
    ({"mode": "ipvs", "ipvs__udp_timeout_seconds": -1.0}, "ipvs.udpTimeout: -1s is negative"),
    ({"mode": "ipvs", "ipvs__drain_timeout_seconds": -1.0}, "ipvs.drainTimeout: -1s is negative"),
    (
        {"userspace__capture": "sk_lookups"},
        'userspace.capture: "sk_lookups" is not one of auto, sk_lookup, tproxy, listeners'
        " (did you mean sk_lookup?)",
    ),
    ({"userspace__socket_lb": "on"}, 'userspace.socketLB: "on" is not one of auto, off'),
    (
        {"programmed_annotation_period_seconds": 1.0},
        "programmedAnnotationPeriod: 1s is less than 5s",
    ),
    ({"userspace__drain_timeout_seconds": -1.0}, "userspace.drainTimeout: -1s is negative"),
    ({"userspace__workers": 65}, "userspace.workers: 65 is not between 0 and 64"),
    (
        {"userspace__runtime_dir": "run"},
        'userspace.runtimeDir: "run" is not an absolute path',
    ),
    (
        {"mode": "ipvs", "ipvs__exclude_cidrs": ("10.0.0.0/8", "10.0.0.1")},
        'ipvs.excludeCIDRs[1]: "10.0.0.1" is not a CIDR such as 10.0.0.0/8 or fd00::/64',
    ),
    (
        {"detect_local_mode": "clustercidr"},
        'detectLocalMode: "clustercidr" is not one of ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix (did you mean ClusterCIDR?)',
    ),
    (
        {"detect_local_mode": "BridgeInterface"},
        "detectLocal.bridgeInterface: is needed by detectLocalMode BridgeInterface",
    ),
    (
        {"detect_local_mode": "InterfaceNamePrefix"},
        "detectLocal.interfaceNamePrefix: is needed by detectLocalMode InterfaceNamePrefix",
    ),
    (
        {"cluster_cidr": "10.0.0.0"},
        'clusterCIDR: "10.0.0.0" is not a CIDR such as 10.0.0.0/8 or fd00::/64',
    ),
    (
        {"cluster_cidr": "10.0.0.0/8, fd00::/8"},
        'clusterCIDR: " fd00::/8" is not a CIDR such as 10.0.0.0/8 or fd00::/64',
    ),
    (
        {"cluster_cidr": "10.0.0.0/8,11.0.0.0/8"},
        'clusterCIDR: "10.0.0.0/8,11.0.0.0/8" has more than one range of a family',
    ),
    (
        {"cluster_cidr": "10.0.0.0/8,fd00::/8,11.0.0.0/8"},
        'clusterCIDR: "10.0.0.0/8,fd00::/8,11.0.0.0/8" has more than one range of a family',
    ),
    (
        {"node_port_addresses": ("10.20.30.40",)},
        'nodePortAddresses[0]: "10.20.30.40" is not a CIDR such as 10.0.0.0/8 or fd00::/64',
    ),
    (
        {"node_port_addresses": ("10.0.0.0/8", "::1", "0")},
        'nodePortAddresses[1]: "::1" is not a CIDR such as 10.0.0.0/8 or fd00::/64',
        'nodePortAddresses[2]: "0" is not a CIDR such as 10.0.0.0/8 or fd00::/64',
    ),
    (
        {"node_port_addresses": ("primary", "10.0.0.0/8")},
        'nodePortAddresses[0]: "primary" stands alone or not at all',
    ),
    (
        {"node_port_addresses": ("10.0.0.0/8", "primary")},
        'nodePortAddresses[1]: "primary" stands alone or not at all',
    ),
    ({"oom_score_adj": -1001}, "oomScoreAdj: -1001 is not between -1000 and 1000"),
    ({"conntrack__max_per_core": -1}, "conntrack.maxPerCore: -1 is negative"),
    ({"conntrack__min": -1}, "conntrack.min: -1 is negative"),
    (
        {"conntrack__tcp_established_timeout_seconds": -1.0},
        "conntrack.tcpEstablishedTimeout: -1s is negative",
    ),
    (
        {"conntrack__tcp_close_wait_timeout_seconds": -1.0},
        "conntrack.tcpCloseWaitTimeout: -1s is negative",
    ),
    ({"conntrack__udp_timeout_seconds": -1.0}, "conntrack.udpTimeout: -1s is negative"),
    (
        {"conntrack__udp_stream_timeout_seconds": -1.0},
        "conntrack.udpStreamTimeout: -1s is negative",
    ),
    ({"config_sync_period_seconds": 0.0}, "configSyncPeriod: 0s is not more than zero"),
]


@pytest.mark.parametrize(
    ("settings", "problems"),
    [pytest.param(settings, problems, id=problems[0]) for settings, *problems in CASES],
)
def test_what_is_wrong_is_named(settings, problems):
    assert list(validate(config_with(**settings))) == problems


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="nothing given"),
        pytest.param({"service_proxy_name": "a.b-c_1", "mode": "nftables"}, id="beside another"),
        pytest.param({"mode": "userspace"}, id="pyproxy's own mode"),
        pytest.param({"mode": "ipvs", "ipvs__scheduler": "mh"}, id="schedulers are probed later"),
        pytest.param({"healthz_bind_address": ""}, id="E104 no health server"),
        pytest.param({"feature_gates": {"NFTablesProxyMode": True}}, id="locked gate as it is"),
        pytest.param(
            {"mode": "ipvs", "iptables__min_sync_period_seconds": 99.0}, id="block unused"
        ),
        pytest.param({"mode": "iptables", "ipvs__tcp_timeout_seconds": -1.0}, id="ipvs unused"),
        pytest.param({"mode": "iptables", "ipvs__exclude_cidrs": ("x",)}, id="ipvs ranges unused"),
        pytest.param({"cluster_cidr": "fd00::/8,10.0.0.0/8"}, id="E110 reversed"),
        pytest.param({"cluster_cidr": "x", "detect_local_mode": "NodeCIDR"}, id="range unused"),
        pytest.param(
            {"detect_local_mode": "BridgeInterface", "detect_local__bridge_interface": "cni0"},
            id="bridge",
        ),
        pytest.param({"node_port_addresses": ("primary",)}, id="primary"),
        pytest.param({"node_port_addresses": ("10.0.0.0/8", "::/0")}, id="ranges"),
        pytest.param({"show_hidden_metrics_for_version": "1.35"}, id="previous release"),
        pytest.param({"conntrack__max_per_core": 0, "conntrack__min": 0}, id="leave conntrack"),
        pytest.param({"iptables__min_sync_period_seconds": 0.0}, id="at once"),
        pytest.param(
            {"feature_gates": {"AllAlpha": True}, "logging__options__json__split_stream": True},
            id="alpha logging",
        ),
        pytest.param({"port_range": "what ever"}, id="unused"),
    ],
)
def test_what_is_allowed_has_no_problem(settings):
    assert validate(config_with(**settings)) == ()


def test_all_problems_are_reported_together():
    config = config_with(mode="x", oom_score_adj=2000, conntrack__min=-5)
    assert [problem.partition(":")[0] for problem in validate(config)] == [
        "oomScoreAdj",
        "conntrack.min",
        "mode",
    ]


@pytest.mark.parametrize(
    ("mode", "settings", "expected"),
    [
        ("iptables", {}, ["nodePortAddresses"]),
        ("nftables", {}, []),
        ("iptables", {"node_port_addresses": ("primary",)}, []),
        ("ipvs", {}, []),
        ("nftables", {"feature_gates": {"NativeHistogram": True}}, ["featureGates"]),
        ("nftables", {"ipvs__scheduler": "rr"}, ["ipvs"]),
        ("nftables", {"userspace__capture": "tproxy"}, ["userspace"]),
        pytest.param(
            "nftables", {"ipvs__min_sync_period_seconds": 9.0}, [], id="period everywhere"
        ),
        pytest.param("auto", {"ipvs__strict_arp": True}, ["nodePortAddresses"], id="not yet known"),
        ("nftables", {"winkernel__enable_dsr": True}, ["winkernel"]),
        ("nftables", {"windows_run_as_service": True}, ["winkernel"]),
        ("nftables", {"port_range": "1-2"}, ["portRange"]),
    ],
)
def test_what_may_surprise_is_told(mode, settings, expected):
    told = warnings(with_mode(config_with(**settings), mode))
    assert [line.partition(":")[0] for line in told] == expected


FOUR, SIX, BOTH = "10.0.0.0/8", "fd00::/8", "10.0.0.0/8,fd00::/8"


@pytest.mark.parametrize(
    ("mode", "cluster_cidr", "pod_cidrs", "dual_stack", "warned", "fatal"),
    [
        pytest.param("ClusterCIDR", BOTH, (), False, False, False, id="both"),
        pytest.param("ClusterCIDR", FOUR, (), False, False, False, id="right one"),
        pytest.param("ClusterCIDR", SIX, (), True, True, False, id="E110 wrong, dual-stack"),
        pytest.param("ClusterCIDR", SIX, (), False, False, True, id="E110 wrong, single-stack"),
        pytest.param("NodeCIDR", SIX, (FOUR,), False, True, False, id="wrong, but not used"),
        pytest.param("NodeCIDR", "", (SIX,), True, False, True, id="pods of the wrong family"),
        pytest.param("ClusterCIDR", "", (SIX,), True, True, False, id="pods not used"),
    ],
)
def test_ranges_of_a_family_that_is_not_there(
    mode, cluster_cidr, pod_cidrs, dual_stack, warned, fatal
):
    config = config_with(detect_local_mode=mode, cluster_cidr=cluster_cidr)
    problems = family_problems(config, 4, pod_cidrs, dual_stack=dual_stack)
    assert (bool(problems.warnings), bool(problems.errors)) == (warned, fatal)


@pytest.mark.parametrize(
    ("settings", "dual_stack", "expected"),
    [
        ({"node_port_addresses": (SIX,)}, True, "nodePortAddresses: no IPv4 range"),
        (
            {"node_port_addresses": (FOUR,), "cluster_cidr": BOTH},
            True,
            "nodePortAddresses: no IPv6 range",
        ),
        ({"ipvs__exclude_cidrs": (SIX,)}, False, "ipvs.excludeCIDRs"),
        ({"healthz_bind_address": "[fd00::1]:1"}, False, "healthzBindAddress"),
        ({"metrics_bind_address": "[::1]:1"}, False, "metricsBindAddress"),
    ],
)
def test_other_settings_of_that_family_are_told_only(settings, dual_stack, expected):
    problems = family_problems(config_with(**settings), 4, (), dual_stack=dual_stack)
    assert len(problems.warnings) == 1
    assert problems.warnings[0].startswith(expected)
    assert problems.errors == ()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"node_port_addresses": ("primary",)}, id="primary"),
        pytest.param({"node_port_addresses": (FOUR,)}, id="one range, one family of pods"),
        pytest.param({"healthz_bind_address": "[::]:1"}, id="all addresses"),
        pytest.param({"healthz_bind_address": ""}, id="no health server"),
    ],
)
def test_what_fits_the_family_is_not_told(settings):
    nothing = FamilyProblems((), ())
    assert family_problems(config_with(**settings), 4, (), dual_stack=False) == nothing
