"""deploy/: the manifests are what Kubernetes takes, and both ways to make them agree."""

from pathlib import Path

import pytest
import yaml

from pyproxy.config.check import warnings
from pyproxy.config.file import load
from tests.deploy.tools import (
    CHART,
    COMPONENTS,
    DEPLOY,
    MODES,
    kustomized,
    mode_components,
    only,
    run,
)

API_SERVER = "--set=apiServer.host=192.0.2.10"
OLDEST, NEWEST = "1.29", "1.37"
EVERYTHING = """\
image: {repository: registry.test/pyproxy, tag: v1, pullPolicy: Always}
imagePullSecrets: [{name: secret}]
mode: userspace
apiServer: {host: 192.0.2.10, port: 443}
config: {clusterCIDR: 10.244.0.0/16, conntrack: {maxPerCore: 65536}}
fromIptablesLegacy: true
socketLB: {enabled: true}
extraArgs: [--event-loop=asyncio]
extraEnv: [{name: A, value: b}]
extraVolumes: [{name: more, emptyDir: {}}]
extraVolumeMounts: [{name: more, mountPath: /more}]
serviceAccount: {name: other, annotations: {a: b}}
serviceMonitor: {enabled: true, interval: 30s, labels: {release: prometheus}}
resources: {limits: {memory: 1Gi}}
priorityClassName: high
tolerations: [{key: a, operator: Exists}]
nodeSelector: {a: b}
affinity: {nodeAffinity: {}}
hostAliases: [{ip: 192.0.2.10, hostnames: [api]}]
podAnnotations: {a: b}
podLabels: {c: d}
updateStrategy: {type: OnDelete}
"""


def components():
    return sorted(path.name for path in COMPONENTS.iterdir())


def rendered(*options, values="", fails=False):
    """Return what `helm template` makes of the chart, as text."""
    words = ["template", "pyproxy", CHART, "--namespace=kube-system", "--values=-", *options]
    return run("helm", *words, stdin=values, fails=fails)


def check(text, folder, version=NEWEST):
    """Have Kubernetes' own schemas look at manifests; ServiceMonitors are not Kubernetes'."""
    known = [o for o in yaml.safe_load_all(text) if o["kind"] != "ServiceMonitor"]
    path = folder / "manifests.yaml"
    path.write_text(yaml.safe_dump_all(known))
    run("kubernetes-validate", "--strict", "--quiet", "-k", version, path)


def container(text):
    (found,) = only("DaemonSet", text)["spec"]["template"]["spec"]["containers"]
    return found


def added(text):
    return container(text)["securityContext"]["capabilities"]["add"]


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


def test_components_go_together(tmp_path):
    text = kustomized(tmp_path, "mode-iptables", "metrics")
    data = only("ConfigMap", text)["data"]
    assert data == {"MODE": "iptables", "METRICS_BIND_ADDRESS": "0.0.0.0:10249"}


def test_what_a_kubeconfig_has_inside_can_be_a_file_and_is_never_on_a_disk(tmp_path):
    pod = only("DaemonSet", kustomized(tmp_path))["spec"]["template"]["spec"]
    (volume,) = (v for v in pod["volumes"] if v["name"] == "tmp")
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Mi"}
    for each in pod["initContainers"] + pod["containers"]:
        assert {"name": "tmp", "mountPath": "/tmp"} in each["volumeMounts"]


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
    assert only("ConfigMap", plain)["data"]["METRICS_BIND_ADDRESS"] == config.metrics_bind_address
    assert {probed(text) for text in (chart, plain)} == {(10356, 10356)}
    assert not [told for told in warnings(config) if "give this one another" in told]


def probed(text):
    """Return the ports that the kubelet asks."""
    probes = (container(text)[name] for name in ("livenessProbe", "readinessProbe"))
    return tuple(probe["httpGet"]["port"] for probe in probes)


@pytest.mark.parametrize("address", ["", "192.0.2.1", "::", "[::]:10256", "0.0.0.0:10256"])
def test_the_chart_probes_the_usual_port_where_none_is_given(address):
    values = yaml.safe_dump({"config": {"healthzBindAddress": address}})
    assert probed(rendered(API_SERVER, values=values)) == (10256, 10256)


def ordered(spec):
    """Put what has no order of its own into one."""
    for each in (spec["volumes"], spec["containers"][0]["volumeMounts"]):
        each.sort(key=lambda item: item["name"])
    return spec


def compared(text):
    """Return of the DaemonSet's pods what settings do not change."""
    spec = only("DaemonSet", text)["spec"]["template"]["spec"]
    for each in spec["initContainers"] + spec["containers"]:
        for field in ("args", "env", "envFrom", "imagePullPolicy"):
            each.pop(field, None)
        each["volumeMounts"] = [m for m in each["volumeMounts"] if m["name"] != "config"]
    spec["volumes"] = [v for v in spec["volumes"] if v["name"] != "config"]
    return spec


@pytest.mark.parametrize("values", ["", EVERYTHING], ids=["least", "everything"])
def test_the_chart_is_valid(values, tmp_path):
    check(rendered(API_SERVER, values=values), tmp_path)
    run("helm", "lint", "--strict", CHART, API_SERVER)


def test_chart_and_component_agree_on_the_rule_for_the_annotation(tmp_path):
    chart = rendered(API_SERVER, values="{config: {programmedAnnotationPeriod: 30s}}")
    plain = kustomized(tmp_path, "programmed-annotation")
    patch = [{"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]}]
    assert only("ClusterRole", chart)["rules"] == only("ClusterRole", plain)["rules"] == patch
    assert "--programmed-annotation-period=30s" in container(plain)["args"]
    kinds = {o["kind"] for o in yaml.safe_load_all(rendered(API_SERVER)) if o}
    assert "ClusterRole" not in kinds, "nobody asked for it"


def test_every_value_of_the_chart_is_tried():
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values.keys() - {"rbac"} == yaml.safe_load(EVERYTHING).keys()


def test_the_configuration_is_one_that_pyproxy_reads():
    values = "{mode: ipvs, config: {clusterCIDR: 10.244.0.0/16}}"
    text = only("ConfigMap", rendered(API_SERVER, values=values))["data"]["config.conf"]
    loaded = load(text)
    assert (loaded.config.mode, loaded.config.cluster_cidr) == ("ipvs", "10.244.0.0/16")
    assert not loaded.warnings


def test_nothing_of_the_chart_is_made_that_is_switched_off():
    off = "{rbac: {create: false}, serviceAccount: {create: false, name: other}}"
    kinds = {o["kind"] for o in yaml.safe_load_all(rendered(API_SERVER, values=off)) if o}
    assert kinds == {"ConfigMap", "DaemonSet"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param((), "apiServer.host", id="the cluster IP will not do"),
        pytest.param((API_SERVER, "--set=mode=foo"), "mode: foo is none of", id="no such mode"),
        pytest.param(
            (API_SERVER, "--set=config.mode=ipvs"), "config.mode: set mode", id="two modes"
        ),
    ],
)
def test_the_chart_says_what_is_wrong(options, words):
    assert words in rendered(*options, fails=True)


def test_the_image_has_the_version_of_this_checkout():
    from pyproxy import __version__

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__
    assert container(kustomized(Path(DEPLOY)))["image"] == f"pyproxy:{__version__}"
