"""The real process in mode ipvs serves with the capabilities of its manifest, and no others."""

import asyncio
import sys
from contextlib import asynccontextmanager

import pytest
import yaml

from tests.deploy.tools import COMPONENTS, DEPLOY
from tests.guest import lab
from tests.netns.node import NODE_IP

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])
PATIENCE_SECONDS = 180  # this machine is slow
VIP = "10.96.0.10"
MANIFESTS = [
    {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"clusterIP": VIP, "ports": [{"port": 80, "targetPort": lab.PORT}]},
    },
    {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [lab.POD[4]["b"]]}],
        "ports": [{"name": "", "port": lab.PORT}],
    },
    {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "here"},
        "status": {"addresses": [{"type": "InternalIP", "address": NODE_IP[4]}]},
    },
]


def capabilities():
    """Return what the base gives; the component of the mode changes nothing of it."""
    assert "capabilities" not in (COMPONENTS / "mode-ipvs" / "kustomization.yaml").read_text()
    objects = yaml.safe_load_all((DEPLOY / "pyproxy.yaml").read_text())
    (daemonset,) = (obj for obj in objects if obj["kind"] == "DaemonSet")
    (container,) = daemonset["spec"]["template"]["spec"]["containers"]
    return [name.lower() for name in container["securityContext"]["capabilities"]["add"]]


@asynccontextmanager
async def running(folder, names):
    """Run pyproxy as root with these capabilities; yield the lines of its log."""
    manifests = folder / "manifests"
    manifests.mkdir()
    (manifests / "all.yaml").write_text(yaml.safe_dump_all(MANIFESTS))
    bounds = ",".join(["-all", *(f"+{name}" for name in names)])
    process = await asyncio.create_subprocess_exec(
        "setpriv", f"--bounding-set={bounds}", f"--inh-caps={bounds}", "--no-new-privs",
        sys.executable, "-m", "pyproxy", "--proxy-mode=ipvs", f"--manifests={manifests}",
        "--hostname-override=here", f"--cluster-cidr={lab.PODS[4]},{lab.PODS[6]}",
        "--control-socket=",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process.stdout
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


async def logged(output, words):
    """Read the log until it has these words; return all that was read."""
    log = ""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while words not in log:
            line = await output.readline()
            assert line, f"it ended without {words!r}:\n{log}"
            log += line.decode()
    return log


async def test_it_serves_with_those_of_its_manifest(tmp_path):
    async with lab.pods(4, "TCP"), running(tmp_path, capabilities()) as output:
        log = await logged(output, '"serving"')
        assert "cannot" not in log, log
        assert (await lab.ask("a", VIP, 80)).pod == "b"
    lab.output_of(sys.executable, "-m", "pyproxy", "cleanup")


async def test_none_of_them_is_there_for_nothing(tmp_path):
    assert capabilities() == ["net_admin"]
    async with running(tmp_path, []) as output:
        await logged(output, "mode: ipvs cannot work on this node")
