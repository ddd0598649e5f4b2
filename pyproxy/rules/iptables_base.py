"""The fixed part of the iptables rules: what is there without any Service."""

from collections.abc import Iterable, Mapping
from ipaddress import ip_network
from typing import NamedTuple

from pyproxy.model import Network
from pyproxy.rules.iptables import (
    CLUSTER_IPS,
    EXTERNAL,
    FIREWALL,
    HAIRPIN,
    MARK_MASQ,
    NODE_PORTS,
    POSTROUTING,
    SERVICES,
    Ruleset,
    from_pods,
    set_name,
)

FORWARD = "KUBE-FORWARD"
CANARY = "KUBE-PROXY-CANARY"
HOST_FIREWALL = "KUBE-FIREWALL"  # shared with kubelet: never flushed, never deleted
LOOPBACK = "127.0.0.0/8"
LOOPBACK_NETWORK = ip_network(LOOPBACK)
TABLES = ("filter", "nat", "mangle")
# Objects of the kernel that count packets; kube-proxy's names.
INVALID_DROPPED, LOCALHOST_ACCEPTED = "ct_state_invalid_dropped_pkts", "localhost_nps_accepted_pkts"
COUNTERS = (INVALID_DROPPED, LOCALHOST_ACCEPTED)

Place = tuple[str, str]  # a table, and a chain of it


class Jump(NamedTuple):
    """A rule at the head of one of the kernel's own chains."""

    table: str
    chain: str
    rule: str


def jump(table: str, chain: str, to: str, why: str, *, new: bool = False) -> Jump:
    state = "-m conntrack --ctstate NEW " if new else ""
    return Jump(table, chain, f'{state}-m comment --comment "{why}" -j {to}')


# Each is put before those that are there. The texts are kube-proxy's.
JUMPS = (
    jump("filter", "INPUT", EXTERNAL, "kubernetes externally-visible service portals", new=True),
    jump("filter", "FORWARD", EXTERNAL, "kubernetes externally-visible service portals", new=True),
    jump("filter", "INPUT", NODE_PORTS, "kubernetes health check service ports"),
    jump("filter", "FORWARD", SERVICES, "kubernetes service portals", new=True),
    jump("filter", "OUTPUT", SERVICES, "kubernetes service portals", new=True),
    jump("filter", "FORWARD", FORWARD, "kubernetes forwarding rules"),
    jump("filter", "INPUT", FIREWALL, "kubernetes load balancer firewall", new=True),
    jump("filter", "OUTPUT", FIREWALL, "kubernetes load balancer firewall", new=True),
    jump("filter", "FORWARD", FIREWALL, "kubernetes load balancer firewall", new=True),
    jump("nat", "OUTPUT", SERVICES, "kubernetes service portals"),
    jump("nat", "PREROUTING", SERVICES, "kubernetes service portals"),
    jump("nat", "POSTROUTING", POSTROUTING, "kubernetes postrouting rules"),
)
HOST_JUMPS = (
    Jump("filter", "INPUT", f"-j {HOST_FIREWALL}"),
    Jump("filter", "OUTPUT", f"-j {HOST_FIREWALL}"),
)
# Packets to loopback addresses may be routed once node ports answer there; strangers' must not.
ANTI_SPOOF = (
    f"! -s {LOOPBACK} -d {LOOPBACK} "
    '-m comment --comment "block incoming localnet connections" '
    "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"
)


def jumps(ruleset: Ruleset) -> tuple[Jump, ...]:
    return JUMPS + HOST_JUMPS if ruleset.localhost_node_ports else JUMPS


def has_localhost(ranges: Iterable[Network] | None) -> bool:
    """Say whether these ranges of node ports' addresses, None for all, have any in 127.0.0.0/8."""
    return ranges is None or any(n.version == 4 and n.overlaps(LOOPBACK_NETWORK) for n in ranges)


