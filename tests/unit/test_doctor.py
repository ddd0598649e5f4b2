"""What ``pyproxy doctor`` finds, by what there is on a node."""

import pytest
from msgspec.structs import replace

from pyproxy.commands.doctor import text
from pyproxy.doctor.facts import Facts, Finding, Link, Module, Served, Server, Tracked
from pyproxy.doctor.findings import Report, findings, worth_a_warning
from pyproxy.doctor.look import default_ways
from pyproxy.doctor.look_closer import module_name, options_in
from pyproxy.model import Frontend

WEB = Served(Frontend("10.96.0.10", 80, "TCP"), "default/web")
SCTP = Served(Frontend("10.96.0.11", 9, "SCTP"), "default/signals")
BRIDGE = Link("cni0", "bridge", 1450, networks=("10.244.1.1/24",))
PORT = Link("veth1", "veth", 1450, master="cni0", hairpin=True)
CARD = Link("eth0", mtu=1500, networks=("192.0.2.11/24",))
BESIDE = "table ip kube-proxy of nf_tables"
SOUND = Facts(
    "nftables",
    node="node-a",
    is_running=True,
    families=(4, 6),
    unsupported={"nftables": None},
    sysctls={
        "net/ipv4/ip_forward": "1",
        "net/ipv6/conf/all/forwarding": "0",  # no pod has IPv6
        "net/ipv4/conf/all/rp_filter": "0",
        "net/ipv4/conf/eth0/rp_filter": "1",  # the only way out: answers go there as well
        "net/ipv4/ip_local_port_range": "32768\t60999",
        "net/bridge/bridge-nf-call-iptables": "1",
    },
    links=(CARD, BRIDGE, PORT),
    uplinks=("eth0",),
    flavours={"nft": 7, "legacy": 0},
    tracked=Tracked(100, 1000),
    open_files=524288,
    is_clock_synchronised=True,
    server=Server("https://192.0.2.1:6443", "", 200, 0.4, 300 * 86400.0),
    served=(WEB,),
    pod_cidrs=("10.244.1.0/24",),
    service_cidrs=("10.96.0.0/16",),
)


def with_sysctl(name, value):
    return replace(SOUND, sysctls={**SOUND.sysctls, name: value})


def without_sysctl(name):
    return replace(SOUND, sysctls={n: v for n, v in SOUND.sysctls.items() if n != name})


def test_a_sound_node_has_no_findings():
    assert findings(SOUND) == ()


TWO_WAYS = replace(SOUND, links=(*SOUND.links, Link("eth1")), uplinks=("eth0", "eth1"))
TUNNEL = replace(
    with_sysctl("net/ipv4/conf/all/rp_filter", "1"),
    links=(*SOUND.links, Link("flannel.1", "vxlan", 1450)),
)


