"""The pods of deploy/ serve, with the capabilities that their manifests give them, and no fewer."""

import asyncio
import base64
import json
import sys

import pytest

from pyproxy.proxier._flavour import programs_of
from pyproxy.proxier.ipvs import unsupported
from tests.deploy.tools import MODES, kustomized, mode_components, only
from tests.netns.container import PATIENCE_SECONDS, Pod
from tests.netns.standin import (
    CLUSTER_IP,
    NODE_PORT,
    TLS,
    TOKEN,
    UNDEFINED,
    answer,
    cluster,
    printed,
    service_account,
    tokens,
)

pytestmark = [pytest.mark.asyncio(loop_factories=["asyncio"]), pytest.mark.usefixtures("uplink")]
WITHOUT = [  # mode, capabilities, and what is in the log without it
    ("nftables", "NET_ADMIN", "pyproxy: mode: nftables cannot work on this node"),
    ("iptables", "NET_ADMIN", "pyproxy: mode: iptables cannot work on this node"),
    ("iptables", "NET_RAW", "Can't open socket to ipset"),
    ("userspace", "NET_ADMIN", "cannot make 10.96.0.10 local to this node"),
    ("userspace", "NET_BIND_SERVICE BPF", "port 80 is privileged"),  # where bpf(2) is not let pass
    ("userspace", "BPF", "undefined ports of Service addresses will refuse"),
    ("userspace", "PERFMON", "undefined ports of Service addresses will refuse"),
]
POLL_SECONDS = 0.1
LEFT = "KUBE-SVC-LEFTBYKUBEPROXY"
RULES = f"""*nat
:KUBE-SERVICES - [0:0]
:{LEFT} - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.96.0.77/32 -p tcp -m tcp --dport 80 -j {LEFT}
COMMIT
"""


def deployed(folder, api, *components, host=(), flags=()):
    """Return the pod of the base and components, with what whoever installs it adds."""
    (folder / "overlay").mkdir()
    text = kustomized(folder / "overlay", *components)
    server, _, port = api.url.removeprefix("https://").partition(":")
    data = {
        "pyproxy": only("ConfigMap", text)["data"],
        "pyproxy-cluster": {
            "KUBERNETES_SERVICE_HOST": server,
            "KUBERNETES_SERVICE_PORT": port,
            "CLUSTER_CIDR": "10.244.0.0/16",
        },
    }
    daemonset = only("DaemonSet", text)
    (container,) = daemonset["spec"]["template"]["spec"]["containers"]
    container["args"] += ["--userspace-drain-timeout=0s", *flags]  # no successor comes
    return Pod(daemonset, data, folder, service_account(folder), host)


@pytest.mark.parametrize("mode", MODES)
async def test_a_pod_serves_with_the_capabilities_of_its_manifest(mode, tmp_path):
    async with cluster() as api:
        pod = deployed(tmp_path, api, *mode_components(mode))
        async with pod.running("prepare") as prepare:
            code = await prepare.end()
        if mode == "ipvs" and (reason := unsupported()):
            assert (code, reason in prepare.log) == (1, True)  # nothing more can be seen here
            return
        assert code == 0, prepare.log
        async with pod.running("pyproxy") as pyproxy:
            await pyproxy.until_logged("serving")
            assert [await answer(f) for f in (CLUSTER_IP, NODE_PORT)] == ["web-1", "web-1"]
            if mode == "userspace":  # what CAP_BPF and CAP_PERFMON are for
                assert await answer(UNDEFINED, 0.3) == "timed out"
            assert await pyproxy.stop() == 0
        assert "cannot clean up after others" not in pyproxy.log
    assert tokens(api) == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(("mode", "capability", "words"), WITHOUT)
async def test_no_capability_is_there_for_nothing(mode, capability, words, tmp_path):
    async with cluster() as api:
        pod = deployed(tmp_path, api, *mode_components(mode))
        async with pod.running("pyproxy", without=capability.split()) as pyproxy:
            await pyproxy.until_logged(words)


@pytest.fixture
def cgroup(test_cgroup, tmp_path):
    """The test's cgroup, where nobody unmounts it."""
    at = tmp_path / "cgroup"
    at.mkdir()
    printed("mount", "--bind", str(test_cgroup), str(at))
    yield at
    printed("umount", str(at))


async def test_sockets_are_balanced(cgroup, bpffs, tmp_path):
    host = {"/sys/fs/cgroup": cgroup, "/sys/fs/bpf": bpffs}
    async with cluster() as api:
        pod = deployed(tmp_path, api, "mode-userspace", "socket-lb", host=host)
        async with pod.running("pyproxy") as pyproxy:
            await pyproxy.until_logged("serving")
            assert await answer(CLUSTER_IP) == "web-1"
        assert '"sockets are balanced when they connect" family=4' in pyproxy.log
        assert "sockets are not balanced" not in pyproxy.log
        assert list(bpffs.iterdir())  # and go on being so


async def test_a_node_serves_what_it_knew_while_the_api_server_is_away(tmp_path):
    async with cluster() as api:
        pod = deployed(tmp_path, api)
        async with pod.running("pyproxy") as pyproxy:
            await pyproxy.until_logged("serving")
    printed(sys.executable, "-m", "pyproxy", "cleanup")  # as after a boot
    async with cluster():  # another one, for its pod
        async with pod.running("prepare") as prepare:
            assert await prepare.end() == 0, prepare.log
        async with pod.running("pyproxy") as pyproxy:
            await pyproxy.until_logged("serving")
            assert await answer(CLUSTER_IP) == "web-1"


async def test_a_kubeconfig_may_have_its_certificates_inside(tmp_path):
    """Those are files of /tmp while it is read, and the root file system is read-only."""
    (tmp_path / "state").mkdir()
    host = {"/var/lib/pyproxy": tmp_path / "state"}
    async with cluster() as api:
        (tmp_path / "state" / "kubeconfig").write_text(json.dumps(kubeconfig(api.url)))
        flags = ["--kubeconfig=/var/lib/pyproxy/kubeconfig"]
        pod = deployed(tmp_path, api, host=host, flags=flags)
        async with pod.running("pyproxy") as pyproxy:
            await pyproxy.until_logged("serving")
            assert await answer(CLUSTER_IP) == "web-1"
    assert not list((tmp_path / "volume-tmp").iterdir())


def kubeconfig(server):
    """Return one that names no other file."""
    certificate = base64.b64encode((TLS / "ca.crt").read_bytes()).decode()
    cluster = {"server": server, "certificate-authority-data": certificate}
    return {
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": {"token": TOKEN}}],
        "contexts": [{"name": "c-u", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "c-u",
    }


async def gone(is_there):
    """Wait until something is not there any more."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while is_there():  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(POLL_SECONDS)


@pytest.mark.parametrize(
    ("flavour", "components"), [("nft", ()), ("legacy", ("from-iptables-legacy",))]
)
async def test_what_kube_proxy_left_is_removed(flavour, components, tmp_path):
    programs = programs_of(4)[flavour]
    printed(programs.restore, "--noflush", stdin=RULES)
    async with cluster() as api:
        pod = deployed(tmp_path, api, *components)
        async with pod.running("pyproxy") as pyproxy:
            await pyproxy.until_logged("serving")
            await gone(lambda: LEFT in printed(programs.save))


async def test_what_it_left_in_legacy_iptables_needs_the_component(tmp_path):
    printed(programs_of(4)["legacy"].restore, "--noflush", stdin=RULES)
    async with cluster() as api:
        pod = deployed(tmp_path, api)
        async with pod.running("pyproxy") as pyproxy:
            await pyproxy.until_logged("cannot clean up after others")
