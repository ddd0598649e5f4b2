"""The parts of the kernel that each mode needs, and whether there are all of them. No I/O.

The kernel loads most of them when somebody first asks, so that one that is not loaded says little:
what counts is whether it could be. Names of options are those of the kernel's Kconfig.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from pyproxy.doctor.facts import Facts, Finding, Module


class Part(NamedTuple):
    modes: tuple[str, ...]
    module: str
    option: str
    purpose: str
    is_vital: bool = True


TABLES: Final = ("nftables", "ipvs")
KERNEL_MODES: Final = ("nftables", "iptables", "ipvs")
PARTS: Final = (
    Part(KERNEL_MODES, "nf_conntrack", "NF_CONNTRACK", "to know connections"),
    Part(KERNEL_MODES, "nf_nat", "NF_NAT", "to change addresses"),
    Part(TABLES, "nf_tables", "NF_TABLES", "for any rule"),
    Part(("nftables",), "nft_nat", "NFT_NAT", "to lead to endpoints"),
    Part(TABLES, "nft_masq", "NFT_MASQ", "to masquerade"),
    Part(TABLES, "nft_ct", "NFT_CT", "to match the state of a connection"),
    Part(TABLES, "nft_fib", "NFT_FIB", "for node ports"),
    Part(("nftables",), "nft_numgen", "NFT_NUMGEN", "to choose an endpoint"),
    Part(TABLES, "nft_reject", "NFT_REJECT", "to refuse where there is no endpoint"),
    Part(("iptables",), "ip_set", "IP_SET", "for sets of addresses"),
    Part(("iptables",), "xt_set", "NETFILTER_XT_SET", "to match those sets"),
    Part(("iptables",), "ip_set_hash_ipport", "IP_SET_HASH_IPPORT", "for cluster IPs"),
    Part(("iptables",), "ip_set_hash_ipportip", "IP_SET_HASH_IPPORTIP", "for hairpin connections"),
    Part(("iptables",), "xt_statistic", "NETFILTER_XT_MATCH_STATISTIC", "to choose an endpoint"),
    Part(("iptables",), "xt_addrtype", "NETFILTER_XT_MATCH_ADDRTYPE", "for node ports"),
    Part(("iptables",), "xt_comment", "NETFILTER_XT_MATCH_COMMENT", "for comments"),
    Part(("iptables",), "xt_conntrack", "NETFILTER_XT_MATCH_CONNTRACK", "to match connections"),
    Part(("iptables",), "xt_mark", "NETFILTER_XT_MARK", "to mark what is masqueraded"),
    Part(("iptables",), "xt_nat", "NETFILTER_XT_NAT", "to lead to endpoints"),
    Part(("iptables",), "xt_MASQUERADE", "NETFILTER_XT_TARGET_MASQUERADE", "to masquerade"),
    Part(("iptables",), "xt_recent", "NETFILTER_XT_MATCH_RECENT", "for sessionAffinity", False),
    Part(("iptables",), "xt_nfacct", "NETFILTER_XT_MATCH_NFACCT", "for two metrics", False),
    Part(("ipvs",), "ip_vs", "IP_VS", "for virtual servers"),
    Part(("userspace",), "nft_tproxy", "NFT_TPROXY", "to capture without BPF", False),
    Part(("userspace",), "", "BPF_SYSCALL", "to capture at socket lookup", False),
    Part(("userspace",), "", "CGROUP_BPF", "to choose endpoints when sockets connect", False),
)
SCTP: Final = (
    Part(KERNEL_MODES, "", "NF_CT_PROTO_SCTP", "for Services of protocol SCTP"),
    Part(("ipvs",), "", "IP_VS_PROTO_SCTP", "for Services of protocol SCTP"),
    Part(("userspace",), "sctp", "IP_SCTP", "for Services of protocol SCTP"),
)


def missing_parts(facts: Facts) -> Iterator[Finding]:
    """Yield a finding for each part that the mode wants and the kernel cannot have."""
    wants_sctp = any(s.frontend.proto == "SCTP" for s in facts.served)
    scheduled = (
        Part(("ipvs",), f"ip_vs_{name}", f"IP_VS_{name.upper()}", "a scheduler asked for", False)
        for name in facts.schedulers
    )
    for part in (*PARTS, *(SCTP if wants_sctp else ()), *scheduled):
        why = why_missing(part, facts.modules) if facts.mode in part.modes else None
        if why is not None:
            yield Finding(
                "error" if part.is_vital else "warning",
                f"mode {facts.mode}",
                f"the kernel lacks {part.module or part.option}, {part.purpose}",
                why,
                f"install the kernel's extra modules, or one with CONFIG_{part.option}",
            )


def why_missing(part: Part, modules: Module) -> str | None:
    """Say what proves that the kernel cannot have a part; None if it may."""
    if part.module and part.module in modules.loaded:
        return None
    if modules.options is not None:
        value = modules.options.get(f"CONFIG_{part.option}")
        if value == "y":
            return None
        if value is None:
            return f"CONFIG_{part.option} is not set in /proc/config.gz"
    if part.module and modules.installed is not None and part.module not in modules.installed:
        return f"there is no module {part.module} for this kernel in /lib/modules"
    return None


def modes(facts: Facts) -> Iterator[Finding]:
    reason = facts.unsupported.get(facts.mode)
    if reason is not None:
        able = [name for name, why in facts.unsupported.items() if why is None]
        others = f"; this node can run {', '.join(able)}" if able else ""
        yield Finding(
            "error", f"mode {facts.mode}", "this node cannot run the mode", reason,
            f"mend that{others}",
        )  # fmt: skip
    if facts.mode == "userspace":
        if facts.capture:
            yield Finding(
                "note", "mode userspace", "the best way to capture packets cannot be",
                facts.capture, "run on Linux 5.9 or later with CAP_BPF and CAP_NET_ADMIN",
            )  # fmt: skip
        if facts.socket_lb:
            yield Finding(
                "note", "mode userspace", "endpoints are not chosen when sockets connect",
                facts.socket_lb, "see userspace.socketLB and userspace.cgroup",
            )  # fmt: skip
