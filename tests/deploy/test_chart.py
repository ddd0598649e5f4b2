"""deploy/helm: what each value of the chart does, and which values it refuses."""

import json

import pytest
import yaml

from pyproxy.config import Config
from pyproxy.config.file import dump, load
from tests.deploy.tools import (
    API_SERVER,
    CHART,
    ROOT,
    check,
    container,
    only,
    pod_of,
    probed,
    rendered,
    run,
)

KUBEADM = ROOT / "tests" / "data" / "kubeadm" / "config.conf"
EVERYTHING = """\
image: {repository: registry.test/pyproxy, tag: v1, digest: "sha256:0f", pullPolicy: Always}
imagePullSecrets: [{name: secret}]
nameOverride: proxy
fullnameOverride: services
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
initResources: {requests: {memory: 64Mi}}
livenessProbe: {periodSeconds: 5}
readinessProbe: {httpGet: {path: /livez}}
terminationGracePeriodSeconds: 60
priorityClassName: high
tolerations: [{key: a, operator: Exists}]
nodeSelector: {a: b}
affinity: {nodeAffinity: {}}
hostAliases: [{ip: 192.0.2.10, hostnames: [api]}]
podAnnotations: {a: b}
podLabels: {c: d}
updateStrategy: {type: OnDelete}
"""


def chart(**values):
    """Return the chart's manifests for these values, as text."""
    return rendered(API_SERVER, values=yaml.safe_dump(values))


def named(kind, text):
    return {o["metadata"]["name"] for o in yaml.safe_load_all(text) if o and o["kind"] == kind}


@pytest.mark.parametrize("values", ["", EVERYTHING], ids=["least", "everything"])
def test_the_chart_is_valid(values, tmp_path):
    check(rendered(API_SERVER, values=values), tmp_path)
    run("helm", "lint", "--strict", CHART, API_SERVER)


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
        pytest.param(
            (API_SERVER, "--set=mode=foo"), "'/mode': value must be one of", id="no such mode"
        ),
        pytest.param(
            (API_SERVER, "--set=config.mode=ipvs"), "config.mode: set mode", id="two modes"
        ),
        pytest.param((API_SERVER, "--set=tolerationz=x"), "'tolerationz' not allowed", id="a typo"),
        pytest.param(
            (API_SERVER, "--set=image.tga=1"),
            "at '/image': additional properties 'tga'",
            id="a typo further down",
        ),
        pytest.param(
            (API_SERVER, "--set=config.conntrack.mni=1"),
            "at '/config/conntrack': additional properties 'mni'",
            id="a typo in the configuration",
        ),
        pytest.param(
            (API_SERVER, "--set=livenessProbe.exec.command=x"),
            "at '/livenessProbe': additional properties 'exec'",
            id="two ways to ask",
        ),
        pytest.param(
            (API_SERVER, "--set=image.digest=v1"), "at '/image/digest': 'v1'", id="no digest"
        ),
    ],
)
def test_the_chart_says_what_is_wrong(options, words):
    assert words in rendered(*options, fails=True)


def schema():
    return json.loads((CHART / "values.schema.json").read_text())["properties"]


def test_the_schema_knows_every_value():
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert schema().keys() - {"global"} == values.keys()


def test_the_schema_knows_every_field_of_the_configuration():
    assert names_of(schema()["config"]) == fields_of(dump(Config()))


def names_of(part):
    """Return the names that a part of the schema allows; None where it allows all."""
    if part is True:
        return None
    assert part["additionalProperties"] is False
    return {name: names_of(below) for name, below in part["properties"].items()}


def fields_of(value):
    """Return the names of a configuration's fields in the same form."""
    if isinstance(value, dict) and value:  # featureGates, which is empty, may have any name
        return {name: fields_of(below) for name, below in value.items()}
    return None


def test_the_configuration_that_kubeadm_made_will_do():
    """Its empty fields say nothing: neither a mode nor where metrics are."""
    config = yaml.safe_load(KUBEADM.read_text())
    assert (config["mode"], config["metricsBindAddress"]) == ("", "")
    text = chart(mode="userspace", config=config, serviceMonitor={"enabled": True})
    loaded = load(only("ConfigMap", text)["data"]["config.conf"]).config
    assert (loaded.mode, loaded.metrics_bind_address) == ("userspace", "0.0.0.0:10249")
    assert loaded.cluster_cidr == config["clusterCIDR"]
    assert only("Service", text)["spec"]["ports"] == [{"name": "metrics", "port": 10249}]


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("", "", 10256),
        ("::", "", 10256),
        ("0.0.0.0:10356", "", 10356),
        ("[::]:10356", "", 10356),
        ("127.0.0.1:10356", "127.0.0.1", 10356),
        ("192.0.2.1", "192.0.2.1", 10256),
        ("[::1]:10356", "::1", 10356),
        ("2001:db8::10", "2001:db8::10", 10256),
    ],
)
def test_the_kubelet_asks_where_health_is_served(address, host, port):
    assert probed(chart(config={"healthzBindAddress": address})) == (host, port)


