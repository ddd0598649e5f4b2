"""Every command-line flag, one row each: what the parser, precedence and ``--help`` read."""

from collections.abc import Mapping
from typing import Final

from pyproxy.config import MODES
from pyproxy.config.flags_kinds import (
    BOOL,
    DURATION,
    GATES,
    INTEGER,
    IP,
    IP_PORT,
    LIST,
    NUMBER,
    STRING,
    Flag,
    Group,
)
from pyproxy.config.flags_logging import LOGGING
from pyproxy.config.flags_own import OWN, USERSPACE

GROUPS: Final = (
    Group(
        "What to serve",
        (
            Flag(
                "config",
                STRING,
                "",
                "Read the settings from this KubeProxyConfiguration file. It replaces all flags but"
                " the logging ones, --hostname-override and those without a field in the file.",
                placeholder="FILE",
            ),
            Flag(
                "kubeconfig",
                STRING,
                "client_connection.kubeconfig",
                "How to reach and to convince the API server. Without it and --master, the "
                "credentials of the pod.",
                placeholder="FILE",
            ),
            Flag(
                "master",
                STRING,
                "",
                "URL of the API server; wins over the one in the kubeconfig.",
                placeholder="URL",
            ),
            Flag(
                "hostname-override",
                STRING,
                "hostname_override",
                "Name of this Node, if it is not the host's name. Wins over the file.",
            ),
            Flag(
                "bind-address",
                IP,
                "bind_address",
                "The node's own IP, if it is not the one in the Node. Nothing is bound to it.",
            ),
            Flag(
                "kube-api-content-type",
                STRING,
                "client_connection.content_type",
                "Accepted; pyproxy asks for JSON.",
                placeholder="TYPE",
            ),
            Flag(
                "kube-api-qps",
                NUMBER,
                "client_connection.qps",
                "Requests to the API server each second, a watch or a list being one; "
                "negative: no limit.",
            ),
            Flag(
                "kube-api-burst",
                INTEGER,
                "client_connection.burst",
                "Requests to the API server that may go at once, before the limit counts.",
            ),
            Flag(
                "config-sync-period",
                DURATION,
                "config_sync_period_seconds",
                "Accepted; what the API server says is followed as it changes.",
            ),
        ),
    ),
    Group(
        "How to serve it",
        (
            Flag("proxy-mode", STRING, "mode", f"One of {', '.join(MODES)}.", placeholder="MODE"),
            Flag("feature-gates", GATES, "feature_gates", "Switch features on or off.", default=""),
            Flag(
                "masquerade-all",
                BOOL,
                "iptables.masquerade_all",
                "Masquerade all traffic to cluster IPs, also that of local pods.",
            ),
            Flag(
                "iptables-masquerade-bit",
                INTEGER,
                "iptables.masquerade_bit",
                "The bit, 0 to 31, of a packet's mark that asks for masquerading (modes iptables "
                "and ipvs).",
            ),
            Flag(
                "iptables-localhost-nodeports",
                BOOL,
                "iptables.localhost_node_ports",
                "Mode iptables, IPv4: serve node ports at 127.0.0.1 too.",
            ),
            Flag(
                "iptables-sync-period",
                DURATION,
                "iptables.sync_period_seconds",
                "Check and repair the rules at least this often (all modes but ipvs).",
            ),
            Flag(
                "iptables-min-sync-period",
                DURATION,
                "iptables.min_sync_period_seconds",
                "Write changes at most this often (all modes but ipvs); 0 writes at once.",
            ),
            Flag(
                "ipvs-sync-period",
                DURATION,
                "ipvs.sync_period_seconds",
                "As --iptables-sync-period, for mode ipvs.",
            ),
            Flag(
                "ipvs-min-sync-period",
                DURATION,
                "ipvs.min_sync_period_seconds",
                "As --iptables-min-sync-period, for mode ipvs.",
                default="1s",
            ),
            Flag(
                "ipvs-scheduler",
                STRING,
                "ipvs.scheduler",
                "Mode ipvs: how a backend is chosen, rr if not given.",
            ),
            Flag(
                "ipvs-exclude-cidrs",
                LIST,
                "ipvs.exclude_cidrs",
                "Mode ipvs: leave virtual servers in these ranges alone.",
            ),
            Flag(
                "ipvs-strict-arp",
                BOOL,
                "ipvs.strict_arp",
                "Mode ipvs: answer ARP only for addresses of the link that is asked.",
            ),
            Flag(
                "ipvs-tcp-timeout",
                DURATION,
                "ipvs.tcp_timeout_seconds",
                "Mode ipvs: forget idle TCP connections; 0 keeps the kernel's time.",
            ),
            Flag(
                "ipvs-tcpfin-timeout",
                DURATION,
                "ipvs.tcp_fin_timeout_seconds",
                "Mode ipvs: the same, after a FIN.",
            ),
            Flag(
                "ipvs-udp-timeout",
                DURATION,
                "ipvs.udp_timeout_seconds",
                "Mode ipvs: the same, for UDP.",
            ),
            Flag(
                "ipvs-bind-addresses",
                BOOL,
                "ipvs.bind_addresses",
                "Mode ipvs: show Service addresses on the device kube-ipvs0, for tools that look "
                "there.",
            ),
            Flag(
                "ipvs-drain-timeout",
                DURATION,
                "ipvs.drain_timeout_seconds",
                "Mode ipvs: how long an endpoint that goes keeps its last connections; 0 cuts "
                "them at once.",
            ),
            Flag(
                "conntrack-max-per-core",
                INTEGER,
                "conntrack.max_per_core",
                "Connections to track for each CPU core; 0 keeps the kernel's limit.",
            ),
            Flag("conntrack-min", INTEGER, "conntrack.min", "Connections to track at least."),
            Flag(
                "conntrack-tcp-timeout-established",
                DURATION,
                "conntrack.tcp_established_timeout_seconds",
                "Forget idle TCP connections; 0 keeps the kernel's time.",
            ),
            Flag(
                "conntrack-tcp-timeout-close-wait",
                DURATION,
                "conntrack.tcp_close_wait_timeout_seconds",
                "The same, in CLOSE_WAIT.",
            ),
            Flag(
                "conntrack-tcp-be-liberal",
                BOOL,
                "conntrack.tcp_be_liberal",
                "Do not call packets outside the TCP window invalid.",
            ),
            Flag(
                "conntrack-udp-timeout",
                DURATION,
                "conntrack.udp_timeout_seconds",
                "Forget UDP flows without an answer; 0 keeps the kernel's time.",
            ),
            Flag(
                "conntrack-udp-timeout-stream",
                DURATION,
                "conntrack.udp_stream_timeout_seconds",
                "The same, for answered ones.",
            ),
            Flag(
                "conntrack-end-forbidden-flows",
                BOOL,
                "conntrack.end_forbidden_flows",
                "End connections that a stricter traffic policy, source range or node port would "
                "not let in any more, instead of letting them go on.",
            ),
            Flag(
                "oom-score-adj",
                INTEGER,
                "oom_score_adj",
                "How soon the kernel ends this process when memory runs out, -1000 to 1000.",
            ),
        ),
    ),
    Group(
        "Node ports and local pods",
        (
            Flag(
                "nodeport-addresses",
                LIST,
                "node_port_addresses",
                "Serve node ports only at the node's addresses in these ranges, or, with the word "
                "primary, at its own. Not given: at every address (modes nftables "
                "and ipvs: primary).",
            ),
            Flag(
                "detect-local-mode",
                STRING,
                "detect_local_mode",
                "How a pod of this node is recognised: ClusterCIDR, NodeCIDR, BridgeInterface or "
                "InterfaceNamePrefix.",
                placeholder="MODE",
            ),
            Flag(
                "cluster-cidr",
                STRING,
                "cluster_cidr",
                "ClusterCIDR: the range of the pods, or one of each family with a comma.",
                placeholder="CIDR",
            ),
            Flag(
                "pod-bridge-interface",
                STRING,
                "detect_local.bridge_interface",
                "BridgeInterface: the bridge of the pods.",
            ),
            Flag(
                "pod-interface-name-prefix",
                STRING,
                "detect_local.interface_name_prefix",
                "InterfaceNamePrefix: how the names of the pods' links begin.",
                placeholder="PREFIX",
            ),
        ),
    ),
    Group(
        "Health and metrics",
        (
            Flag(
                "healthz-bind-address",
                IP_PORT,
                "healthz_bind_address",
                "Where /healthz and /livez are served.",
            ),
            Flag(
                "metrics-bind-address",
                IP_PORT,
                "metrics_bind_address",
                "Where /metrics, /configz and /proxyMode are served.",
            ),
            Flag(
                "bind-address-hard-fail",
                BOOL,
                "bind_address_hard_fail",
                "End when one of them cannot be served, instead of trying again.",
            ),
            Flag("profiling", BOOL, "enable_profiling", "Serve /debug with the metrics."),
            Flag(
                "show-hidden-metrics-for-version",
                STRING,
                "show_hidden_metrics_for_version",
                "Show what the release before this one hid.",
                placeholder="VERSION",
            ),
        ),
    ),
    LOGGING,
    Group(
        "Do one thing and exit",
        (
            Flag("cleanup", BOOL, "", "Remove the rules of every mode."),
            Flag(
                "keep",
                STRING,
                "",
                "With --cleanup: leave this mode's. Beside nftables and iptables, virtual servers "
                "stay while they have connections; the exit code is 3 if some do.",
                placeholder="MODE",
            ),
            Flag(
                "init-only",
                BOOL,
                "",
                "Do what needs full privileges; a later start then needs CAP_NET_ADMIN only.",
            ),
            Flag(
                "write-config-to",
                STRING,
                "",
                "Write the settings in effect to this file.",
                placeholder="FILE",
            ),
            Flag("version", BOOL, "", "Print the version."),
            Flag("help", BOOL, "", "Print this."),
        ),
    ),
    OWN,
    USERSPACE,
    Group(
        "Deprecated",
        (
            Flag(
                "healthz-port",
                INTEGER,
                "",
                "Port of --healthz-bind-address, if that has none; 0 serves no health.",
                instead="--healthz-bind-address",
            ),
            Flag(
                "metrics-port",
                INTEGER,
                "",
                "Port of --metrics-bind-address, if that has none.",
                instead="--metrics-bind-address",
            ),
        ),
    ),
)

FLAGS: Final[Mapping[str, Flag]] = {flag.name: flag for group in GROUPS for flag in group.flags}
SHORT: Final[Mapping[str, str]] = {"v": "v", "h": "help"}
