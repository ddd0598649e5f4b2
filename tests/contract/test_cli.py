"""``pyproxy`` as a newcomer meets it: each mistake is one line that helps, and exit code 1."""

import asyncio
import os
import signal
import socket
import sys
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest
import yaml

from pyproxy import __version__, proxier
from pyproxy.cli import allowed_modes, resolved_mode
from pyproxy.config import Config
from tests.fakes.apiserver import FakeApiServer

# The event loop of the test is not that of the process: one will do.
pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])

PATIENCE_SECONDS = 30  # a limit for a test that fails, not a wait
NOBODY = "http://127.0.0.1:1"  # an API server that never answers: nothing is ever written
HERE = {"type": "InternalIP", "address": "127.0.0.1"}
HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
HINT = " (pyproxy --help lists all flags)"
FLAGS_ONLY = ": there are only flags" + HINT


class Outcome(NamedTuple):
    code: int
    output: str
    errors: str


@asynccontextmanager
async def started(*arguments, output=asyncio.subprocess.PIPE):
    """The command while it runs; it is killed if a test leaves it behind."""
    foreign = {"KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "pyproxy",
        *map(str, arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=output,
        stderr=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name not in foreign},
    )
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def ended(process):
    output, errors = await process.communicate()
    return Outcome(process.returncode, output.decode(), errors.decode())


async def pyproxy(*arguments):
    async with started(*arguments) as process:
        return await ended(process)


async def read_until(stream, event):
    """Read lines of the log until one tells of the event."""
    async for line in stream:
        if event in line.decode():
            return
    raise AssertionError(f"the process ended before it said {event}")


def written(folder, name, content):
    """The path of a file with this content, or of none, if there is none."""
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    return path


def one_line(text):
    return Outcome(1, "", f"pyproxy: {text}\n")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def bound_to(health, metrics):
    return (
        f"--healthz-bind-address=127.0.0.1:{health}",
        f"--metrics-bind-address=127.0.0.1:{metrics}",
    )


@pytest.mark.parametrize(
    ("words", "error"),
    [
        pytest.param(
            "",
            "no kubeconfig is given and this is not a pod: "
            "set --kubeconfig, --master or clientConnection.kubeconfig",
            id="nothing at all",
        ),
        pytest.param(
            "--proxy-mod=userspace",
            "unknown flag --proxy-mod (did you mean --proxy-mode?)" + HINT,
            id="an unknown flag",
        ),
        pytest.param("-x", "unknown flag -x" + HINT, id="an unknown letter"),
        pytest.param("rnu", 'unknown command "rnu" (did you mean run?)', id="an unknown command"),
        pytest.param("start", 'unknown command "start"', id="a command like no other"),
        pytest.param("run now", 'unexpected argument "now"' + FLAGS_ONLY, id="an argument"),
        pytest.param("--v", "--v: a value is missing" + HINT, id="a missing value"),
        pytest.param(
            "--v=much", '--v: expected a level such as 2, got "much"' + HINT, id="a wrong value"
        ),
        pytest.param(
            "--event-loop=fast",
            '--event-loop: "fast" is not one of auto, uvloop, asyncio' + HINT,
            id="not one of a few",
        ),
        pytest.param(
            "--proxy-mode=nftable",
            'mode: "nftable" is not one of auto, userspace, iptables, nftables, ipvs '
            "(did you mean nftables?)",
            id="a mode that does not exist",
        ),
        pytest.param(
            "--cluster-cidr=10.0.0.0/99",
            'clusterCIDR: "10.0.0.0/99" is not a CIDR such as 10.0.0.0/8 or fd00::/64',
            id="a value that is checked later",
        ),
        pytest.param(
            "--manifests=/nonexistent/dir",
            "--manifests /nonexistent/dir: No such file or directory; create it, or give the path "
            "of a file or directory with Services in YAML or JSON",
            id="a folder of manifests that is not there",
        ),
        pytest.param(
            "--manifests=/nonexistent/dir --service-cidr=10.0.0.0/8,10.1.0.0/16",
            "--service-cidr: 10.0.0.0/8,10.1.0.0/16 has two of one family; give one of each",
            id="two ranges of one family",
        ),
        pytest.param(
            "--write-config-to=/nonexistent/file",
            "--write-config-to /nonexistent/file: No such file or directory",
            id="a place that cannot be written to",
        ),
    ],
)
async def test_a_wrong_command_line_is_one_line(words, error):
    assert await pyproxy(*words.split()) == one_line(error)


