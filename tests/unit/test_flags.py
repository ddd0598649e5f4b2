import pytest
from msgspec.structs import fields

from pyproxy.config import IPVS, Config, IPTables, Logging, NFTables, VModule, setting
from pyproxy.config.check import validate
from pyproxy.config.flags import Options, effective_config, flag_values, help_text, parse
from pyproxy.config.flags_logging import LOGGING
from pyproxy.config.flags_table import FLAGS, GROUPS
from pyproxy.config.text import ConfigError

HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"


def loaded(*words, file=None, hostname="node-a"):
    return effective_config(parse(words), None if file is None else HEAD + file, hostname)


def config(*words, file=None):
    return loaded(*words, file=file).config


# --- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", FLAGS.values(), ids=lambda flag: flag.name)
def test_a_flag_leads_to_a_setting_or_an_option(flag):
    if flag.setting:
        assert setting(Config(), flag.setting) is not None
    else:
        assert flag.name.replace("-", "_") in {f.name for f in fields(Options)}


def test_no_flag_is_defined_twice():
    assert len(FLAGS) == sum(len(group.flags) for group in GROUPS)


# --- parsing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "options"),
    [
        pytest.param([], Options(), id="nothing"),
        pytest.param(["--config=a.yaml"], Options(config="a.yaml"), id="equals"),
        pytest.param(["--config", "a.yaml"], Options(config="a.yaml"), id="next word"),
        pytest.param(["--config="], Options(), id="empty"),
        pytest.param(["--config", "--cleanup"], Options(config="--cleanup"), id="any next word"),
        pytest.param(["--write_config_to=x"], Options(write_config_to="x"), id="underscores"),
        pytest.param(["--cleanup"], Options(cleanup=True), id="switch"),
        pytest.param(["--cleanup=false"], Options(), id="switch off"),
        pytest.param(
            ["--cleanup=T", "--init-only=1"], Options(cleanup=True, init_only=True), id="T"
        ),
        pytest.param(["--config=a", "--config=b"], Options(config="b"), id="last counts"),
        pytest.param(["-h"], Options(help=True), id="short switch"),
        pytest.param(["--version"], Options(version=True), id="version"),
        pytest.param(["-v", "2"], Options(given={"v": 2}), id="short, next word"),
        pytest.param(["-v=2"], Options(given={"v": 2}), id="short, equals"),
        pytest.param(["-v2"], Options(given={"v": 2}), id="short, joined"),
        pytest.param(["--v=2"], Options(given={"v": 2}), id="long"),
        pytest.param(["--"], Options(), id="end of flags"),
        pytest.param(["--oom-score-adj=-500"], Options(given={"oom-score-adj": -500}), id="minus"),
        pytest.param(["--conntrack-min=0x10"], Options(given={"conntrack-min": 16}), id="hex"),
        pytest.param(["--kube-api-qps=7.5"], Options(given={"kube-api-qps": 7.5}), id="number"),
        pytest.param(
            ["--ipvs-udp-timeout=1m"], Options(given={"ipvs-udp-timeout": 60.0}), id="time"
        ),
        pytest.param(["--bind-address="], Options(given={"bind-address": ""}), id="no IP"),
        pytest.param(
            ["--nodeport-addresses=10.0.0.0/8,11.0.0.0/8", "--nodeport-addresses", "::/0"],
            Options(given={"nodeport-addresses": ("10.0.0.0/8", "11.0.0.0/8", "::/0")}),
            id="lists grow",
        ),
        pytest.param(
            ["--feature-gates=A=true, B=false", "--feature-gates=A=0"],
            Options(given={"feature-gates": {"A": False, "B": False}}),
            id="gates grow",
        ),
        pytest.param(
            ["--vmodule=a=1,", "--vmodule=b*=2"],
            Options(given={"vmodule": (VModule("a", 1), VModule("b*", 2))}),
            id="vmodule grows",
        ),
        pytest.param(
            ["--service-cidr=10.0.0.0/16", "--manifests=m", "--event-loop=uvloop"],
            Options(service_cidr=("10.0.0.0/16",), manifests="m", event_loop="uvloop"),
            id="pyproxy's own",
        ),
        pytest.param(
            ["--healthz-port=0"],
            Options(healthz_port=0, deprecated=("healthz-port",)),
            id="deprecated",
        ),
    ],
)
def test_words_become_options(words, options):
    assert parse(words) == options


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["run"], 'unexpected argument "run": there are only flags'),
        (["-"], 'unexpected argument "-": there are only flags'),
        (["--", "x"], 'unexpected argument "x": there are only flags'),
        (["--cleanup", "false"], 'unexpected argument "false": there are only flags'),
        (["--confg=x"], "unknown flag --confg (did you mean --config?)"),
        (["--zzzzz"], "unknown flag --zzzzz"),
        (["-x"], "unknown flag -x"),
        (["--config"], "--config: a value is missing"),
        (["-v"], "--v: a value is missing"),
        (["-v=-1"], '--v: expected a level such as 2, got "-1"'),
        (["--cleanup=yes"], '--cleanup: expected true or false, got "yes"'),
        (["--oom-score-adj=x"], '--oom-score-adj: expected an integer, got "x"'),
        (["--oom-score-adj=9999999999"], "--oom-score-adj: 9999999999 does not fit into 32 bits"),
        (["--kube-api-qps=inf"], '--kube-api-qps: expected a number, got "inf"'),
        (["--kube-api-qps=x"], '--kube-api-qps: expected a number, got "x"'),
        (
            ["--config-sync-period=5"],
            '--config-sync-period: expected a duration such as 30s or 1h30m, got "5"',
        ),
        (["--bind-address=x"], '--bind-address: "x" is not an IP address'),
        (["--healthz-bind-address=x:1"], '--healthz-bind-address: "x" is not an IP address'),
        (
            ["--metrics-bind-address=::1:x"],
            '--metrics-bind-address: "::1:x" is not IP:port',
        ),
        (["--feature-gates=A"], '--feature-gates: expected Gate=true or Gate=false, got "A"'),
        (["--feature-gates=A=x"], '--feature-gates: expected true or false, got "x"'),
        (["--vmodule=a"], '--vmodule: expected file=level, got "a"'),
        (["--vmodule=a=x"], '--vmodule: expected a level such as 2, got "x"'),
        (["--service-cidr=x"], '--service-cidr: "x" is not a CIDR such as 10.0.0.0/8 or fd00::/64'),
        (
            ["--event-loop=uvlop"],
            '--event-loop: "uvlop" is not one of auto, uvloop, asyncio (did you mean uvloop?)',
        ),
    ],
)
def test_a_word_that_makes_no_sense_is_named(words, error):
    with pytest.raises(ConfigError) as raised:
        parse(words)
    assert str(raised.value) == error


