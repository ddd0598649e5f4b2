"""``pyproxy doctor`` where things are broken on purpose."""

import json
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pyproxy.doctor.facts import Served
from pyproxy.doctor.look_closer import flows
from pyproxy.model import Frontend
from pyproxy.proxier._flavour import programs_of

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("process_names")]

LIMIT_SECONDS = 60
MANIFEST = """
apiVersion: v1
kind: Node
metadata: {name: node-a}
status: {addresses: [{type: InternalIP, address: 192.0.2.11}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec: {clusterIP: 10.96.0.10, type: NodePort, ports: [{name: http, port: 80, nodePort: 30080}]}
"""
SYSCTLS = Path("/proc/sys")


def ran(*words, text=None):
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        output, errors = process.communicate(text, timeout=LIMIT_SECONDS)
    return process.returncode, output, errors


def told(*words):
    code, output, errors = ran(*words)
    assert code == 0, errors
    return output


@contextmanager
def sysctl(name, value):
    path = SYSCTLS / name
    before = path.read_text()
    path.write_text(value)
    yield
    path.write_text(before)


@pytest.fixture
def sound():
    """A node that forwards."""
    with sysctl("net/ipv4/ip_forward", "1"), sysctl("net/ipv6/conf/all/forwarding", "1"):
        yield


@pytest.fixture
def examined(sound, tmp_path):
    """Return what the command prints, by subject, and its exit code."""
    manifest = tmp_path / "web.yaml"
    manifest.write_text(MANIFEST)

    def examine(*words):
        code, output, errors = ran(
            sys.executable, "-m", "pyproxy", "doctor", "-f", str(manifest), "--node-name=node-a",
            "-o", "json", *words,
        )  # fmt: skip
        assert errors == "", errors
        report = json.loads(output)
        return code, {f["subject"]: f for f in report["findings"]}

    return examine


def test_a_sound_node_has_nothing_worse_than_notes(examined):
    code, found = examined()
    assert code == 0, found
    assert {f["severity"] for f in found.values()} <= {"note"}


def test_no_forwarding(examined):
    with sysctl("net/ipv4/ip_forward", "0"):
        code, found = examined()
    assert code == 1
    assert found["forwarding"]["severity"] == "error"
    assert found["forwarding"]["evidence"] == "net.ipv4.ip_forward is 0"


def test_strict_reverse_path_filter_with_two_ways_out(examined):
    with ExitStack() as undone:
        for number in (1, 2):
            name = f"way{number}"
            told("ip", "link", "add", name, "type", "bridge")
            undone.callback(told, "ip", "link", "delete", name)
            told("ip", "link", "set", name, "up")
            told("ip", "route", "add", "default", "dev", name, "metric", str(number))
        with sysctl("net/ipv4/conf/way2/rp_filter", "1"):
            code, found = examined()
    assert code == 1
    assert "by way2 are dropped" in found["rp_filter"]["what"]
    assert "way1, way2" in found["rp_filter"]["evidence"]


@pytest.mark.parametrize("flavour", ["nft", "legacy"])
def test_a_rule_of_somebody_else_that_takes_a_service(examined, flavour):
    program = programs_of(4)[flavour].plain
    rule = ["-d", "10.96.0.10/32", "-p", "tcp", "--dport", "80", "-j", "DNAT", "--to", "192.0.2.99"]
    told(program, "-t", "nat", "-A", "PREROUTING", *rule)
    try:
        code, found = examined()
    finally:
        told(program, "-t", "nat", "-D", "PREROUTING", *rule)
    assert code == 1
    assert found["foreign rules"]["severity"] == "error"
    assert "10.96.0.10:80/TCP (default/web)" in found["foreign rules"]["what"]
    assert f"iptables ({flavour}) IPv4 nat PREROUTING" in found["foreign rules"]["evidence"]


def test_a_table_of_somebody_else_that_drops_a_node_port(examined):
    told("nft", "add table inet fw; add chain inet fw first"
         " { type filter hook prerouting priority -200; };"
         " add rule inet fw first tcp dport { 22, 30080 } drop")  # fmt: skip
    try:
        code, found = examined()
    finally:
        told("nft", "delete table inet fw")
    assert code == 1
    assert "drops connections to node:30080/TCP" in found["foreign rules"]["what"]
    assert found["foreign rules"]["evidence"].startswith(
        "nft table inet fw, chain first: tcp dport"
    )


def test_rules_of_both_flavours(examined):
    rule = ("INPUT", "-p", "tcp", "--dport", "9999", "-j", "DROP")
    both = [programs_of(4)[flavour].plain for flavour in ("nft", "legacy")]
    for program in both:
        told(program, "-A", *rule)
    try:
        code, found = examined()
    finally:
        for program in both:
            told(program, "-D", *rule)
    assert code == 1
    assert "flavour legacy" in found["iptables"]["evidence"]
    assert "flavour nft" in found["iptables"]["evidence"]


