"""The flags that kube-proxy has not."""

from typing import Final

from pyproxy.config import CAPTURES, MODES_BESIDE, SERVICE_METRICS, SOCKET_LB
from pyproxy.config.flags_kinds import BOOL, CIDRS, DURATION, INTEGER, LOOP, STRING, Flag, Group

OWN: Final = Group(
    "pyproxy's own",
    (
        Flag(
            "manifests",
            STRING,
            "",
            "Take Services and EndpointSlices from this file or directory instead of an API "
            "server.",
            placeholder="PATH",
        ),
        Flag("service-cidr", CIDRS, "", "With --manifests: the ranges of cluster IPs."),
        Flag(
            "control-socket",
            STRING,
            "",
            "Where commands such as pyproxy explain are answered, to root; empty: nowhere.",
            placeholder="PATH",
        ),
        Flag(
            "state-dir",
            STRING,
            "",
            "Where the cluster's last known state is kept, for a start without the API server; "
            "empty: nowhere.",
            placeholder="PATH",
        ),
        Flag(
            "cloud-annotations",
            STRING,
            "cloud_annotations",
            "The cloud whose annotations of Services count: huawei.",
            placeholder="CLOUD",
        ),
        Flag(
            "service-metrics",
            STRING,
            "service_metrics",
            "What to count connections of apart, for metrics and pyproxy top: one of "
            f"{', '.join(SERVICE_METRICS)}.",
            placeholder="WHAT",
        ),
        Flag(
            "service-proxy-name",
            STRING,
            "service_proxy_name",
            "Serve only the Services whose label service.kubernetes.io/service-proxy-name has this "
            "value, beside another proxy, which leaves them alone; empty: only those without the "
            f"label. Modes {' and '.join(MODES_BESIDE)}.",
            placeholder="NAME",
        ),
        Flag(
            "programmed-annotation-period",
            DURATION,
            "programmed_annotation_period_seconds",
            "How often, at most, to write on this Node how far its Services are programmed; "
            "0 is never. It takes another RBAC rule.",
        ),
        Flag(
            "event-loop",
            LOOP,
            "",
            "auto, uvloop or asyncio, for the process that plans; auto is uvloop, and in mode "
            "userspace a loop of its own, which workers always have.",
        ),
    ),
)

USERSPACE: Final = Group(
    "Mode userspace",
    (
        Flag(
            "userspace-capture",
            STRING,
            "userspace.capture",
            "How packets for Services come to our sockets: one of "
            f"{', '.join(CAPTURES)}; auto is the first that works.",
            placeholder="HOW",
        ),
        Flag(
            "userspace-socket-lb",
            STRING,
            "userspace.socket_lb",
            f"{' or '.join(SOCKET_LB)}: choose endpoints where pods and this node connect.",
            placeholder="WHEN",
        ),
        Flag(
            "userspace-cgroup",
            STRING,
            "userspace.cgroup",
            "Choose endpoints for the processes of this cgroup (v2); all, if not given.",
            placeholder="PATH",
        ),
        Flag(
            "userspace-keep-client-address",
            BOOL,
            "userspace.keep_client_address",
            "Let endpoints see their client's address, as far as the other modes do.",
        ),
        Flag(
            "userspace-drain-timeout",
            DURATION,
            "userspace.drain_timeout_seconds",
            "How long to serve after SIGTERM, until a successor has taken over.",
        ),
        Flag(
            "userspace-workers",
            INTEGER,
            "userspace.workers",
            "How many processes relay for each IP family; 0 is one for each core, at most 4. "
            "With 1, pyproxy itself does.",
        ),
        Flag(
            "userspace-runtime-dir",
            STRING,
            "userspace.runtime_dir",
            "Where a successor finds this process; /run/pyproxy if not given.",
            placeholder="PATH",
        ),
    ),
)
