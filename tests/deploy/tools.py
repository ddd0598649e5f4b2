"""The programs that deploy/ is checked with: `make tools` gets them."""

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
TOOLS = ROOT / ".venv" / "tools"
BASE = DEPLOY / "kustomize" / "base"
COMPONENTS = DEPLOY / "kustomize" / "components"
CHART = DEPLOY / "helm" / "pyproxy"
API_SERVER = "--set=apiServer.host=192.0.2.10"
NEWEST = "1.37"
MODES = ("nftables", "iptables", "ipvs", "userspace")


def needed(path, how):
    """Return a path; where it is missing, CI fails and others skip."""
    if not path.exists():
        reason = f"{path.relative_to(ROOT)} is missing: {how}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return path


def run(tool, *arguments, stdin="", fails=False):
    """Return what a tool prints; with ``fails``, what it complains about."""
    path = needed(TOOLS / tool, "make tools")
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        [path, *map(str, arguments)], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    output, errors = child.communicate(stdin, timeout=60)
    assert (child.returncode != 0) == fails, output + errors
    return errors if fails else output


@cache
def kustomized(folder, *components):
    """Return what `kubectl kustomize` makes of the base, or of it and components, as text.

    ``folder`` is where an overlay may be written.
    """
    if not components:
        return run("kubectl", "kustomize", BASE)
    overlay = {
        "resources": [os.path.relpath(BASE, folder)],
        "components": [os.path.relpath(COMPONENTS / name, folder) for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    return run("kubectl", "kustomize", folder)


def mode_components(mode):
    return () if mode == "nftables" else (f"mode-{mode}",)


def only(kind, text):
    """Return the one object of a kind in some manifests."""
    (found,) = (o for o in yaml.safe_load_all(text) if o["kind"] == kind)
    return found


def rendered(*options, values="", release="pyproxy", namespace="kube-system", fails=False):
    """Return what `helm template` makes of the chart, as text."""
    words = ["template", release, CHART, f"--namespace={namespace}", "--values=-", *options]
    return run("helm", *words, stdin=values, fails=fails)


def check(text, folder, version=NEWEST):
    """Have Kubernetes' own schemas look at manifests; ServiceMonitors are not Kubernetes'."""
    known = [o for o in yaml.safe_load_all(text) if o["kind"] != "ServiceMonitor"]
    path = folder / "manifests.yaml"
    path.write_text(yaml.safe_dump_all(known))
    run("kubernetes-validate", "--strict", "--quiet", "-k", version, path)


def pod_of(text):
    return only("DaemonSet", text)["spec"]["template"]["spec"]


def container(text):
    (found,) = pod_of(text)["containers"]
    return found


def probed(text):
    """Return where the kubelet asks: the host, if it is not the pod's, and the port."""
    probes = [container(text)[name]["httpGet"] for name in ("livenessProbe", "readinessProbe")]
    (found,) = {(probe.get("host", ""), probe["port"]) for probe in probes}
    return found
