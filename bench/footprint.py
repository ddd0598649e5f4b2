"""What the process costs a node, by mode and number of Services: for deploy/'s resources.

python -m bench.footprint [--modes nftables,userspace] [--sizes 100x10,10000x10] [--json FILE]
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._apiserver import ApiServer
from bench._cluster import SLICES, Cluster
from bench._lab import READY_SECONDS, Proxy, isolate, make_network, proxy, warm_up

MODES = ("nftables", "iptables", "userspace")
SIZES = ("100x10", "1000x10", "10000x10")
SETTLE_SECONDS = 3.0
IDLE_SECONDS = 10.0
CHANGES, CHANGES_PER_SECOND = 100, 10


class Case(NamedTuple):
    mode: str
    services: int
    endpoints: int

    def __str__(self) -> str:
        return f"{self.mode} {self.services}x{self.endpoints}"


async def measured(case: Case) -> dict[str, float]:
    cluster = Cluster(case.services, case.endpoints)
    api = ApiServer(cluster.lists())
    with tempfile.TemporaryDirectory() as folder:
        async with api.serve(), proxy(api.url, Path(folder), mode=case.mode) as run:
            figures = {"start, CPU s": run.cost().cpu_seconds}
            await asyncio.sleep(SETTLE_SECONDS)
            figures["idle, CPU m"] = await millicores(run, asyncio.sleep(IDLE_SECONDS))
            figures["10 changes/s, CPU m"] = await millicores(run, churn(cluster, api))
            cost = run.cost()
            return figures | {"RSS, MiB": cost.rss_mib, "peak RSS, MiB": cost.peak_mib}


async def millicores(run: Proxy, doing) -> float:
    """Return how many thousandths of a CPU the process takes meanwhile."""
    clock = asyncio.get_running_loop().time
    before, started_at = run.cost(), clock()
    await doing
    return 1000 * (run.cost().cpu_seconds - before.cpu_seconds) / (clock() - started_at)


async def churn(cluster: Cluster, api: ApiServer) -> None:
    for _ in range(CHANGES):
        _, event = cluster.change()
        api.tell(SLICES, event)
        await asyncio.sleep(1 / CHANGES_PER_SECOND)


def main() -> None:
    options = arguments()
    isolate("bench.footprint")
    make_network()
    warm_up()
    results = {}
    for case in (Case(mode, *size) for mode in options.modes for size in options.sizes):
        try:
            results[str(case)] = figures = asyncio.run(measured(case))
        except TimeoutError:
            figures = {"not serving, s": READY_SECONDS}
        print(f"{case!s:22}", *(f"{name} {value:.1f}" for name, value in figures.items()), sep="  ")
        subprocess.run([sys.executable, "-m", "pyproxy", "cleanup"], check=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modes", type=lambda text: text.split(","), default=MODES)
    parser.add_argument("--sizes", type=sizes, default=sizes(",".join(SIZES)))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def sizes(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, size.split("x"))) for size in text.split(",")]


if __name__ == "__main__":
    main()
