import pytest
import yaml

from pyproxy.config import (
    ClientConnection,
    Config,
    Conntrack,
    IPTables,
    Logging,
    LogOptions,
    LogStream,
    Userspace,
    VModule,
)
from pyproxy.config.file import dump, load
from pyproxy.config.text import ConfigError

HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"

# What kubeadm writes into its ConfigMap: every field, and nothing said by most of them.
KUBEADM = """\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: "0"
    text:
      infoBufferSize: 0
  verbosity: 0
metricsBindAddress: ""
mode: ""
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
windowsRunAsService: false
"""


# Which kube-proxy does not have.
OWN = {
    "cloudAnnotations",
    "programmedAnnotationPeriod",
    "serviceMetrics",
    "serviceProxyName",
    "conntrack.endForbiddenFlows",
    "ipvs.bindAddresses",
    "ipvs.drainTimeout",
}


def test_the_file_of_kubeadm_is_read_unchanged():
    kubeconfig = "/var/lib/kube-proxy/kubeconfig.conf"
    expected = Config(
        client_connection=ClientConnection(kubeconfig=kubeconfig), cluster_cidr="10.244.0.0/16"
    )
    assert load(KUBEADM) == (expected, ())


def test_a_file_has_every_field_of_the_api():
    dumped = dump(Config())
    del dumped["userspace"]  # kube-proxy has no such mode any more
    assert _names(dumped) - {"featureGates", "logging.format", "logging.vmodule"} == (
        _names(yaml.safe_load(KUBEADM))
        | {"logging.options.json.splitStream", "logging.options.text.splitStream"}
        | OWN
    )


def _names(content, path=""):
    names = set()
    for name, value in content.items():
        inner = _names(value, f"{path}{name}.") if isinstance(value, dict) else set()
        names |= inner or {path + name}
    return names


def test_a_file_that_says_nothing_is_the_defaults():
    assert load(HEAD) == (Config(), ())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mode: nftables", Config(mode="nftables")),
        ("userspace: {capture: ''}", Config()),
        (
            "userspace: {capture: tproxy, socketLB: 'off', drainTimeout: 1m,"
            " keepClientAddress: false, workers: 3, runtimeDir: /x}",
            Config(
                userspace=Userspace(
                    capture="tproxy",
                    socket_lb="off",
                    keep_client_address=False,
                    drain_timeout_seconds=60.0,
                    workers=3,
                    runtime_dir="/x",
                )
            ),
        ),
        ("healthzBindAddress: 127.0.0.1", Config(healthz_bind_address="127.0.0.1:10256")),
        (
            'bindAddress: "::"',
            Config(
                bind_address="::",
                healthz_bind_address="[::]:10256",
                metrics_bind_address="[::1]:10249",
            ),
        ),
        (
            "conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s}",
            Config(conntrack=Conntrack(max_per_core=0, tcp_established_timeout_seconds=0.0)),
        ),
        (
            "iptables: {minSyncPeriod: 100ms}",
            Config(iptables=IPTables(min_sync_period_seconds=0.1)),
        ),
        pytest.param("iptables: {minSyncPeriod: 0}", Config(), id="bare zero"),
        ("nodePortAddresses: [primary]", Config(node_port_addresses=("primary",))),
        (
            "featureGates: {NativeHistograms: true}",
            Config(feature_gates={"NativeHistograms": True}),
        ),
        ("clientConnection: {qps: 50}", Config(client_connection=ClientConnection(qps=50.0))),
        (
            "logging: {flushFrequency: 3000000000, vmodule: [{filePattern: a, verbosity: 4}]}",
            Config(logging=Logging(flush_frequency_seconds=3.0, vmodule=(VModule("a", 4),))),
        ),
        (
            "logging: {options: {json: {infoBufferSize: 64Ki, splitStream: true}}}",
            Config(
                logging=Logging(
                    options=LogOptions(json=LogStream(split_stream=True, info_buffer_size="64Ki"))
                )
            ),
        ),
        pytest.param("iptables: &x {syncPeriod: 30s}\nnftables: *x", Config(), id="alias"),
    ],
)
def test_a_field_sets_its_value(text, expected):
    assert load(HEAD + text) == (expected, ())


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("bindAdress: x", "bindAdress: unknown field, ignored (did you mean bindAddress?)"),
        (
            "iptables: {masqAll: true}",
            "iptables.masqAll: unknown field, ignored (did you mean masqueradeAll?)",
        ),
        ("qqq: 1", "qqq: unknown field, ignored"),
        ("7: 1", "7: unknown field, ignored"),
        ("a: &a [*a]", "a: unknown field, ignored"),
        (
            "logging: {vmodule: [{glob: x}]}",
            "logging.vmodule[0].glob: unknown field, ignored",
        ),
        (
            "portRange: a\nportRange: ''",
            "line 4: portRange is given more than once; the last one counts",
        ),
        (
            "ipvs:\n  scheduler: a\n  scheduler: ''",
            "line 5: ipvs.scheduler is given more than once; the last one counts",
        ),
        (
            "logging:\n  vmodule:\n  - filePattern: a\n    filePattern: a",
            "line 6: logging.vmodule[0].filePattern is given more than once; the last one counts",
        ),
    ],
)
def test_e105_an_unknown_or_repeated_field_is_a_warning(text, warning):
    assert load(HEAD + text).warnings == (warning,)


