"""The commands but for their answers: words, tables, what ``wait`` waits for, and files."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pyproxy import commands
from pyproxy.cli import COMMANDS, cleanup_flags, main
from pyproxy.commands import CommandError
from pyproxy.commands._ask import divided, service_named
from pyproxy.commands._table import age, fitting, shortened, table
from pyproxy.commands.wait import at_version, condition_of
from pyproxy.config import Config
from pyproxy.daemon import Daemon
from pyproxy.listing import PortStatus, ServiceStatus, Status
from pyproxy.questions import QUESTIONS

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
MANIFESTS = """
apiVersion: v1
kind: Node
metadata: {name: node-a}
status: {addresses: [{type: InternalIP, address: 192.0.2.11}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default, resourceVersion: "17"}
spec: {clusterIP: 10.96.0.10, type: NodePort, ports: [{name: http, port: 80, nodePort: 30080}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-x, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.244.2.5], nodeName: node-b, targetRef: {kind: Pod, name: web-1}}]
"""


def test_each_command_is_a_file_and_has_a_main():
    assert {"explain", "get", "wait"} <= set(commands.names())
    assert all(callable(commands.load(name).main) for name in commands.names())


# --- tables ---------------------------------------------------------------------------------------


def test_a_table_is_aligned_and_empty_cells_are_dashes():
    assert table(("A", "LONG"), [("one", ""), ("2", "x")]) == "A    LONG\none  -\n2    x\n"


def test_a_table_that_is_too_wide_shortens_its_widest_columns():
    text = table(("NAME", "B"), [("a" * 30, "short"), ("b" * 12, "c" * 20)], width=36)
    assert max(map(len, text.splitlines())) <= 36
    assert "short" in text


@pytest.mark.parametrize(
    ("widths", "width", "expected"),
    [([5, 5], 20, [5, 5]), ([20, 10], 22, [10, 10]), ([9, 9], 4, [8, 8])],
)
def test_widths_fit_or_are_as_short_as_may_be(widths, width, expected):
    assert fitting(widths, width) == expected


def test_a_text_loses_its_middle():
    assert shortened("default/my-long-name", 11) == "defau…-name"
    assert shortened("short", 11) == "short"


@pytest.mark.parametrize(
    ("since", "expected"),
    [
        (None, ""),
        ("2026-01-01T11:59:55Z", "5s"),
        ("2026-01-01T11:58:30.5Z", "89s"),
        ("2026-01-01T11:30:00Z", "30m"),
        ("2026-01-01T07:00:00Z", "5h"),
        ("2025-12-20T12:00:00Z", "12d"),
        ("2026-01-01T12:00:01Z", "0s"),
    ],
)
def test_an_age_has_one_unit(since, expected):
    assert age(since, NOW) == expected


# --- words ----------------------------------------------------------------------------------------


def test_flags_of_run_are_told_from_a_commands_own_words():
    words = ["services", "--cluster-cidr", "10.0.0.0/8", "-n", "x", "--masquerade-all", "a/b"]
    assert divided(words) == (
        ["--cluster-cidr", "10.0.0.0/8", "--masquerade-all"], ["services", "-n", "x", "a/b"],
    )  # fmt: skip
    assert divided(["--cluster-cidr=10.0.0.0/8", "--to", "1.2.3.4:80"]) == (
        ["--cluster-cidr=10.0.0.0/8"], ["--to", "1.2.3.4:80"],
    )  # fmt: skip


@pytest.mark.parametrize("text", ["web", "pod/a/b", "service/a", "service/a/b/c"])
def test_an_object_is_a_service_with_its_namespace(text):
    assert service_named("service/a/b") == "a/b"
    with pytest.raises(CommandError, match=f"{text} is not service/NAMESPACE/NAME"):
        service_named(text)


# --- wait -----------------------------------------------------------------------------------------


def port(state="programmed", backends=2, **fields):
    return PortStatus(4, "", "TCP", 80, state, None, backends, backends, **fields)


def status(*ports, there=True, leaving=0, errors=(), **fields):
    item = ServiceStatus("default", "web", "ClusterIP", (), "17", (), ports, **fields)
    return Status("node-a", item if there else None, leaving, errors)


@pytest.mark.parametrize(
    ("condition", "now", "expected"),
    [
        ("programmed", status(port()), None),
        ("programmed", status(port(), port("pending")), "port 80/TCP (IPv4) is pending"),
        ("programmed", status(port("refused", problems=("taken",))), "is refused: taken"),
        ("programmed", status(port("pending"), errors=("IPv4: no",)), "is pending: IPv4: no"),
        ("programmed", status(there=False), "node-a knows of no such Service"),
        ("programmed", status(not_served=("headless",)), "it is not served: headless"),
        ("endpoints=2", status(port()), None),
        ("endpoints=3", status(port()), "port 80/TCP leads to 2, not 3"),
        ("endpoints=2", status(port("pending")), "is pending"),
        ("absent", status(there=False), None),
        ("absent", status(port()), "the Service is there"),
        ("absent", status(there=False, leaving=2), "2 of its ports are still to be removed"),
    ],
)
def test_a_condition_says_why_it_is_not_so_yet(condition, now, expected):
    reason = condition_of(condition)(now)
    assert reason is None if expected is None else expected in reason


def test_a_version_is_waited_for_too():
    assert at_version(condition_of("programmed"), 17)(status(port())) is None
    late = at_version(condition_of("programmed"), 18)(status(port()))
    assert late == "the Service is known at version 17, not 18"


@pytest.mark.parametrize("text", ["ready", "endpoints", "endpoints=x", "endpoints=-1"])
def test_another_condition_is_an_error(text):
    with pytest.raises(CommandError, match="is not programmed, endpoints=N or absent"):
        condition_of(text)


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path, capsys):
    (tmp_path / "web.yaml").write_text(MANIFESTS)

    def run(*words):
        code = main([*words, "-f", str(tmp_path), "--node-name", "node-a"])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_get_shows_what_would_be_programmed(offline):
    code, out, err = offline("get", "services")
    assert (code, err) == (0, "")
    assert out.splitlines()[1].split() == [
        "default/web", "NodePort", "http:80/TCP", "1/1", "17", "planned", "-",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "cell"),
    [("endpoints", "10.244.2.5:8080"), ("routes", "node:30080/TCP"), ("conflicts", "no conflicts")],
)
def test_get_has_a_sheet_for_everything(offline, what, cell):
    code, out, _ = offline("get", what)
    assert code == 0
    assert cell in out


def test_get_of_one_service_is_json_too(offline):
    code, out, _ = offline("get", "routes", "default/web", "-o", "json")
    rows = json.loads(out)["items"]
    assert (code, [row["frontend"] for row in rows]) == (0, ["10.96.0.10:80/TCP", "node:30080/TCP"])


def test_explain_works_on_files_and_verifies_nothing(offline):
    code, out, err = offline("explain", "service/default/web")
    assert (code, err) == (0, "")
    assert "10.244.2.5:8080  100.0%  web-1  node-b" in out
    assert "verified" not in out
    _, out, _ = offline("explain", "service/default/web", "-o", "json")
    assert json.loads(out)["verification"] is None


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("get", "services", "default/none"), "Service default/none: there is none that node-a"),
        (("get", "services", "none"), "service: none is not NAMESPACE/NAME"),
        (("explain",), "explain: it needs service/NAMESPACE/NAME, or --from WHO --to IP:PORT"),
        (("explain", "service/a/b", "--to", "1.2.3.4:80"), "explain: either service/"),
        (("wait", "service/default/web"), "wait: only a running pyproxy writes anything"),
        (("top",), "traffic: only a running pyproxy knows; leave out -f"),
        (("top", "-n", "-1"), "top: -n is 0 or more, and --rows 1 or more"),
        (("top", "--rows=0"), "top: -n is 0 or more, and --rows 1 or more"),
    ],
)
def test_a_mistake_is_one_line(offline, words, error):
    code, out, err = offline(*words)
    assert (code, out) == (1, "")
    assert err.startswith(f"pyproxy: {error}")
    assert err.count("\n") == 1


def test_what_diff_is_to_tell_of_manifests_needs_some(capsys):
    assert main(["diff", "--entries"]) == 2
    assert "--entries go with -f or --kubeconfig" in capsys.readouterr().err


NO_DAEMON = "pyproxy: {}no pyproxy answers at /nowhere: No such file or directory{}\n"


@pytest.mark.parametrize(
    ("words", "lead", "hint"),
    [
        ("get services", "", " (-f FILE and --kubeconfig FILE work without one)"),
        ("explain service/a/b", "", " (-f FILE and --kubeconfig FILE work without one)"),
        ("diff", "", " (-f FILE with --against FILE works without one)"),
        ("diff -f {}", "", " (-f FILE with --against FILE works without one)"),
        ("audit", "", ""),
        ("top", "", ""),
        ("wait service/a/b --timeout 0.2s", "wait: after 0.2 s ", ""),
    ],
)
def test_where_no_daemon_is_a_hint_names_what_works_without_one(
    tmp_path, capsys, words, lead, hint
):
    (tmp_path / "web.yaml").write_text(MANIFESTS)
    assert main([*words.format(tmp_path).split(), "--control-socket=/nowhere"]) != 0
    assert capsys.readouterr().err == NO_DAEMON.format(lead, hint)


@pytest.mark.parametrize("words", ["help {}", "{} --help"])
@pytest.mark.parametrize(
    "name", sorted({*commands.names(), *COMMANDS} - {"run", "version", "help"})
)
def test_each_command_has_help_of_its_own(capsys, name, words):
    with pytest.raises(SystemExit) as ended:
        main(words.format(name).split())
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert out.startswith(f"usage: pyproxy {name} ")
    takes_no_files = {"audit", "top", "wait", "cleanup", "demo", "migrate"}
    assert ("-f PATH" not in out) == (name in takes_no_files)


def test_help_for_what_is_no_command_is_an_error(capsys):
    assert main(["help", "gte"]) == 1
    assert capsys.readouterr().err == 'pyproxy: unknown command "gte" (did you mean get?)\n'


def test_words_of_cleanup_are_flags_of_run():
    words = ["--keep", "nftables", "--service-proxy-name=canary"]
    assert cleanup_flags(words) == ["--service-proxy-name=canary", "--keep=nftables"]
    assert cleanup_flags([]) == []


def test_files_that_make_no_sense_are_named(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("kind: [")
    code = main(["get", "services", "-f", str(tmp_path)])
    assert code == 1
    assert "bad.yaml" in capsys.readouterr().err


def test_each_question_of_the_api_is_on_its_page():
    page = Path("docs/commands.md").read_text()
    daemon = Daemon("here", Config(), ())
    paths = {"about", *QUESTIONS, *daemon.live()}
    assert {path for path in paths if f"| `/v1/{path}` |" not in page} == set()