@pytest.mark.parametrize(
    ("facts", "severity", "subject", "words"),
    [
        pytest.param(
            with_sysctl("net/ipv4/ip_forward", "0"), "error", "forwarding", "ip_forward is 0",
            id="IPv4 is not forwarded",
        ),
        pytest.param(
            replace(SOUND, pod_cidrs=("10.244.1.0/24", "fd00:1::/64")), "error", "forwarding",
            "net.ipv6.conf.all.forwarding is 0", id="IPv6 is not forwarded, and pods have it",
        ),
        pytest.param(
            replace(with_sysctl("net/ipv4/ip_forward", "0"), mode="userspace"), "warning",
            "forwarding", "as pods of other nodes need", id="userspace forwards by itself",
        ),
        pytest.param(
            TWO_WAYS, "warning", "rp_filter", "default routes by eth0, eth1",
            id="strict filter and two ways out",
        ),
        pytest.param(
            TUNNEL, "warning", "rp_filter", "it is a tunnel (vxlan)", id="strict filter at a tunnel"
        ),
        pytest.param(
            replace(SOUND, has_read_only_sysctls=True), "note", "sysctls", "read-only",
            id="/proc/sys is read-only",
        ),
        pytest.param(
            with_sysctl("net/ipv4/ip_local_port_range", "1024\t65535"), "warning", "node ports",
            "ports 30000-32767 are both", id="local ports overlap node ports",
        ),
        pytest.param(
            with_sysctl("net/bridge/bridge-nf-call-iptables", "0"), "warning", "bridge",
            "bridge-nf-call-iptables must be 1, and it is 0", id="bridges bypass rules",
        ),
        pytest.param(
            without_sysctl("net/bridge/bridge-nf-call-iptables"), "warning", "bridge",
            "br_netfilter is not loaded", id="no br_netfilter",
        ),
        pytest.param(
            replace(SOUND, links=(CARD, BRIDGE, PORT._replace(hairpin=False))), "warning",
            "hairpin", "hairpin mode is off on veth1", id="no hairpin mode",
        ),
        pytest.param(
            replace(SOUND, links=(CARD._replace(mtu=1400), BRIDGE, PORT)), "warning", "MTU",
            "cni0 (1450), veth1 (1450) against eth0 (1400)", id="pods' packets are too large",
        ),
        pytest.param(
            replace(SOUND, flavours={"nft": 7, "legacy": 3}), "warning", "iptables",
            "7 rules of flavour nft, 3 rules of flavour legacy", id="both flavours of iptables",
        ),
        pytest.param(
            replace(SOUND, leftovers=("table ip kube-proxy of nf_tables",)), "error", "kube-proxy",
            "table ip kube-proxy of nf_tables", id="kube-proxy's rules beside ours",
        ),
        pytest.param(
            replace(SOUND, leftovers=("process 7, kube-proxy",), is_running=False), "note",
            "kube-proxy", "is, or was, at work", id="kube-proxy is at work, and we are not",
        ),
        pytest.param(
            replace(SOUND, mode="userspace", is_beside=True, leftovers=(BESIDE,)), "warning",
            "kube-proxy", BESIDE, id="its table drops what the node sends to us",
        ),
        pytest.param(
            replace(SOUND, tracked=Tracked(800, 1000, (("default/web", 700),))), "warning",
            "conntrack", "800 of 1000; most: default/web 700", id="conntrack fills",
        ),
        pytest.param(
            replace(SOUND, tracked=Tracked(990, 1000)), "error", "conntrack", "990 of 1000",
            id="conntrack is full",
        ),
        pytest.param(
            replace(SOUND, mode="userspace", open_files=4096), "warning", "open files",
            "at most 4096", id="few files",
        ),
        pytest.param(
            replace(SOUND, is_clock_synchronised=False), "note", "clock", "unsynchronised",
            id="clock runs free",
        ),
        pytest.param(
            replace(SOUND, server=SOUND.server._replace(skew_seconds=-300.0)), "warning", "clock",
            "ahead", id="clock is ahead",
        ),
        pytest.param(
            replace(SOUND, server=Server("https://192.0.2.1", "connection refused")), "error",
            "API server", "connection refused", id="no API server",
        ),
        pytest.param(
            replace(SOUND, server=Server("https://192.0.2.1", status=403)), "error", "API server",
            "said 403", id="API server refuses",
        ),
        pytest.param(
            replace(SOUND, server=Server("https://192.0.2.1", status=404)), "error", "Node",
            'no Node "node-a"', id="no Node of this name",
        ),
        pytest.param(
            replace(SOUND, needs_pod_cidrs=True), "error", "Node", "spec.podCIDRs is empty",
            id="pods are recognised by what the Node has not",
        ),
        pytest.param(
            replace(SOUND, server=SOUND.server._replace(certificate_seconds=86400.0)), "warning",
            "API server", "ends in 1 days", id="certificate ends soon",
        ),
        pytest.param(
            replace(SOUND, service_cidrs=("10.244.0.0/16",), links=(CARD,)), "error", "addresses",
            "Service range 10.244.0.0/16, pods 10.244.1.0/24", id="Services overlap pods",
        ),
        pytest.param(
            replace(SOUND, service_cidrs=("192.0.0.0/16",)), "error", "addresses",
            "Service range 192.0.0.0/16, this node 192.0.2.0/24", id="Services overlap the node",
        ),
        pytest.param(
            replace(SOUND, unsupported={"nftables": "no nf_tables", "userspace": None}), "error",
            "mode nftables", "this node can run userspace", id="mode cannot run",
        ),
        pytest.param(
            replace(SOUND, mode="userspace", capture="Operation not permitted"), "note",
            "mode userspace", "Operation not permitted", id="no socket lookup",
        ),
        pytest.param(
            replace(SOUND, mode="userspace", socket_lb="no cgroup v2 is mounted"), "note",
            "mode userspace", "no cgroup v2", id="no cgroup",
        ),
        pytest.param(
            replace(SOUND, unseen=(("rules of iptables", "that needs root"),)), "note",
            "not looked at", "that needs root", id="not seen",
        ),
    ],
)  # fmt: skip
def test_trouble_is_found(facts, severity, subject, words):
    (found,) = findings(facts)
    assert (found.severity, found.subject) == (severity, subject)
    assert words in " ".join((found.what, found.evidence, found.fix))
    assert found.evidence
    assert found.fix or found.subject == "not looked at"


def test_a_pyproxy_that_starts_tells_no_notes():
    facts = replace(SOUND, has_read_only_sysctls=True, sysctls={"net/ipv4/ip_forward": "0"})
    assert {finding.subject for finding in worth_a_warning(facts)} == {"forwarding", "bridge"}


# --- parts of the kernel --------------------------------------------------------------------------


def lacking(mode, modules, **more):
    facts = replace(SOUND, mode=mode, modules=modules, **more)
    begin = "the kernel lacks "
    whats = [f.what for f in findings(facts) if f.what.startswith(begin)]
    return {what.removeprefix(begin).partition(",")[0] for what in whats}


