"""What is wrong, by what there is: one function for each kind of trouble. No I/O."""

from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_interface
from typing import Final

from pyproxy.doctor import parts
from pyproxy.doctor.facts import (
    KUBE_PROXY_TABLE,
    SEVERITIES,
    Facts,
    Finding,
    Link,
    networks,
    overlapping,
)
from pyproxy.doctor.shadows import shadows
from pyproxy.model import Family
from pyproxy.view import Answer

KERNEL_MODES: Final = ("nftables", "iptables", "ipvs")
RP_FILTER: Final = "net/ipv4/conf/{}/rp_filter"
STRICT: Final = "1"
TUNNELS: Final = {"vxlan", "geneve", "ipip", "sit", "gre", "wireguard", "ip6tnl", "tun"}
FILLING, FULL = 0.75, 0.95  # of the table of connections
ENOUGH_FILES: Final = 65536
SKEW_SECONDS: Final = 30.0  # tokens and certificates begin to be refused at minutes
CERTIFICATE_SECONDS: Final = 14 * 86400.0
SHOWN: Final = 3


class Report(Answer, frozen=True):
    """What ``pyproxy doctor -o json`` prints."""

    node: str
    mode: str
    findings: tuple[Finding, ...]


def findings(facts: Facts) -> tuple[Finding, ...]:
    """Return everything that is wrong, the worst first."""
    found = [finding for check in CHECKS for finding in check(facts)]
    once = dict.fromkeys(found)  # a rule may be met on several ways
    return tuple(sorted(once, key=lambda finding: SEVERITIES.index(finding.severity)))


def worth_a_warning(facts: Facts) -> tuple[Finding, ...]:
    """Return what a proxy that starts should tell: of facts that cost next to nothing."""
    found = (finding for check in AT_START for finding in check(facts))
    return tuple(finding for finding in found if finding.severity != "note")


# --- kernel settings ------------------------------------------------------------------------------


def forwarding(facts: Facts) -> Iterator[Finding]:
    names = {4: "net/ipv4/ip_forward", 6: "net/ipv6/conf/all/forwarding"}
    in_kernel = facts.mode in KERNEL_MODES
    for family in sorted(families_in_use(facts)):
        name = names[family]
        if facts.sysctls.get(name) == "0":
            fix = f"sysctl -w {name.replace('/', '.')}=1, and in /etc/sysctl.d"
            if facts.has_read_only_sysctls:
                fix += "; here /proc/sys is read-only: do it on the host"
            yield Finding(
                "error" if in_kernel else "warning",
                "forwarding",
                f"this node forwards no IPv{family} packets"
                + ("" if in_kernel else ", as pods of other nodes need"),
                f"{name.replace('/', '.')} is 0",
                fix,
            )


def families_in_use(facts: Facts) -> set[Family]:
    """Return the families that pods or Services have; where that is not known, IPv4."""
    pods = {network.version for network in networks(facts.pod_cidrs)}
    services = {ip_address(s.frontend.ip).version for s in facts.served if s.frontend.ip}
    return {family for family in facts.families if family in (pods | services or {4})}


def reverse_path(facts: Facts) -> Iterator[Finding]:
    """A strict filter drops what comes in where the answer would not go out.

    Kernel documentation, ip-sysctl: the larger of ``all`` and the interface's own value counts.
    """
    ways = sorted(set(facts.uplinks))
    for link in facts.links:
        if not is_strict(facts, link.name):
            continue
        if link.name in ways and len(ways) > 1:
            why = f"there are default routes by {', '.join(ways)}"
        elif link.kind in TUNNELS:
            why = f"it is a tunnel ({link.kind}), and answers may go another way"
        else:
            continue
        yield Finding(
            "warning",
            "rp_filter",
            f"packets that come by {link.name} are dropped if their answer goes another way",
            f"the strict reverse path filter holds for it (rp_filter 1), and {why}",
            f"sysctl -w net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.{link.name}.rp_filter=2",
        )


def is_strict(facts: Facts, name: str) -> bool:
    values = [facts.sysctls.get(RP_FILTER.format(scope), "0") for scope in ("all", name)]
    return max(values) == STRICT


def read_only(facts: Facts) -> Iterator[Finding]:
    if facts.has_read_only_sysctls:
        yield Finding(
            "note", "sysctls", "kernel settings cannot be changed from here",
            "/proc/sys is mounted read-only",
            "run pyproxy --init-only once in a privileged init container",
        )  # fmt: skip


def port_ranges(facts: Facts) -> Iterator[Finding]:
    text = facts.sysctls.get("net/ipv4/ip_local_port_range", "")
    reserved = facts.sysctls.get("net/ipv4/ip_local_reserved_ports", "")
    if not text:
        return
    first, last = map(int, text.split())
    low, _, high = facts.node_ports.partition("-")
    from_, to = max(first, int(low)), min(last, int(high or low))
    if from_ <= to and not is_reserved(from_, to, reserved):
        yield Finding(
            "warning",
            "node ports",
            f"ports {from_}-{to} are both node ports and ports of the node's own connections",
            f"net.ipv4.ip_local_port_range is {first}-{last}, node ports are {facts.node_ports}",
            f"sysctl -w net.ipv4.ip_local_reserved_ports={facts.node_ports}",
        )