# --- flags alone --------------------------------------------------------------------------------


def test_without_flags_the_defaults_are_in_effect():
    assert loaded() == (Config(), ())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--proxy-mode="], Config()),
        (["--proxy-mode=iptables"], Config(mode="iptables")),
        (["--proxy-mode=nftables"], Config(mode="nftables")),
        (["--healthz-bind-address=127.0.0.1"], Config(healthz_bind_address="127.0.0.1:10256")),
        (["--metrics-bind-address=::1"], Config(metrics_bind_address="[::1]:10249")),
        pytest.param(["--healthz-bind-address="], Config(), id="empty is not off"),
        pytest.param(["--bind-address=::"], Config(bind_address="::"), id="others do not follow"),
        (["--feature-gates=AllAlpha=true"], Config(feature_gates={"AllAlpha": True})),
        (["--ipvs-scheduler=lc"], Config(ipvs=IPVS(scheduler="lc"))),
        (["--ipvs-bind-addresses"], Config(ipvs=IPVS(bind_addresses=True))),
        (["--ipvs-drain-timeout=90s"], Config(ipvs=IPVS(drain_timeout_seconds=90.0))),
        (["--vmodule=a=1"], Config(logging=Logging(vmodule=(VModule("a", 1),)))),
        (["--hostname-override= Node-B "], Config(hostname_override="node-b")),
        (["--cluster-cidr=10.0.0.0/8,fd00::/8"], Config(cluster_cidr="10.0.0.0/8,fd00::/8")),
    ],
)
def test_flags_set_what_they_name(words, expected):
    assert config(*words) == expected


