"""Socket load balancing without its process: killed, started again, and cleaned up after."""

import json

from tests.contract.test_cli import ended, started
from tests.netns.node import LOOPBACK
from tests.netns.test_socketlb import Backend, client_asks

VIP = "10.96.0.77"


def manifest(*backends):
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"clusterIP": VIP, "ports": [{"port": 80}]},
    }
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "web-1",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "ports": [{"port": backends[0].address.port}],
        "endpoints": [{"addresses": [b.address.ip]} for b in backends],
    }
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": [service, endpoints]})


async def test_sockets_are_balanced_through_a_kill_and_until_a_cleanup(config, bpffs, tmp_path):
    where, objects = (VIP, 80), tmp_path / "objects.json"
    words = (
        f"--manifests={objects}",
        "--proxy-mode=userspace",
        "--userspace-workers=1",  # others would serve on, and hold the pipes of who was killed
        f"--userspace-cgroup={config.userspace.cgroup}",
        f"--userspace-runtime-dir={tmp_path}",
        "--hostname-override=here",
    )
    with Backend(4, "a") as a, Backend(4, "b") as b:
        objects.write_text(manifest(a))
        async with started("run", *words) as process:
            await serving(process)
            assert await client_asks(4, where) == ("a", True)
            process.kill()
            await process.wait()
        assert await client_asks(4, where) == ("a", True)
        objects.write_text(manifest(b))
        assert b.address.ip == LOOPBACK[4]
        async with started("run", *words) as process:
            await serving(process)
            assert await client_asks(4, where) == ("b", True)
            process.terminate()
            await ended(process)
        assert await client_asks(4, where) == ("b", True)
        async with started("cleanup") as process:
            outcome = await ended(process)
            assert outcome.code == 0, outcome.errors
        assert not list(bpffs.glob("pyproxy/*"))


async def serving(process):
    """Return when a process has said that it serves."""
    said = b""
    while line := await process.stderr.readline():
        said += line
        if b'"serving"' in line:
            return
    raise AssertionError(said.decode())