async def test_a_mode_that_is_not_built_is_refused_with_the_names_of_those_that_are():
    error = "mode: smoke is not part of this version; there is: .*userspace"
    with pytest.raises(LookupError, match=error):
        resolved_mode(Config(mode="smoke"))


async def test_a_node_with_a_proxy_beside_does_not_move():
    outcome = await pyproxy("migrate", "--to=nftables", "--service-proxy-name=canary")
    error = "migrate: serviceProxyName: a node moves as a whole; leave the name out"
    assert outcome == one_line(error)


async def test_beside_another_proxy_auto_is_a_mode_that_can_be():
    names = allowed_modes(Config(service_proxy_name="canary"))
    assert set(names) == set(proxier.modes()) - {"iptables", "ipvs"}
    assert resolved_mode(Config(service_proxy_name="canary")) in names


@pytest.mark.parametrize(
    ("content", "error"),
    [
        pytest.param(None, "No such file or directory", id="missing"),
        pytest.param(b"\xff\xfe", "byte 0 is not UTF-8", id="not text"),
        pytest.param(
            "a: [", "line 1: expected the node content, but found '<stream end>'", id="not YAML"
        ),
        pytest.param(
            "kind: Pod\n", 'kind: is "Pod", it must be KubeProxyConfiguration', id="another kind"
        ),
        pytest.param(
            HEAD + "mode: userspce\n",
            'mode: "userspce" is not one of auto, userspace, iptables, nftables, ipvs '
            "(did you mean userspace?)",
            id="an unknown mode",
        ),
        pytest.param(
            HEAD + "conntrack: {min: many}\n",
            'conntrack.min: expected an integer, got "many"',
            id="a wrong value",
        ),
        pytest.param(
            HEAD + "clusterCIDR: 10.0.0.0/99\n",
            'clusterCIDR: "10.0.0.0/99" is not a CIDR such as 10.0.0.0/8 or fd00::/64',
            id="a value that makes no sense",
        ),
    ],
)
async def test_a_wrong_configuration_file_is_one_line(tmp_path, content, error):
    path = written(tmp_path, "config.yaml", content)
    assert await pyproxy("--config", path) == one_line(f"--config {path}: {error}")


async def test_each_wrong_setting_of_a_file_is_a_line(tmp_path):
    path = written(tmp_path, "config.yaml", HEAD + "clusterCIDR: here\nnodePortAddresses: [all]\n")
    outcome = await pyproxy("--config", path)
    fields = [line.removeprefix(f"pyproxy: --config {path}: ").split(":")[0]
              for line in outcome.errors.splitlines()]  # fmt: skip
    assert (outcome.code, fields) == (1, ["clusterCIDR", "nodePortAddresses[0]"])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        pytest.param(None, "there is no such file", id="missing"),
        pytest.param("just words", "it has no clusters, contexts and users", id="not a mapping"),
        pytest.param(
            "a: [",
            "not YAML: line 1, column 5: expected the node content, but found '<stream end>'",
            id="not YAML",
        ),
        pytest.param("kind: Config\n", "current-context is missing", id="no current context"),
        pytest.param(
            "current-context: prod\ncontexts: []\n",
            'there is no context "prod"',
            id="a context that is not there",
        ),
    ],
)
async def test_a_wrong_kubeconfig_is_one_line(tmp_path, content, error):
    path = written(tmp_path, "kubeconfig", content)
    assert await pyproxy("--kubeconfig", path) == one_line(f"kubeconfig {path}: {error}")