ALL_PERIODS = [
    "--iptables-sync-period=10s",
    "--iptables-min-sync-period=0",
    "--ipvs-sync-period=20s",
    "--ipvs-min-sync-period=2s",
    "--masquerade-all",
]
IPTABLES = IPTables(sync_period_seconds=10.0, min_sync_period_seconds=0.0, masquerade_all=True)
NFTABLES = NFTables(sync_period_seconds=10.0, min_sync_period_seconds=0.0, masquerade_all=True)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("iptables", Config(mode="iptables", iptables=IPTABLES)),
        ("userspace", Config(mode="userspace", iptables=IPTABLES)),
        ("auto", Config(iptables=IPTABLES, nftables=NFTABLES)),
        ("nftables", Config(mode="nftables", nftables=NFTABLES)),
        (
            "ipvs",
            Config(
                mode="ipvs",
                iptables=IPTables(masquerade_all=True),
                ipvs=IPVS(sync_period_seconds=20.0, min_sync_period_seconds=2.0),
            ),
        ),
    ],
)
def test_periods_and_masquerade_all_go_to_the_block_of_the_mode(mode, expected):
    assert config(f"--proxy-mode={mode}", *ALL_PERIODS) == expected


def test_by_flags_alone_ipvs_has_the_shortest_period_of_iptables():
    assert config("--proxy-mode=ipvs").ipvs == IPVS(min_sync_period_seconds=1.0)


@pytest.mark.parametrize(
    ("words", "healthz", "metrics"),
    [
        ([], "0.0.0.0:10256", "127.0.0.1:10249"),
        (["--healthz-port=9", "--metrics-port=8"], "0.0.0.0:10256", "127.0.0.1:10249"),
        (
            [
                "--healthz-bind-address=::",
                "--metrics-bind-address=10.0.0.1",
                "--healthz-port=9",
                "--metrics-port=8",
            ],
            "[::]:9",
            "10.0.0.1:8",
        ),
        (["--healthz-port=0", "--metrics-port=0"], "", ""),
        pytest.param(
            ["--healthz-port=0", "--write-config-to=x"],
            "0.0.0.0:10256",
            "127.0.0.1:10249",
            id="no effect on what is written",
        ),
    ],
)
def test_deprecated_ports_complete_or_empty_an_address(words, healthz, metrics):
    found = config(*words)
    assert (found.healthz_bind_address, found.metrics_bind_address) == (healthz, metrics)


def test_e104_without_a_port_there_is_no_health_server_but_metrics_there_must_be():
    assert validate(config("--healthz-port=0")) == ()
    assert validate(config("--metrics-port=0")) == ('metricsBindAddress: "" is not IP:port',)


def test_a_deprecated_flag_is_told():
    warning = "--healthz-port: is deprecated, use --healthz-bind-address"
    assert loaded("--healthz-port=1").warnings == (warning,)


# --- a file and flags ---------------------------------------------------------------------------


def test_e106_logging_comes_from_flags_and_the_rest_from_the_file():
    file = """
ipvs: {scheduler: rr}
logging: {verbosity: 1, format: json, flushFrequency: 9s, vmodule: [{filePattern: a, verbosity: 2}]}
"""
    words = ["-v=7", "--vmodule", "goo.go=8", "--ipvs-scheduler", "x"]
    config, warnings = loaded(*words, file=file)
    assert config == Config(
        ipvs=IPVS(scheduler="rr"),
        logging=Logging(
            verbosity=7,
            format="json",
            flush_frequency_seconds=9.0,
            vmodule=(VModule("goo.go", 8), VModule("a", 2)),
        ),
    )
    assert warnings == ("--config: the file replaces --ipvs-scheduler",)