def fixed_chains(ruleset: Ruleset) -> Mapping[Place, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return the chains that are always there: the rules before and after those of owners."""
    nothing: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    return {
        ("filter", SERVICES): nothing,
        ("filter", EXTERNAL): nothing,
        ("filter", NODE_PORTS): nothing,
        ("filter", FIREWALL): nothing,
        ("filter", FORWARD): (forward_rules(ruleset), ()),
        ("nat", SERVICES): (off_cluster(ruleset), to_node_ports(ruleset)),
        ("nat", NODE_PORTS): nothing,
        ("nat", POSTROUTING): (postrouting_rules(ruleset), ()),
        ("nat", MARK_MASQ): ((f"-j MARK --set-xmark {ruleset.mark:#x}/{ruleset.mark:#x}",), ()),
        **{(table, CANARY): nothing for table in TABLES},
    }


def forward_rules(ruleset: Ruleset) -> tuple[str, ...]:
    """Return what lets connections of Services through a firewall that forwards nothing else.

    A segment outside the window would reach the client as it is, not from the Service's
    address, and be answered by a reset: it is dropped.
    """
    counted = counter(INVALID_DROPPED) if ruleset.counted else ""
    invalid = f"-m conntrack --ctstate INVALID {counted}-j DROP"
    return (
        *((invalid,) if ruleset.drop_invalid else ()),
        '-m comment --comment "kubernetes forwarding rules" '
        f"-m mark --mark {ruleset.mark:#x}/{ruleset.mark:#x} -j ACCEPT",
        '-m comment --comment "kubernetes forwarding conntrack rule" '
        "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    )


def postrouting_rules(ruleset: Ruleset) -> tuple[str, ...]:
    """Return what masquerades marked connections, and those of an endpoint with itself.

    The mark goes first, lest a packet that comes by again be masqueraded twice.
    """
    mark = f"{ruleset.mark:#x}"
    hairpin = set_name(HAIRPIN, ruleset.family)
    random = " --random-fully" if ruleset.random_fully else ""
    # Whatever comes to a node port at a loopback address is masqueraded, and passes here.
    to_loopback = f"-m conntrack --ctorigdst {LOOPBACK} {counter(LOCALHOST_ACCEPTED)}".rstrip()
    counts = ruleset.counted and ruleset.localhost_node_ports
    return (
        f"-m conntrack --ctstate DNAT -m set --match-set {hairpin} dst,dst,src -j {MARK_MASQ}",
        f"-m mark ! --mark {mark}/{mark} -j RETURN",
        *((to_loopback,) if counts else ()),
        f"-j MARK --set-xmark {mark}/0x0",
        f'-m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE{random}',
    )


def counter(name: str) -> str:
    """Return the match that counts a packet and always holds."""
    return f"-m nfacct --nfacct-name  {name} "  # iptables-save prints it with two spaces


def off_cluster(ruleset: Ruleset) -> tuple[str, ...]:
    """Return the rule that masquerades what comes to cluster IPs from beyond the cluster."""
    to_cluster_ip = f"-m set --match-set {set_name(CLUSTER_IPS, ruleset.family)} dst,dst"
    if ruleset.masquerade_all:
        return (f"{to_cluster_ip} -j {MARK_MASQ}",)
    if ruleset.pods is None:
        return ()
    return (f"! {from_pods(ruleset)} {to_cluster_ip} -j {MARK_MASQ}",)


def to_node_ports(ruleset: Ruleset) -> tuple[str, ...]:
    """Return the rules for addresses of the node; they are for what no Service address matched."""
    note = '-m comment --comment "kubernetes service nodeports; this must be last" '
    if ruleset.node_port_ips is not None:
        bits = 32 if ruleset.family == 4 else 128
        return tuple(f"-d {ip}/{bits} {note}-j {NODE_PORTS}" for ip in ruleset.node_port_ips)
    loopback = LOOPBACK if ruleset.family == 4 else "::1/128"
    but = "" if ruleset.localhost_node_ports else f"! -d {loopback} "
    return (f"{but}{note}-m addrtype --dst-type LOCAL -j {NODE_PORTS}",)