@pytest.mark.parametrize(
    ("address", "port"),
    [("0.0.0.0:10349", 10349), ("[::]:10349", 10349), ("192.0.2.1", 10249), ("::", 10249)],
)
def test_prometheus_asks_the_port_that_metrics_are_served_on(address, port):
    text = chart(config={"metricsBindAddress": address}, serviceMonitor={"enabled": True})
    assert only("Service", text)["spec"]["ports"] == [{"name": "metrics", "port": port}]


def test_a_probe_keeps_what_is_not_said_of_it():
    text = chart(livenessProbe={"periodSeconds": 5}, readinessProbe={"httpGet": {"path": "/livez"}})
    liveness, readiness = (container(text)[f"{name}Probe"] for name in ("liveness", "readiness"))
    asked = {"path": "/livez", "port": 10256}
    assert liveness == {"httpGet": asked, "periodSeconds": 5, "failureThreshold": 30}
    assert readiness == {"httpGet": asked}


@pytest.mark.parametrize(
    ("drain", "given", "seconds"),
    [
        ("5s", None, 30),
        (0, None, 30),
        ("20.5s", None, 31),
        ("1m30s", None, 100),
        ("1h0m0.5s", None, 3611),
        ("90000ms", None, 100),
        ("1m30s", 45, 45),
    ],
)
def test_a_pod_may_serve_for_as_long_as_it_drains(drain, given, seconds):
    config = {"userspace": {"drainTimeout": drain}}
    text = chart(mode="userspace", config=config, terminationGracePeriodSeconds=given)
    assert pod_of(text)["terminationGracePeriodSeconds"] == seconds


@pytest.mark.parametrize(
    ("release", "values", "name", "label"),
    [
        ("pyproxy", {}, "pyproxy", "pyproxy"),
        ("my-pyproxy", {}, "my-pyproxy", "pyproxy"),
        ("web", {}, "web-pyproxy", "pyproxy"),
        ("web", {"nameOverride": "proxy"}, "web-proxy", "proxy"),
        ("web", {"fullnameOverride": "services"}, "services", "pyproxy"),
    ],
)
def test_objects_have_the_names_that_charts_give(release, values, name, label):
    text = rendered(API_SERVER, values=yaml.safe_dump(values), release=release)
    for kind in ("DaemonSet", "ConfigMap", "ServiceAccount"):
        assert named(kind, text) == {name}
    labels = only("DaemonSet", text)["spec"]["template"]["metadata"]["labels"]
    assert (labels["k8s-app"], labels["app.kubernetes.io/name"]) == (name, label)


def test_the_longest_name_leaves_room_for_that_of_the_metrics():
    text = chart(fullnameOverride="a" * 63, serviceMonitor={"enabled": True})
    assert named("Service", text) == {"a" * 55 + "-metrics"}


@pytest.mark.parametrize("kind", ["ClusterRole", "ClusterRoleBinding"])
def test_releases_in_two_namespaces_share_nothing_of_the_cluster(kind):
    values = "{config: {programmedAnnotationPeriod: 30s}}"
    here, there = (
        named(kind, rendered(API_SERVER, values=values, namespace=n)) for n in ("here", "there")
    )
    assert here
    assert not here & there


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        ({"tag": "v1"}, "pyproxy:v1"),
        ({"tag": 5}, "pyproxy:5"),
        ({"tag": "v1", "digest": "sha256:0f"}, "pyproxy@sha256:0f"),
    ],
)
def test_an_image_is_named_by_its_tag_or_its_digest(image, reference):
    pod = pod_of(chart(image=image))
    assert {c["image"] for c in pod["initContainers"] + pod["containers"]} == {reference}


def test_the_init_container_has_resources_of_its_own():
    (prepare,) = pod_of(chart(initResources={"limits": {"memory": "1Gi"}}))["initContainers"]
    assert prepare["resources"] == {"limits": {"memory": "1Gi"}}
