"""What there is on a node, as it was read, and what was found in it. No I/O, no decisions."""

from collections.abc import Iterable, Mapping
from ipaddress import ip_network
from typing import Final, Literal, NamedTuple

from msgspec import Struct, field

from pyproxy.model import Family, Frontend, Network
from pyproxy.view import Answer

Severity = Literal["error", "warning", "note"]
Kind = Literal["nat", "drop"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class Finding(Answer, frozen=True):
    """Something that is wrong, or that could not be looked at."""

    severity: Severity  # error: Services fail; warning: some may; note: nothing need be done
    subject: str
    what: str
    evidence: str = ""
    fix: str = ""


class Link(NamedTuple):
    """A network interface."""

    name: str
    kind: str = ""  # bridge, veth, vxlan, ...; empty for a network card
    mtu: int = 1500
    master: str = ""  # the bridge that it is a port of
    hairpin: bool = False  # of a bridge's port: may send a frame back to where it came from
    networks: tuple[str, ...] = ()  # address/prefix length
    is_up: bool = True


class Tracked(NamedTuple):
    """How full the table of connection tracking is."""

    used: int
    limit: int
    by_service: tuple[tuple[str, int], ...] = ()  # most flows first


class Server(NamedTuple):
    """How the API server answered when it was asked for this node's object."""

    url: str
    problem: str = ""  # why there was no answer
    status: int = 0
    skew_seconds: float | None = None  # its clock less ours
    certificate_seconds: float | None = None  # until its certificate expires
    pod_cidrs: tuple[str, ...] = ()


class Module(NamedTuple):
    """What says whether the kernel has a part: files of /proc and of /lib/modules."""

    loaded: frozenset[str] = frozenset()  # or built in, and seen in /sys/module
    installed: frozenset[str] | None = None  # None: there is no list to look into
    options: Mapping[str, str] | None = None  # of the kernel's configuration; None: not published


class Limits(NamedTuple):
    """Which packets a rule is for. What is None is not looked at."""

    destinations: tuple[Network, ...] | None = None
    protocols: tuple[str, ...] | None = None  # TCP, UDP, SCTP
    ports: tuple[tuple[int, int], ...] | None = None  # of the destination, first and last
    is_local: bool = False  # only addresses of the node
    is_partial: bool = False  # and it looks at something else: only some packets meet it


class Barrier(NamedTuple):
    """A rule of somebody else that may get hold of packets before ours."""

    family: Family
    hook: str  # prerouting, input, output
    priority: int
    kind: Kind
    limits: Limits
    where: str  # its table and chain
    text: str


class Served(NamedTuple):
    """A frontend and the Service that it belongs to."""

    frontend: Frontend
    service: str


KUBE_PROXY_TABLE: Final = "kube-proxy of nf_tables"  # how a leftover of its is told


class Facts(Struct, frozen=True):
    """Everything that findings are made of. What is empty or None has not been looked at."""

    mode: str  # the one that runs, or is asked about
    node: str = ""
    is_running: bool = False  # a daemon answered
    is_beside: bool = False  # another proxy serves the Services that this one does not
    families: tuple[Family, ...] = (4,)
    unsupported: Mapping[str, str | None] = field(default_factory=dict)  # by mode, why not
    sysctls: Mapping[str, str] = field(default_factory=dict)  # by path below /proc/sys
    has_read_only_sysctls: bool = False
    modules: Module = Module()
    schedulers: tuple[str, ...] = ()  # of mode ipvs, those that are asked for
    capture: str = ""  # of mode userspace: why the best way to capture cannot be
    socket_lb: str = ""  # of mode userspace: why sockets are not balanced
    links: tuple[Link, ...] = ()
    uplinks: tuple[str, ...] = ()  # interfaces of default routes
    flavours: Mapping[str, int] = field(default_factory=dict)  # rules of each flavour of iptables
    flavour: str = ""  # that mode iptables writes to
    leftovers: tuple[str, ...] = ()  # what kube-proxy or another mode has left
    barriers: tuple[Barrier, ...] = ()
    tracked: Tracked | None = None
    open_files: int | None = None  # how many the process may have that serves the node
    is_clock_synchronised: bool | None = None
    server: Server | None = None
    served: tuple[Served, ...] = ()
    node_ports: str = "30000-32767"
    needs_pod_cidrs: bool = False  # of the Node: pods are recognised by them
    pod_cidrs: tuple[str, ...] = ()
    service_cidrs: tuple[str, ...] = ()
    unseen: tuple[tuple[str, str], ...] = ()  # what was not looked at, and why


def networks(texts: Iterable[str]) -> tuple[Network, ...]:
    return tuple(ip_network(text, strict=False) for text in texts)


def overlapping(network: Network, others: Iterable[Network]) -> Network | None:
    return next(
        (o for o in others if o.version == network.version and o.overlaps(network)),
        None,
    )