@pytest.mark.parametrize("words", ["version", "--version", "run --version"])
async def test_it_says_its_version(words):
    assert await pyproxy(*words.split()) == Outcome(0, f"pyproxy {__version__}\n", "")


@pytest.mark.parametrize("words", ["help", "--help", "-h", "run --help"])
async def test_help_begins_with_what_it_is_and_lists_flags(words):
    code, output, errors = await pyproxy(*words.split())
    assert (code, errors) == (0, "")
    first, *lines = output.splitlines()
    assert first == "pyproxy makes the Services of a Kubernetes cluster work on this node."
    assert {"--config", "--manifests", "--proxy-mode"} <= {
        w for line in lines for w in line.split()
    }


async def test_settings_can_be_written_to_a_file_and_read_from_it(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    flags = ("--cluster-cidr=10.1.0.0/16", "--proxy-mode=userspace")
    assert await pyproxy(*flags, "--write-config-to", first) == Outcome(0, "", "")
    assert await pyproxy("--config", first, "--write-config-to", second) == Outcome(0, "", "")
    assert first.read_text() == second.read_text()
    content = yaml.safe_load(first.read_text())
    assert (content["kind"], content["clusterCIDR"]) == ("KubeProxyConfiguration", "10.1.0.0/16")


@pytest.mark.parametrize("server", ["proxy healthz", "metrics server"])
async def test_a_taken_port_is_fatal_where_the_configuration_says_so(server):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        where = (port, free_port()) if server == "proxy healthz" else (free_port(), port)
        outcome = await pyproxy("--master", NOBODY, "--bind-address-hard-fail", *bound_to(*where))
    last = outcome.errors.splitlines()[-1]
    error = f"failed to start {server} on 127.0.0.1:{port}: Address already in use"
    assert (outcome.code, last) == (1, f"pyproxy: {error}")
    assert "Traceback" not in outcome.errors


async def test_a_change_of_the_configuration_file_ends_the_process(tmp_path):
    kubeconfig = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "here"}}],
        "clusters": [{"name": "here", "cluster": {"server": NOBODY}}],
    }
    access = written(tmp_path, "kubeconfig", yaml.safe_dump(kubeconfig))
    bound = (
        f"healthzBindAddress: 127.0.0.1:{free_port()}\n"
        f"metricsBindAddress: 127.0.0.1:{free_port()}\n"
    )
    path = written(
        tmp_path, "config.yaml", HEAD + bound + f"clientConnection: {{kubeconfig: {access}}}\n"
    )
    async with started("--config", path) as process:
        await read_until(process.stderr, '"listening"')
        path.write_text(path.read_text() + "oomScoreAdj: 0\n")
        outcome = await ended(process)
    last = outcome.errors.splitlines()[-1]
    error = f"configuration updated: {path} changed, a restart reads it"
    assert (outcome.code, last) == (1, f"pyproxy: {error}")
    assert "Traceback" not in outcome.errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_in_peace(number):
    bound = bound_to(free_port(), free_port())
    async with started("run", "--master", NOBODY, *bound) as process:
        await read_until(process.stderr, '"listening"')
        process.send_signal(number)
        outcome = await ended(process)
    assert outcome.code == 0
    assert '"stopping"' in outcome.errors.splitlines()[-1]


async def test_who_only_asks_keeps_no_state_of_the_node(tmp_path):
    async with FakeApiServer() as server:
        server.put("nodes", "here", status={"addresses": [HERE]})
        flags = ("--master", server.url, "--hostname-override=here", "--state-dir", tmp_path)
        outcome = await pyproxy("get", "services", *flags)
    assert (outcome.code, os.listdir(tmp_path)) == (0, [])


async def test_who_reads_may_have_enough():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        async with started("--help", output=writer) as process:
            _, errors = await process.communicate()
    finally:
        os.close(writer)
    assert (process.returncode, errors) == (141, b"")
