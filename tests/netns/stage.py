"""The demo's cluster with more Services, a daemon on its first node, and commands that ask it.

Importing it does nothing; ``isolated`` moves the process into namespaces that it never leaves.
"""

import asyncio
import shutil
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from pyproxy.demo.cluster import NODES, PODS
from pyproxy.demo.lab import Lab, isolate
from pyproxy.demo.story import Demo
from pyproxy.demo.table import Look

COMMAND_SECONDS = 30
START_SECONDS = 90  # in a virtual machine that is emulated
BALANCED = "  clusterIP: 10.96.0.10"  # of a Service with pods on both nodes
AWAY = PODS[4]  # of the other node

EXTRA = f"""
apiVersion: v1
kind: Service
metadata: {{name: apart, namespace: shop, resourceVersion: "101"}}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.20
  externalTrafficPolicy: Local
  selector: {{app: apart}}
  ports: [{{name: http, port: 80, nodePort: 30020}}]
status: {{loadBalancer: {{ingress: [{{ip: 198.18.0.20}}]}}}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: apart-x
  namespace: shop
  resourceVersion: "102"
  labels: {{kubernetes.io/service-name: apart}}
addressType: IPv4
ports: [{{name: http, port: 80}}]
endpoints:
- addresses: [{AWAY.ips[0]}]
  nodeName: {AWAY.node}
  conditions: {{ready: true}}
  targetRef: {{kind: Pod, name: {AWAY.name}}}
---
apiVersion: v1
kind: Service
metadata: {{name: inner, namespace: shop, resourceVersion: "103"}}
spec:
  clusterIP: 10.96.0.23
  internalTrafficPolicy: Local
  ports: [{{name: http, port: 80}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: inner-x
  namespace: shop
  labels: {{kubernetes.io/service-name: inner}}
addressType: IPv4
ports: [{{name: http, port: 80}}]
endpoints:
- {{addresses: [{AWAY.ips[0]}], nodeName: {AWAY.node}, conditions: {{ready: true}}}}
---
apiVersion: v1
kind: Service
metadata: {{name: fenced, namespace: default, resourceVersion: "104"}}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.21
  allocateLoadBalancerNodePorts: false
  loadBalancerSourceRanges: [203.0.113.0/24]
  selector: {{app: my-nginx}}
  ports: [{{port: 80}}]
status: {{loadBalancer: {{ingress: [{{ip: 198.18.0.21}}]}}}}
---
apiVersion: v1
kind: Service
metadata: {{name: proxied, namespace: default, resourceVersion: "105"}}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.22
  allocateLoadBalancerNodePorts: false
  selector: {{app: my-nginx}}
  ports: [{{port: 80}}]
status:
  loadBalancer:
    ingress: [{{ip: 198.18.0.22, ipMode: Proxy}}, {{hostname: lb.example}}]
---
apiVersion: v1
kind: Service
metadata:
  name: weighted
  namespace: default
  annotations: {{pyproxy.io/weights: "pod/nginx-1=3,pod/nginx-2=0"}}
spec:
  clusterIP: 10.96.0.24
  sessionAffinity: ClientIP
  selector: {{app: my-nginx}}
  ports: [{{port: 80}}]
---
apiVersion: v1
kind: Service
metadata: {{name: rival, namespace: default}}
spec:
  clusterIP: 10.96.0.25
  externalIPs: [198.18.0.10]
  selector: {{app: my-nginx}}
  ports: [{{port: 80}}]
---
apiVersion: v1
kind: Service
metadata:
  name: passing
  namespace: default
  annotations: {{pyproxy.io/load-balancer-traffic: pass-through}}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.26
  allocateLoadBalancerNodePorts: false
  selector: {{app: my-nginx}}
  ports: [{{port: 80}}]
status: {{loadBalancer: {{ingress: [{{ip: 198.18.0.26}}]}}}}
---
apiVersion: v1
kind: Service
metadata: {{name: heads, namespace: default}}
spec:
  clusterIP: None
  selector: {{app: my-nginx}}
  ports: [{{port: 80}}]
"""


class Outcome(NamedTuple):
    code: int
    output: str
    errors: str


class Stage:
    """The lab while the proxy runs in it."""

    def __init__(self, lab, folder):
        self.lab = lab
        self.manifests = folder / "manifests"
        self.socket = folder / "run" / "pyproxy.sock"
        self.log = folder / "pyproxy.log"

    def stricter(self):
        """Copy the manifests to a folder where one Service has policy Local; return its name."""
        folder = self.manifests.with_name("stricter")
        shutil.copytree(self.manifests, folder)
        for path in folder.glob("*.yaml"):
            text = path.read_text()
            path.write_text(text.replace(BALANCED, f"{BALANCED}\n  externalTrafficPolicy: Local"))
        return folder.name

    async def command(self, *words):
        """Run pyproxy, as root of the node would."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "pyproxy", *words, "--control-socket", str(self.socket),
            cwd=self.manifests.parent,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            preexec_fn=lambda: self.lab.enter(NODES[0].name),
        )  # fmt: skip
        async with asyncio.timeout(COMMAND_SECONDS):
            output, errors = await process.communicate()
        return Outcome(process.returncode, output.decode(), errors.decode())


def isolated():
    """Move this process, which has one thread, into the lab for good."""
    isolate()
    return Lab()


@asynccontextmanager
async def staged(lab, folder, mode):
    """Have the proxy run in a mode for the length of a block."""
    stage = Stage(lab, folder)
    stage.manifests.mkdir()
    demo = Demo(lab, stage.manifests, mode, lambda line: None, Look())
    (stage.manifests / "extra.yaml").write_text(EXTRA)
    # By itself it looks at nothing: else it might mend what a test has broken before that is asked.
    calm = "--iptables-sync-period=1h"
    flags = ("--service-metrics=endpoint", calm, "--control-socket", str(stage.socket))
    program = (sys.executable, "-m", "pyproxy", "run", *flags)
    async with demo.on_stage(stage.log, program, START_SECONDS):
        yield stage


def folder_of(path):
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