@pytest.mark.parametrize(
    ("module", "missing"),
    [
        pytest.param(Module(), False, id="nothing is known"),
        pytest.param(Module(loaded=frozenset({"nft_numgen"}), options={}), False, id="loaded"),
        pytest.param(Module(options={"CONFIG_NFT_NUMGEN": "y"}), False, id="built in"),
        pytest.param(Module(options={}), True, id="left out of the kernel"),
        pytest.param(Module(installed=frozenset({"nft_numgen"})), False, id="installed"),
        pytest.param(Module(installed=frozenset()), True, id="not installed"),
        pytest.param(
            Module(installed=frozenset(), options={"CONFIG_NFT_NUMGEN": "m"}), True,
            id="a module that is not installed",
        ),
        pytest.param(
            Module(installed=None, options={"CONFIG_NFT_NUMGEN": "m"}), False,
            id="a module, and no list of them",
        ),
    ],
)  # fmt: skip
def test_a_part_is_missing_only_if_something_proves_it(module, missing):
    assert ("nft_numgen" in lacking("nftables", module)) is missing


def test_each_mode_wants_its_own_parts():
    nothing = Module(options={})
    assert "xt_set" in lacking("iptables", nothing)
    assert "xt_set" not in lacking("nftables", nothing)
    assert {"ip_vs", "ip_vs_mh"} <= lacking("ipvs", nothing, schedulers=("mh",))
    assert lacking("userspace", nothing) == {"nft_tproxy", "BPF_SYSCALL", "CGROUP_BPF"}


def test_sctp_matters_where_a_service_has_it():
    assert "NF_CT_PROTO_SCTP" not in lacking("nftables", Module(options={}))
    assert "NF_CT_PROTO_SCTP" in lacking("nftables", Module(options={}), served=(SCTP,))


# --- what is quiet --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "facts",
    [
        pytest.param(
            replace(
                SOUND,
                sysctls={
                    **SOUND.sysctls, "net/ipv4/ip_local_port_range": "1024\t65535",
                    "net/ipv4/ip_local_reserved_ports": "80,30000-32767",
                },
            ),
            id="node ports are reserved",
        ),
        pytest.param(
            replace(TWO_WAYS, sysctls=SOUND.sysctls | {"net/ipv4/conf/all/rp_filter": "2"}),
            id="a loose filter outweighs a strict one",
        ),
        pytest.param(
            replace(
                without_sysctl("net/bridge/bridge-nf-call-iptables"),
                links=(CARD, BRIDGE._replace(networks=("172.17.0.1/16",)), PORT),
            ),
            id="a bridge without pods",
        ),
        pytest.param(
            replace(without_sysctl("net/bridge/bridge-nf-call-iptables"), mode="userspace"),
            id="userspace needs no rules at bridges",
        ),
        pytest.param(replace(SOUND, leftovers=()), id="nothing is left"),
        pytest.param(
            replace(SOUND, is_beside=True, leftovers=(BESIDE,)), id="kube-proxy is to be there"
        ),
        pytest.param(
            replace(SOUND, mode="userspace", is_beside=True, leftovers=("3 chains",)),
            id="chains of iptables drop nothing",
        ),
    ],
)  # fmt: skip
def test_what_does_no_harm_is_not_told(facts):
    assert findings(facts) == ()


# --- reading and printing -------------------------------------------------------------------------


def test_default_routes_lead_to_uplinks():
    routes = (
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
        "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
        "eth1\t00000000\t010200C0\t0003\t0\t0\t9\t00000000\t0\t0\t0\n"
    )
    assert default_ways(routes) == ("eth0", "eth1")


def test_modules_are_named_as_the_kernel_names_them():
    assert module_name("kernel/net/netfilter/xt-set.ko.zst") == "xt_set"


def test_options_that_are_off_are_not_there():
    assert options_in("# CONFIG_A is not set\nCONFIG_B=m\nCONFIG_C=y\n") == {
        "CONFIG_B": "m", "CONFIG_C": "y",
    }  # fmt: skip


def test_the_worst_comes_first_and_lines_fit_a_terminal():
    facts = replace(
        SOUND, is_clock_synchronised=False, leftovers=("x" * 90,),
        unsupported={"nftables": "because " * 40},
    )  # fmt: skip
    report = Report("node-a", "nftables", findings(facts))
    assert [f.severity for f in report.findings] == ["error", "error", "note"]
    printed = text(report)
    assert printed.startswith("node-a, mode nftables: 2 errors, 1 note\n")
    assert max(map(len, printed.splitlines())) <= 100


def test_no_findings_are_one_line():
    assert text(Report("node-a", "ipvs", ())) == "node-a, mode ipvs: nothing is wrong\n"


def test_a_finding_has_what_evidence_and_fix():
    report = Report("n", "ipvs", (Finding("note", "clock", "it is wrong", "by 9 s", "mend it"),))
    assert text(report).splitlines()[1:] == [
        "", "note: clock: it is wrong", "  by 9 s", "  fix: mend it",
    ]  # fmt: skip