def is_reserved(first: int, last: int, reserved: str) -> bool:
    """Say whether all of a range is among ip_local_reserved_ports, such as ``80,30000-32767``."""
    for part in filter(None, reserved.split(",")):
        low, _, high = part.partition("-")
        if int(low) <= first and last <= int(high or low):
            return True
    return False


# --- bridges and links ----------------------------------------------------------------------------


def bridges(facts: Facts) -> Iterator[Finding]:
    """Pods on one bridge: an answer has to come back through the rules that changed the request."""
    if facts.mode not in KERNEL_MODES:
        return
    for bridge in (link for link in facts.links if link.kind == "bridge"):
        ports = [link for link in facts.links if link.master == bridge.name]
        if not ports or not has_pods(facts, bridge):
            continue
        for family, name in ((4, "iptables"), (6, "ip6tables")):
            if not any(ip_interface(text).version == family for text in bridge.networks):
                continue
            value = facts.sysctls.get(f"net/bridge/bridge-nf-call-{name}")
            if value != "1":
                state = "br_netfilter is not loaded" if value is None else f"it is {value}"
                yield Finding(
                    "warning", "bridge",
                    f"a pod on {bridge.name} gets no answer by a Service from another pod on it",
                    f"net.bridge.bridge-nf-call-{name} must be 1, and {state}",
                    f"modprobe br_netfilter; sysctl -w net.bridge.bridge-nf-call-{name}=1",
                )  # fmt: skip
        without = [port.name for port in ports if not port.hairpin]
        if without and facts.sysctls.get("net/bridge/bridge-nf-call-iptables") == "1":
            yield Finding(
                "warning", "hairpin",
                f"a pod on {bridge.name} gets no answer from itself by a Service",
                f"hairpin mode is off on {listed(without)}",
                f"have the CNI plugin set hairpinMode; bridge link set dev {without[0]} hairpin on",
            )  # fmt: skip


def has_pods(facts: Facts, bridge: Link) -> bool:
    """Say whether the addresses of a bridge are for pods; where that is not known, by its name."""
    pods = networks(facts.pod_cidrs)
    if not pods:
        return bridge.name in ("cni0", "cbr0", "kube-bridge")
    own = networks(text for text in bridge.networks if not ip_interface(text).ip.is_link_local)
    return any(overlapping(network, pods) for network in own)


def mtu(facts: Facts) -> Iterator[Finding]:
    """A pod that sends larger packets than the way out takes depends on ICMP to find that out."""
    ways = [link for link in facts.links if link.name in facts.uplinks]
    if not ways:
        return
    way = min(ways, key=lambda link: link.mtu)
    larger = [link for link in facts.links if leads_to_pods(facts, link) and link.mtu > way.mtu]
    if larger:
        names = listed([f"{link.name} ({link.mtu})" for link in larger])
        yield Finding(
            "warning", "MTU", f"pods send larger packets than {way.name} takes",
            f"{names} against {way.name} ({way.mtu})",
            f"set the MTU of the CNI plugin to {way.mtu} or, with an overlay, to less",
        )  # fmt: skip


def leads_to_pods(facts: Facts, link: Link) -> bool:
    if link.name in facts.uplinks:
        return False
    masters = [other for other in facts.links if other.name == link.master]
    return (link.kind == "veth" and not link.master) or any(
        has_pods(facts, bridge) for bridge in (link, *masters) if bridge.kind == "bridge"
    )


def listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


# --- other people's rules -------------------------------------------------------------------------


def flavours(facts: Facts) -> Iterator[Finding]:
    both = {name: count for name, count in facts.flavours.items() if count}
    if len(both) > 1:
        counts = ", ".join(f"{count} rules of flavour {name}" for name, count in both.items())
        yield Finding(
            "warning", "iptables", "this node has iptables rules of both flavours",
            f"{counts}; they are traversed beside each other, in an order that nobody expects",
            "find out who writes the fewer (image of the CNI plugin, update-alternatives) and move"
            " it; then flush those",
        )  # fmt: skip


def leftovers(facts: Facts) -> Iterator[Finding]:
    if facts.is_beside:
        return
    for what in facts.leftovers:
        yield Finding(
            "error" if facts.is_running else "note",
            "kube-proxy",
            "another service proxy is, or was, at work here"
            + ("; its rules are met beside ours" if facts.is_running else ""),
            what,
            "stop it on this node (delete DaemonSet and ConfigMap kube-proxy), then pyproxy cleanup"
            f" --keep={facts.mode}",
        )


