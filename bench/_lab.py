"""A network namespace with one proxy in it: what the process costs, and what it says."""

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import NamedTuple
from urllib.request import urlopen

from bench._cluster import NODE, NODE_IP

ROOT = Path(__file__).parents[1]
MARK = "PYPROXY_BENCH_ISOLATED"
READY_SECONDS = 120
TICKS = os.sysconf("SC_CLK_TCK")

CONFIG = """\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: {mode}
hostnameOverride: {node}
clientConnection: {{kubeconfig: {kubeconfig}}}
clusterCIDR: 10.128.0.0/9
"""
KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: bench
contexts: [{{name: bench, context: {{cluster: bench, user: bench}}}}]
clusters: [{{name: bench, cluster: {{server: "{url}"}}}}]
users: [{{name: bench, user: {{}}}}]
"""


def isolate(module: str) -> None:
    """Go on in a network namespace of our own; others are not touched, and do not disturb."""
    if os.environ.get(MARK):
        return
    os.environ[MARK] = "yes"
    # Large transactions need root of the first user namespace.
    own = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    os.chdir(ROOT)
    os.execvp(own[0], [*own, sys.executable, "-m", module, *sys.argv[1:]])


def make_network() -> None:
    """Give packets a way out that ends at once: a bridge without ports."""
    for words in (
        "link set lo up",
        "link add uplink type bridge",
        "link set uplink arp off up",
        f"addr add {NODE_IP}/24 dev uplink",
        "route add default dev uplink",
    ):
        subprocess.run(["ip", *words.split()], check=True)


def warm_up() -> None:
    """Compile the proxy to byte code, as it is where it was installed."""
    modules = "pyproxy.cli, pyproxy.app, pyproxy.feeds, pyproxy.proxier.nftables"
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True, env=environment())


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(Path(tempfile.gettempdir(), "pyproxy-bench-code"))}


class Cost(NamedTuple):
    cpu_seconds: float
    rss_mib: float
    peak_mib: float


class Proxy:
    """One run of pyproxy."""

    def __init__(self, process: asyncio.subprocess.Process, started_at: float) -> None:
        self._process = process
        self._started_at = started_at
        self.serving_seconds = 0.0  # from the start of the process to the end of the first sync
        self.log: list[str] = []

    async def until_serving(self) -> None:
        async with asyncio.timeout(READY_SECONDS):
            assert self._process.stderr is not None
            while line := await self._process.stderr.readline():
                self.log.append(line.decode())
                if "serving" in self.log[-1]:
                    self.serving_seconds = perf_counter() - self._started_at
                    return
        raise RuntimeError("pyproxy ended:\n" + "".join(self.log))

    def cost(self) -> Cost:
        stat = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(") ")[2].split()
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        rss, peak = (int(status.partition(word)[2].split()[0]) for word in ("VmRSS:", "VmHWM:"))
        return Cost((int(stat[11]) + int(stat[12])) / TICKS, rss / 1024, peak / 1024)

    async def drain(self) -> None:
        assert self._process.stderr is not None
        while line := await self._process.stderr.readline():
            self.log.append(line.decode())


@asynccontextmanager
async def proxy(
    url: str,
    folder: Path,
    command: Sequence[str] = (),
    *,
    mode: str = "nftables",
    settings: str = "",
):
    """Run a proxy until the end of the block; it is serving at its beginning.

    ``settings`` are more lines of its configuration file.
    """
    kubeconfig, config = folder / "kubeconfig", folder / "config.yaml"
    kubeconfig.write_text(KUBECONFIG.format(url=url))
    config.write_text(CONFIG.format(mode=mode, node=NODE, kubeconfig=kubeconfig) + settings)
    started_at = perf_counter()
    words = [*(command or (sys.executable, "-m", "pyproxy")), f"--config={config}"]
    process = await asyncio.create_subprocess_exec(
        *words, cwd=ROOT, env=environment(), stderr=asyncio.subprocess.PIPE
    )
    run = Proxy(process, started_at)
    try:
        await run.until_serving()
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(run.drain())
            yield run
            reading.cancel()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def metric(name: str) -> float:
    """Return a metric of the proxy, with its labels."""
    with urlopen("http://127.0.0.1:10249/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return next((float(v) for k, _, v in (row.rpartition(" ") for row in lines) if k == name), 0.0)