def test_what_kube_proxy_left(examined):
    told("nft", "add table ip kube-proxy")
    told("ip", "link", "add", "kube-ipvs0", "type", "bridge")
    try:
        _, output, _ = ran(sys.executable, "-m", "pyproxy", "doctor")
    finally:
        told("ip", "link", "delete", "kube-ipvs0")
        told("nft", "delete table ip kube-proxy")
    assert "table ip kube-proxy of nf_tables" in output
    assert "interface kube-ipvs0" in output


def test_a_bridge_of_pods_without_hairpin_mode(examined):
    told("ip", "link", "add", "cni0", "type", "bridge")
    told("ip", "link", "add", "pod1", "type", "veth", "peer", "name", "inside1")
    told("ip", "link", "set", "pod1", "master", "cni0")
    told("ip", "address", "add", "10.244.1.1/24", "dev", "cni0")
    try:
        _, found = examined("--cluster-cidr=10.244.0.0/16")
        told("bridge", "link", "set", "dev", "pod1", "hairpin", "on")
        _, mended = examined("--cluster-cidr=10.244.0.0/16")
    finally:
        told("ip", "link", "delete", "cni0")
        told("ip", "link", "delete", "pod1")
    assert "pod1" in found["hairpin"]["evidence"]
    assert "hairpin" not in mended


def test_it_changes_nothing(examined):
    def everything():
        legacy = Path("/proc/net/ip_tables_names")
        return (
            told("nft", "list", "ruleset"), told("ip", "address"), told("ip", "rule"),
            told("ip", "route", "show", "table", "all"),
            legacy.read_text() if legacy.exists() else "",
        )  # fmt: skip

    before = everything()
    for mode in ("nftables", "iptables", "userspace", "ipvs"):
        examined(f"--mode={mode}")
        assert (mode, everything()) == (mode, before)


def test_it_works_without_rights_and_says_what_it_could_not_see():
    bare = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all")
    with sysctl("net/ipv4/ip_forward", "0"):
        code, output, errors = ran(*bare, sys.executable, "-m", "pyproxy", "doctor")
    assert (code, errors) == (1, "")
    assert "not looked at: rules of iptables" in output
    assert "not looked at: rules of nf_tables" in output


def test_connections_are_counted_by_service(sound):
    """A flow whose client asked for a frontend is that Service's, whoever answered."""
    told(
        "nft", "add table ip watch; add chain ip watch c { type filter hook output priority 0; };"
        " add rule ip watch c ct state new counter",
    )  # fmt: skip
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    clients = [socket.create_connection(address) for _ in range(3)]
    try:
        frontend = Frontend("127.0.0.1", address[1], "TCP")
        assert flows([Served(frontend, "default/web")]) == (("default/web", 3),)
    finally:
        for sock in (*clients, server):
            sock.close()
        told("nft", "delete table ip watch")


@contextmanager
def serving(folder, mode):
    """Have pyproxy serve this namespace; yield its socket and its log."""
    (folder / "manifests").mkdir()
    (folder / "manifests" / "web.yaml").write_text(MANIFEST)
    path, log = folder / "run" / "pyproxy.sock", folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pyproxy", f"--manifests={folder / 'manifests'}",
             f"--control-socket={path}", f"--proxy-mode={mode}", "--hostname-override=node-a",
             "--cluster-cidr=10.244.0.0/16", f"--state-dir={folder}"],
            stdout=file, stderr=file,
        )  # fmt: skip
    socket_flag = f"--control-socket={path}"
    try:
        told(sys.executable, "-m", "pyproxy", "wait", "service/default/web", socket_flag)
        yield socket_flag, log
    finally:
        process.terminate()
        process.wait(LIMIT_SECONDS)
        told(sys.executable, "-m", "pyproxy", "cleanup")


@pytest.mark.parametrize("mode", ["nftables", "iptables", "userspace"])
def test_beside_a_pyproxy_that_runs(sound, tmp_path, mode):
    """Its own rules are not foreign, its mode is the one examined, and it told the same itself."""
    with sysctl("net/ipv4/ip_forward", "0"), serving(tmp_path, mode) as (socket_flag, log):
        words = (sys.executable, "-m", "pyproxy", "doctor", "-o", "json", socket_flag)
        code, output, errors = ran(*words)
        warnings = [line for line in log.read_text().splitlines() if line.startswith("W")]
    report = json.loads(output)
    worse = [f["subject"] for f in report["findings"] if f["severity"] != "note"]
    assert (code, report["mode"], report["node"], errors) == (1, mode, "node-a", "")
    assert set(worse) - {"open files"} == {"forwarding"}  # this machine may allow too few
    assert any("forwards no IPv4 packets" in line for line in warnings), warnings