def beside(facts: Facts) -> Iterator[Finding]:
    """What does not go with the other proxy, which serves the other Services."""
    tables = [what for what in facts.leftovers if what.endswith(KUBE_PROXY_TABLE)]
    if facts.is_beside and facts.mode == "userspace" and tables:
        yield Finding(
            "warning", "kube-proxy",
            "connections of this node itself to our Services are dropped, unless their sockets are"
            " balanced",
            f"{' and '.join(tables)} drops what it does not know in the Services' ranges, after"
            " rules of NAT, of which mode userspace has none",
            "--proxy-mode=nftables",
        )  # fmt: skip


# --- limits, clock, API server --------------------------------------------------------------------


def conntrack(facts: Facts) -> Iterator[Finding]:
    tracked = facts.tracked
    if tracked is None or tracked.limit <= 0 or tracked.used < FILLING * tracked.limit:
        return
    most = ", ".join(f"{name} {flows}" for name, flows in tracked.by_service[:SHOWN])
    yield Finding(
        "error" if tracked.used >= FULL * tracked.limit else "warning",
        "conntrack",
        "the table of connections is nearly full; when it is, new ones are dropped",
        f"{tracked.used} of {tracked.limit}" + (f"; most: {most}" if most else ""),
        "raise conntrack.maxPerCore or conntrack.min, or shorten its timeouts",
    )


def files(facts: Facts) -> Iterator[Finding]:
    if facts.mode == "userspace" and facts.open_files and facts.open_files < ENOUGH_FILES:
        yield Finding(
            "warning", "open files", f"at most {facts.open_files}, two for each connection",
            "RLIMIT_NOFILE, which the process could not raise",
            "raise LimitNOFILE= of the unit, or of the container runtime",
        )  # fmt: skip


def clock(facts: Facts) -> Iterator[Finding]:
    skew = facts.server.skew_seconds if facts.server is not None else None
    if skew is not None and abs(skew) > SKEW_SECONDS:
        yield Finding(
            "warning", "clock", f"this node's clock is {'behind' if skew > 0 else 'ahead'}",
            f"the API server's differs by {abs(skew):.0f} s", "start chronyd or systemd-timesyncd",
        )  # fmt: skip
    elif facts.is_clock_synchronised is False:
        yield Finding(
            "note", "clock", "nothing keeps this node's clock right",
            "the kernel calls it unsynchronised", "start chronyd or systemd-timesyncd",
        )  # fmt: skip


def api(facts: Facts) -> Iterator[Finding]:
    server = facts.server
    if server is None:
        return
    left = server.certificate_seconds
    if server.problem:
        yield Finding(
            "error", "API server", "it cannot be asked", f"{server.url}: {server.problem}",
            "it must be reachable without Services: use its own address, not its cluster IP",
        )  # fmt: skip
    elif server.status == 404:
        yield Finding(
            "error", "Node", f'there is no Node "{facts.node}"', f"{server.url} said 404",
            "set --hostname-override or hostnameOverride to the name that kubectl get nodes shows",
        )  # fmt: skip
    elif server.status != 200:
        yield Finding(
            "error", "API server", "it does not let this node in",
            f"{server.url} said {server.status}",
            "renew the credentials, or bind them to ClusterRole system:node-proxier",
        )  # fmt: skip
    elif facts.needs_pod_cidrs and not server.pod_cidrs:
        yield Finding(
            "error", "Node", "it has no podCIDRs: nothing is written before it has",
            f"Node {facts.node}: spec.podCIDRs is empty, and detectLocalMode is NodeCIDR",
            "have the controller manager allocate them, or set another detectLocalMode",
        )  # fmt: skip
    if left is not None and left < CERTIFICATE_SECONDS:
        yield Finding(
            "warning", "API server", f"its certificate ends in {left / 86400:.0f} days",
            server.url, "renew it (kubeadm certs renew apiserver)",
        )  # fmt: skip


def ranges(facts: Facts) -> Iterator[Finding]:
    """Addresses of Services, of pods and of nodes must not be the same ones."""
    own = networks(
        text
        for link in facts.links
        for text in link.networks
        if link.kind != "dummy" and link.name != "lo" and not ip_interface(text).ip.is_link_local
    )
    for service in networks(facts.service_cidrs):
        for what, others in (("pods", networks(facts.pod_cidrs)), ("this node", own)):
            other = overlapping(service, others)
            if other is not None:
                yield Finding(
                    "error", "addresses", f"Services and {what} have the same addresses",
                    f"Service range {service}, {what} {other}",
                    "one of the ranges must change: ServiceCIDR, pod CIDRs or the node's network",
                )  # fmt: skip


def unseen(facts: Facts) -> Iterator[Finding]:
    for what, why in facts.unseen:
        yield Finding("note", "not looked at", what, why)


Check = Callable[[Facts], Iterator[Finding]]
AT_START: Final[tuple[Check, ...]] = (
    forwarding, reverse_path, bridges, mtu, port_ranges, conntrack, files, ranges,
)  # fmt: skip
CHECKS: Final[tuple[Check, ...]] = (
    parts.modes, parts.missing_parts, *AT_START, read_only, flavours, leftovers, beside, shadows,
    clock, api, unseen,
)  # fmt: skip
