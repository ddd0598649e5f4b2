"""kubeadm's DaemonSet and ConfigMap for kube-proxy, unchanged but for the image."""

import pytest
import yaml

from tests.deploy.tools import ROOT
from tests.netns.container import Pod
from tests.netns.standin import (
    CLUSTER_IP,
    HEALTHZ,
    NODE_PORT,
    TOKEN,
    answer,
    cluster,
    service_account,
    status,
    tokens,
)

pytestmark = [pytest.mark.asyncio(loop_factories=["asyncio"]), pytest.mark.usefixtures("uplink")]
KUBEADM = ROOT / "tests" / "data" / "kubeadm"


async def test_it_serves_in_the_place_of_kube_proxy(tmp_path):
    daemonset = yaml.safe_load((KUBEADM / "daemonset.yaml").read_text())
    async with cluster() as api:
        data = {name: (KUBEADM / name).read_text() for name in ("config.conf", "kubeconfig.conf")}
        kubeconfig = data["kubeconfig.conf"].replace("https://192.0.2.10:6443", api.url)
        data["kubeconfig.conf"] = kubeconfig
        pod = Pod(daemonset, {"kube-proxy": data}, tmp_path, service_account(tmp_path))
        async with pod.running("kube-proxy") as proxy:
            await proxy.until_logged("serving")
            assert [await answer(f) for f in (CLUSTER_IP, NODE_PORT)] == ["web-1", "web-1"]
            assert await status(HEALTHZ) == 200
    assert tokens(api) == {f"Bearer {TOKEN}"}