def test_the_last_of_repeated_fields_counts():
    assert load(f"{HEAD}mode: ipvs\nmode: nftables").config == Config(mode="nftables")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("bindAddress: ::", "line 3: mapping values are not allowed here"),
        ("mode: [a", "line 3: expected ',' or ']', but got '<stream end>'"),
        ("mode: *x", "line 3: found undefined alias 'x'"),
        ("---\na: b", "line 3: but found another document"),
        (
            "mode: \x00",
            "not YAML: unacceptable character #x0000: special characters are not allowed",
        ),
        ("mode: 2026-13-41", "not YAML: month must be in 1..12"),
        ("conntrack: {maxPerCore: many}", 'conntrack.maxPerCore: expected an integer, got "many"'),
        ("conntrack: {maxPerCore: 1.5}", "conntrack.maxPerCore: expected an integer, got 1.5"),
        ("conntrack: {min: true}", "conntrack.min: expected an integer, got true"),
        ("oomScoreAdj: 99999999999", "oomScoreAdj: 99999999999 does not fit into 32 bits"),
        ("iptables: 3", "iptables: expected a mapping, got 3"),
        ("nodePortAddresses: primary", 'nodePortAddresses: expected a list, got "primary"'),
        (
            "nodePortAddresses: ['::/0', 1]",
            "nodePortAddresses[1]: expected a string, got 1 (write it in quotes)",
        ),
        ("mode: [nftables]", "mode: expected a string, got a list"),
        ("mode: {a: b}", "mode: expected a string, got a mapping"),
        (
            "showHiddenMetricsForVersion: 1.35",
            "showHiddenMetricsForVersion: expected a string, got 1.35 (write it in quotes)",
        ),
        ("enableProfiling: 1", "enableProfiling: expected true or false, got 1"),
        ("clientConnection: {qps: .nan}", "clientConnection.qps: expected a number, got NaN"),
        (
            "configSyncPeriod: 15",
            "configSyncPeriod: expected a duration such as 30s or 1h30m, got 15",
        ),
        (
            "configSyncPeriod: 15x",
            'configSyncPeriod: expected a duration such as 30s or 1h30m, got "15x"',
        ),
        ("featureGates: {A: on, B: 1}", "featureGates: expected true or false for B, got 1"),
        ("featureGates: [A]", "featureGates: expected a mapping, got a list"),
        (
            "logging: {vmodule: [a=1]}",
            'logging.vmodule[0]: expected a mapping, got "a=1"',
        ),
        (
            "logging: {options: {text: {infoBufferSize: 1.5}}}",
            "logging.options.text.infoBufferSize: expected a string, got 1.5 (write it in quotes)",
        ),
    ],
)
def test_e105_what_cannot_be_read_is_one_line_with_its_place(text, error):
    with pytest.raises(ConfigError) as raised:
        load(HEAD + text)
    assert str(raised.value) == error


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "kind: the file is not a mapping with apiVersion and kind KubeProxyConfiguration"),
        ("[a]", "kind: the file is not a mapping with apiVersion and kind KubeProxyConfiguration"),
        ("mode: x", "kind: is missing, it must be KubeProxyConfiguration"),
        ("kind: Config", 'kind: is "Config", it must be KubeProxyConfiguration'),
        (
            "kind: KubeProxyConfiguration",
            "apiVersion: is missing, it must be kubeproxy.config.k8s.io/v1alpha1",
        ),
        (
            "{kind: KubeProxyConfiguration, apiVersion: v1}",
            'apiVersion: is "v1", it must be kubeproxy.config.k8s.io/v1alpha1',
        ),
    ],
)
def test_e105_another_kind_of_file_is_an_error(text, error):
    with pytest.raises(ConfigError) as raised:
        load(text)
    assert str(raised.value) == error


def test_durations_are_dumped_as_go_prints_them():
    content = dump(Config(iptables=IPTables(min_sync_period_seconds=0.1)))
    assert content["configSyncPeriod"] == "15m0s"
    assert content["iptables"] == {
        "masqueradeBit": 14,
        "masqueradeAll": False,
        "localhostNodePorts": True,
        "syncPeriod": "30s",
        "minSyncPeriod": "100ms",
    }
