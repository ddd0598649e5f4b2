"""A cluster for pods in this namespace: an API server, and one Service that works."""

import shutil
import socket
import ssl
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path

from pyproxy.demo.traffic import ask, http_status, serve
from pyproxy.model import Address
from tests.fakes.apiserver import FakeApiServer

TLS = Path(__file__).parent.parent / "data" / "tls"
TOKEN = "s3cr3t"
NODE_IP = "192.0.2.11"
POD_IP = "10.244.1.10"
CLUSTER_IP = Address("10.96.0.10", 80)
NODE_PORT = Address(NODE_IP, 30080)
HEALTHZ = Address(NODE_IP, 10256)
UNDEFINED = Address("10.96.0.10", 81)


@asynccontextmanager
async def cluster():
    """Serve Node ``here`` and Service ``web`` over TLS; the pod behind it says its name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "server.crt", TLS / "server.key")
    sock = socket.create_server((POD_IP, 8080))
    async with FakeApiServer(ssl_context=context) as api, await serve("web-1", sock):
        addresses = [{"type": "InternalIP", "address": NODE_IP}]
        api.put("nodes", "here", status={"addresses": addresses})
        ports = [{"port": CLUSTER_IP.port, "nodePort": NODE_PORT.port, "protocol": "TCP"}]
        ips = [CLUSTER_IP.ip]
        spec = {"type": "NodePort", "clusterIP": ips[0], "clusterIPs": ips, "ports": ports}
        api.put("services", "web", spec=spec)
        api.put(
            "endpointslices", "web-1",
            metadata={"labels": {"kubernetes.io/service-name": "web"}},
            addressType="IPv4",
            endpoints=[{"addresses": [POD_IP], "conditions": {"ready": True}}],
            ports=[{"name": "", "port": 8080, "protocol": "TCP"}],
        )  # fmt: skip
        yield api


def service_account(folder):
    """Write the files of a service account; return their folder."""
    account = folder / "account"
    account.mkdir()
    shutil.copy(TLS / "ca.crt", account)
    (account / "token").write_text(TOKEN)
    (account / "namespace").write_text("kube-system")
    return account


async def answer(frontend, seconds=2.0):
    """Ask a frontend from the node; return the pod's name, or what happened instead."""
    reply = await ask(opened(), frontend, seconds)
    return reply.pod or reply.result


async def status(address, path="/healthz"):
    return await http_status(opened(), address, path)


def opened():
    sock = socket.socket()
    sock.setblocking(False)
    return sock


def tokens(api):
    """Return what the API server was shown by those who asked it."""
    return {asked.headers["Authorization"] for asked in api.asked}


def printed(*words, stdin=""):
    """Return what a program prints."""
    pipe = subprocess.PIPE
    child = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    output, _ = child.communicate(stdin, timeout=120)
    assert child.returncode == 0, output
    return output
