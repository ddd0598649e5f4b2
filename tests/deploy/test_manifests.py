"""deploy/: the manifests are what Kubernetes takes, and both ways to make them agree."""

import re
from pathlib import Path

import pytest
import yaml

from pyproxy import __version__
from pyproxy.config.check import warnings
from pyproxy.config.file import load
from tests.deploy.tools import (
    API_SERVER,
    CHART,
    COMPONENTS,
    DEPLOY,
    MODES,
    NEWEST,
    ROOT,
    check,
    container,
    kustomized,
    mode_components,
    only,
    pod_of,
    probed,
    rendered,
    run,
)

INSTALL = ROOT / "docs" / "install.md"
OLDEST = "1.29"


def components():
    return sorted(path.name for path in COMPONENTS.iterdir())


def test_the_plain_file_is_the_base():
    path = DEPLOY / "pyproxy.yaml"
    comments = [line for line in path.read_text().splitlines(True) if line.startswith("#")]
    assert path.read_text() == "".join(comments) + kustomized(DEPLOY)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_the_base_is_valid(version, tmp_path):
    check(kustomized(tmp_path), tmp_path, version)


@pytest.mark.parametrize("name", components())
def test_a_component_is_valid(name, tmp_path):
    check(kustomized(tmp_path, name), tmp_path)


@pytest.mark.parametrize(
    ("names", "mode", "port"),
    [
        pytest.param(("mode-iptables", "metrics"), "iptables", 10249, id="a mode"),
        pytest.param(("beside", "metrics"), "nftables", 10349, id="beside another"),
        pytest.param(("metrics", "beside"), "nftables", 10349, id="in the other order"),
    ],
)
def test_prometheus_asks_the_port_that_components_choose(names, mode, port, tmp_path):
    text = kustomized(tmp_path, *names)
    settings = {"MODE": mode, "METRICS_BIND_IP": "0.0.0.0", "METRICS_BIND_PORT": str(port)}
    assert only("ConfigMap", text)["data"] == settings
    assert only("Service", text)["spec"]["ports"] == [{"name": "metrics", "port": port}]


@pytest.mark.parametrize("name", components())
def test_a_component_gives_both_containers_the_same_flags(name, tmp_path):
    pod = pod_of(kustomized(tmp_path, name))
    assert pod["initContainers"][0]["args"] == pod["containers"][0]["args"]


def test_what_a_kubeconfig_has_inside_can_be_a_file_and_is_never_on_a_disk(tmp_path):
    pod = pod_of(kustomized(tmp_path))
    (volume,) = (v for v in pod["volumes"] if v["name"] == "tmp")
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Mi"}
    for each in pod["initContainers"] + pod["containers"]:
        assert {"name": "tmp", "mountPath": "/tmp"} in each["volumeMounts"]


def test_the_overlay_of_the_documentation_is_one(tmp_path):
    (overlay,) = re.findall(r"```yaml\n(resources:.*?)```", INSTALL.read_text(), re.DOTALL)
    (tmp_path / "kustomization.yaml").write_text(overlay.replace("REGISTRY", "registry.test"))
    (tmp_path / "pyproxy").symlink_to(ROOT)
    text = run("kubectl", "kustomize", tmp_path)
    assert only("ConfigMap", text)["data"]["MODE"] == "userspace"
    pod = pod_of(text)
    images = {each["image"] for each in pod["initContainers"] + pod["containers"]}
    assert images == {f"registry.test/pyproxy:{__version__}"}


def test_a_wrong_field_would_be_noticed(tmp_path):
    text = kustomized(tmp_path).replace("seccompProfile:", "seccompProfil:")
    with pytest.raises(AssertionError, match="'seccompProfil' was unexpected"):
        check(text, tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_chart_and_components_agree(mode, tmp_path):
    """Both make the same pod, but for where its settings are written."""
    values = f"{{mode: {mode}, config: {{clusterCIDR: 10.244.0.0/16}}}}"
    chart = rendered(API_SERVER, values=values)
    plain = kustomized(tmp_path, *mode_components(mode))
    assert ordered(compared(chart)) == ordered(compared(plain))
    assert only("ConfigMap", plain)["data"]["MODE"] == mode
    assert yaml.safe_load(only("ConfigMap", chart)["data"]["config.conf"])["mode"] == mode


def test_chart_and_component_agree_on_socket_lb(tmp_path):
    chart = rendered(API_SERVER, values="{mode: userspace, socketLB: {enabled: true}}")
    plain = kustomized(tmp_path, "mode-userspace", "socket-lb")
    assert ordered(compared(chart)) == ordered(compared(plain))


def test_chart_and_component_agree_on_a_proxy_beside_another(tmp_path):
    """Whose settings are one and the same, and the probes ask the port that they say."""
    own = {
        "serviceProxyName": "pyproxy",
        "healthzBindAddress": "0.0.0.0:10356",
        "metricsBindAddress": "127.0.0.1:10349",
    }
    chart = rendered(API_SERVER, values=yaml.safe_dump({"config": own}))
    config = load(only("ConfigMap", chart)["data"]["config.conf"]).config
    plain = kustomized(tmp_path, "beside")
    words = [word.removeprefix("--") for word in container(plain)["args"]]
    flags = dict(word.split("=") for word in words)
    assert flags["service-proxy-name"] == config.service_proxy_name
    assert flags["healthz-bind-address"] == config.healthz_bind_address
    data = only("ConfigMap", plain)["data"]
    address = f"{data['METRICS_BIND_IP']}:{data['METRICS_BIND_PORT']}"
    assert address == config.metrics_bind_address
    assert {probed(text) for text in (chart, plain)} == {("", 10356)}
    assert not [told for told in warnings(config) if "give this one another" in told]


def ordered(spec):
    """Put what has no order of its own into one."""
    for each in (spec["volumes"], spec["containers"][0]["volumeMounts"]):
        each.sort(key=lambda item: item["name"])
    return spec


def compared(text):
    """Return of the DaemonSet's pods what settings do not change."""
    spec = pod_of(text)
    for each in spec["initContainers"] + spec["containers"]:
        for field in ("args", "env", "envFrom", "imagePullPolicy"):
            each.pop(field, None)
        each["volumeMounts"] = [m for m in each["volumeMounts"] if m["name"] != "config"]
    spec["volumes"] = [v for v in spec["volumes"] if v["name"] != "config"]
    return spec


def test_chart_and_component_agree_on_the_rule_for_the_annotation(tmp_path):
    chart = rendered(API_SERVER, values="{config: {programmedAnnotationPeriod: 30s}}")
    plain = kustomized(tmp_path, "programmed-annotation")
    patch = [{"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]}]
    assert only("ClusterRole", chart)["rules"] == only("ClusterRole", plain)["rules"] == patch
    assert "--programmed-annotation-period=30s" in container(plain)["args"]
    kinds = {o["kind"] for o in yaml.safe_load_all(rendered(API_SERVER)) if o}
    assert "ClusterRole" not in kinds, "nobody asked for it"


def test_the_image_has_the_version_of_this_checkout():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__
    assert container(kustomized(Path(DEPLOY)))["image"] == f"pyproxy:{__version__}"
