"""Who answers at a load balancer's address: this node, or the load balancer that has it."""

import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

pytestmark = pytest.mark.root

BALANCED = {4: "203.0.113.9", 6: "2001:db8::9"}
POD = {4: "10.244.1.2", 6: "fd00:244:1::2"}
NETS = {  # of the links from the node to the others: the node has .1
    "pod": {4: "10.244.1", 6: "fd00:244:1:"},
    "client": {4: "198.51.100", 6: "fd00:5e:"},
    "balancer": {4: "192.0.2", 6: "fd00:c0de:"},
}
SERVER = """
import socket, sys, threading
def serve(s):
    while True:
        c, _ = s.accept()
        c.sendall(sys.argv[2].encode())
        c.close()
for ip in sys.argv[3:]:
    s = socket.create_server((ip, int(sys.argv[1])), family=socket.AF_INET6 if ":" in ip else socket.AF_INET)
    threading.Thread(target=serve, args=(s,)).start()
"""  # noqa: E501
CLIENT = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], 80), 1) as c:
        print(c.recv(99).decode())
except TimeoutError:
    print("silence")
except ConnectionRefusedError:
    print("refused")
"""
SERVICE = """
apiVersion: v1
kind: Service
metadata:
  name: web
  annotations: {{{annotation}}}
spec:
  type: LoadBalancer
  ipFamilyPolicy: PreferDualStack
  ipFamilies: [IPv4, IPv6]
  clusterIPs: [10.96.0.10, "fd00:96::10"]
  clusterIP: 10.96.0.10
  selector: {{app: web}}
  loadBalancerSourceRanges: {ranges}
  ports: [{{port: 80, targetPort: 8080, nodePort: 30080}}]
status:
  loadBalancer: {{ingress: [{{ip: 203.0.113.9}}, {{ip: "2001:db8::9"}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: web-1, labels: {{app: web}}}}
spec: {{nodeName: {pod_node}}}
status:
  podIP: {pod4}
  podIPs: [{{ip: {pod4}}}, {{ip: "{pod6}"}}]
  conditions: [{{type: Ready, status: "True"}}]
---
apiVersion: v1
kind: Node
metadata: {{name: here}}
status:
  addresses: [{{type: InternalIP, address: 192.0.2.1}}, {{type: InternalIP, address: "fd00:c0de::1"}}]
"""  # noqa: E501


class Lab:
    """A node, a pod, a stranger and a load balancer, each in a namespace of its own."""

    def __init__(self, stack, folder, mode):
        self._stack, self._folder = stack, folder
        self._inside = {name: self._namespace() for name in ("node", *NETS)}
        for name, nets in NETS.items():
            pid = self._inside[name].pid
            self.ip("node", f"link add {name} type veth peer name eth0 netns {pid}")
            self.ip("node", f"link set {name} up")
            self.ip(name, "link set eth0 up")
            for family, net in nets.items():
                size = "/24" if family == 4 else "/64 nodad"
                dot = "." if family == 4 else ":"
                self.ip("node", f"addr add {net}{dot}1{size.partition(' ')[0]} dev {name}")
                self.ip(name, f"addr add {net}{dot}2{size} dev eth0")
                self.ip(name, f"route add default via {net}{dot}1")
        for family, ip in BALANCED.items():
            dot = "." if family == 4 else ":"
            self.ip("balancer", f"addr add {ip} dev lo")
            self.ip("node", f"route add {ip} via {NETS['balancer'][family]}{dot}2")
        self._serve("pod", 8080, "web", *POD.values())
        self._serve("balancer", 80, "balancer", *BALANCED.values())
        (folder / "state").mkdir()
        self.declare()
        words = ["--proxy-mode", mode, "--manifests", str(folder / "state")]
        words += ["--hostname-override", "here"]
        words += ["--cluster-cidr", "10.244.0.0/16,fd00:244::/32"]
        self._proxy = self._start("node", sys.executable, "-m", "pyproxy", *words)

    def declare(self, traffic="", ranges="[]", pod_node="here"):
        annotation = f"pyproxy.io/load-balancer-traffic: {traffic}" if traffic else ""
        text = SERVICE.format(
            annotation=annotation, ranges=ranges, pod_node=pod_node, pod4=POD[4], pod6=POD[6]
        )
        fresh = self._folder / "fresh"
        fresh.write_text(text)
        fresh.rename(self._folder / "state" / "all.yaml")

    def answers(self, family):
        script = (sys.executable, "-c", CLIENT, BALANCED[family])
        asking = {
            name: subprocess.Popen(self._enter(name, *script), stdout=subprocess.PIPE, text=True)
            for name in ("pod", "node", "client")
        }
        return {name: client.communicate()[0].strip() for name, client in asking.items()}

    def comes_to(self, expected):
        """Wait until each asks both families and gets these answers."""
        deadline = time.monotonic() + 30
        while (found := [self.answers(4), self.answers(6)]) != [expected, expected]:
            assert self._proxy.poll() is None, "pyproxy has ended"
            assert time.monotonic() < deadline, found
            time.sleep(0.2)  # noqa: TID251 - a test without a loop

    def ip(self, name, line):
        with subprocess.Popen(self._enter(name, "ip", *line.split())) as process:
            assert process.wait() == 0, line

    def _namespace(self):
        settings = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")
        script = "".join(f"echo 1 > /proc/sys/{setting}; " for setting in settings)
        script += "ip link set lo up; echo up; exec sleep 600"
        words = ["unshare", "--net", "sh", "-c", script]
        process = self._run(words, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"up\n"
        return process

    def _serve(self, name, port, says, *ips):
        self._start(name, sys.executable, "-c", SERVER, str(port), says, *ips)

    def _start(self, name, *words):
        return self._run(self._enter(name, *words))

    def _enter(self, name, *words):
        return ["nsenter", f"--net=/proc/{self._inside[name].pid}/ns/net", *words]

    def _run(self, words, **streams):
        process = self._stack.enter_context(subprocess.Popen(words, **streams))
        self._stack.callback(process.kill)
        return process


@pytest.mark.parametrize("mode", ["userspace", "nftables", "iptables"])
def test_pods_and_the_node_go_by_the_load_balancer_where_they_are_told_to(mode, tmp_path):
    with ExitStack() as stack:
        lab = Lab(stack, tmp_path, mode)
        by_node = {"pod": "web", "node": "web", "client": "web"}
        past_node = {"pod": "balancer", "node": "balancer", "client": "web"}
        lab.comes_to(by_node)
        lab.declare("pass-through")
        lab.comes_to(past_node)
        lab.declare("pass-through", ranges='["198.51.100.77/32", "fd00:5e::77/128"]')
        lab.comes_to({**past_node, "client": "silence"})
        lab.declare("local-else-pass-through")
        lab.comes_to(by_node)
        lab.declare("local-else-pass-through", pod_node="elsewhere")
        lab.comes_to(past_node)
        lab.declare("short-circuit", pod_node="elsewhere")
        lab.comes_to(by_node)