@pytest.mark.parametrize("flag", LOGGING.flags, ids=lambda flag: flag.name)
def test_each_logging_flag_wins_over_the_file(flag):
    text = {"logging-format": "json", "log-flush-frequency": "9s", "vmodule": "a=1"}.get(
        flag.name, "1"
    )
    found = config(f"--{flag.name}={text}", file="")
    assert setting(found, flag.setting) == flag.kind.parse(text)


def test_the_file_replaces_all_other_flags():
    words = [f"--{name}=" for name in ("bind-address", "cluster-cidr")]
    words += ["--proxy-mode=ipvs", "--masquerade-all", "--feature-gates=AllAlpha=true"]
    words += ["--conntrack-min=5", "--healthz-port=0", "--iptables-sync-period=1h"]
    assert config(*words, file="mode: iptables") == Config(mode="iptables")


@pytest.mark.parametrize(
    ("mode", "addresses", "told"),
    [("ipvs", "[]", 1), ("ipvs", "[primary]", 0), ("nftables", "[]", 0), ("iptables", "[]", 0)],
)
def test_what_kube_proxy_means_by_nothing_is_told(mode, addresses, told):
    found = loaded(file=f"mode: {mode}\nnodePortAddresses: {addresses}")
    assert len(found.warnings) == told
    assert all("mode ipvs has all: 0.0.0.0/0 and ::/0" in line for line in found.warnings)


def test_what_a_mode_makes_of_nothing_is_not_kept_for_another():
    assert config(file="mode: ipvs").node_port_addresses == ()


@pytest.mark.parametrize(
    ("words", "file", "name"),
    [
        (["--hostname-override=B"], "hostnameOverride: c", "b"),
        ([], "hostnameOverride: C", "C"),
        (["--hostname-override="], "hostnameOverride: c", "c"),
    ],
)
def test_a_hostname_override_by_flag_wins(words, file, name):
    assert config(*words, file=file).hostname_override == name


@pytest.mark.parametrize(
    ("words", "hostname", "field"),
    [(["--hostname-override= "], "a", "hostnameOverride"), ([], "", "hostname")],
)
def test_a_blank_name_is_an_error(words, hostname, field):
    with pytest.raises(ConfigError, match=f"^{field}: the name of this node is empty$"):
        loaded(*words, hostname=hostname)


def test_warnings_of_the_file_come_first():
    assert loaded("--metrics-port=1", file="qqq: 1").warnings == (
        "qqq: unknown field, ignored",
        "--metrics-port: is deprecated, use --metrics-bind-address",
    )


# --- for people ---------------------------------------------------------------------------------


def test_help_names_every_flag_and_fits_the_terminal():
    lines = help_text(80).splitlines()
    words = {word for line in lines for word in line.split()}
    assert {f"--{name}" for name in FLAGS} <= words
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    "line",
    [
        "  pyproxy [flags]             the same",
        "  -v, --v N                   How much to log; 0 is little, 4 is for debugging.",
        "  -h, --help                  Print this.",
        "  --master URL                URL of the API server; wins over the one in the",
        "  --ipvs-min-sync-period DURATION",
    ],
)
def test_help_has_the_line(line):
    assert line in help_text(80).splitlines()


@pytest.mark.parametrize(
    ("name", "words", "text"),
    [
        ("v", [], "0"),
        ("v", ["-v=4"], "4"),
        ("config", ["--config=a"], "a"),
        ("iptables-sync-period", [], "30s"),
        ("iptables-localhost-nodeports", [], "true"),
        ("kube-api-qps", [], "5"),
        ("nodeport-addresses", ["--nodeport-addresses=::/0,10.0.0.0/8"], "::/0,10.0.0.0/8"),
        ("vmodule", ["--vmodule=a=1,b=2"], "a=1,b=2"),
        ("feature-gates", ["--feature-gates=B=true,A=false"], "A=false,B=true"),
        ("service-cidr", [], "10.96.0.0/16,fd00:10:96::/112"),
    ],
)
def test_flagz_shows_what_is_in_effect(name, words, text):
    assert flag_values(parse(words))[name] == text
