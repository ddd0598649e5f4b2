"""Mode nftables from event to kernel, beside nft(8) and a rule set in the shape of kube-proxy's.

python -m bench.nftables [--quick] [--sizes 1000x10,10000x10] [--baseline 1000x10] [--json FILE]
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import _kubeproxy
from bench._apiserver import ApiServer
from bench._chart import draw
from bench._cluster import SLICES, TARGET_PORT, Cluster
from bench._kernel import (
    Arrivals,
    endpoint_count,
    first_packet_us,
    generation,
    listener_pids,
)
from bench._lab import Proxy, isolate, make_network, metric, proxy, warm_up

SETTLE_SECONDS = 2.0  # after a start: the audit has looked, the collector has run
IDLE_SECONDS = 5.0
ARRIVE_SECONDS = 20.0
STARTS = 3
BASELINE_CHANGES = 10
DELETE_TABLES = "delete table ip pyproxy\ndelete table ip6 pyproxy\n"
FULL_SYNC = 'kubeproxy_sync_full_proxy_rules_duration_seconds_sum{ip_family="IPv4"}'
FEW = 10  # Services, to compare the cost of a packet with


class Size(NamedTuple):
    services: int
    endpoints: int

    def __str__(self) -> str:
        return f"{self.services}x{self.endpoints}"


class Rate(NamedTuple):
    """How many changes to make, how far apart. ``at_once``: as many in each step."""

    name: str
    count: int
    per_second: float


FULL_RATES = (Rate("rest", 100, 20), Rate("100/s", 1000, 100), Rate("1000/s", 5000, 1000))
QUICK_RATES = (Rate("rest", 30, 20), Rate("100/s", 200, 100))


async def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    rates = QUICK_RATES if options.quick else FULL_RATES
    results: dict[str, dict[str, float]] = {}
    first = await few_services()
    for size in options.sizes:
        figures = await against_cluster(size, rates)
        if size == options.baseline:
            figures |= baseline(size)
        figures["first packet, 10 Services, us"] = first
        figures["first packet, ratio to 10 Services"] = figures["first packet, us"] / first
        results[str(size)] = figures
        show(str(size), figures)
    return results


# --- pyproxy --------------------------------------------------------------------------------------


async def few_services() -> float:
    """Return what a first packet costs where there is next to nothing, in microseconds."""
    cluster = Cluster(FEW, 10)
    async with ApiServer(cluster.lists()).serve() as api:
        with tempfile.TemporaryDirectory() as folder:
            async with proxy(api.url, Path(folder)):
                cost = await asyncio.to_thread(first_packet_us, vips(cluster))
    nft(DELETE_TABLES)
    return cost


async def against_cluster(size: Size, rates: Sequence[Rate]) -> dict[str, float]:
    cluster = Cluster(*size)
    if pids := listener_pids():
        print(f"processes {pids} listen to nf_tables: all loads are slow", file=sys.stderr)
    async with ApiServer(cluster.lists()).serve() as api:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            figures = {"start, s": await starts(api, path)}
            async with proxy(api.url, path) as run:
                figures["first sync, s"] = await asyncio.to_thread(metric, FULL_SYNC)
                assert endpoint_count() == cluster.endpoint_count, "the kernel has all of them"
                figures |= await at_rest(run)
                for rate in rates:
                    figures |= await churn(cluster, api, run, rate)
                figures["first packet, us"] = await asyncio.to_thread(
                    first_packet_us, vips(cluster)
                )
                figures["peak RSS, MiB"] = run.cost().peak_mib
            figures |= await restart(api, path)
    figures |= nft_changes(cluster)
    nft(DELETE_TABLES)
    return figures


async def starts(api: ApiServer, path: Path) -> float:
    """Return the seconds from the start of a process to all rules, where there were none."""
    seconds = []
    for _ in range(STARTS):
        async with proxy(api.url, path) as run:
            seconds.append(run.serving_seconds)
        nft(DELETE_TABLES)
    return median(seconds)


async def at_rest(run: Proxy) -> dict[str, float]:
    await asyncio.sleep(SETTLE_SECONDS)
    before, number = run.cost(), generation()
    await asyncio.sleep(IDLE_SECONDS)
    cpu = run.cost().cpu_seconds - before.cpu_seconds
    assert generation() == number, "nothing is written when nothing changes"
    return {"idle CPU, %": 100 * cpu / IDLE_SECONDS}


async def churn(cluster: Cluster, api: ApiServer, run: Proxy, rate: Rate) -> dict[str, float]:
    """Make changes at a steady rate; return how long they took to be in the kernel."""
    sent_at: dict[str, float] = {}
    seconds: dict[str, float] = {}
    done = asyncio.Event()

    def heard(ip: str, now: float) -> None:
        if ip in sent_at:
            seconds[ip] = now - sent_at[ip]
            if len(seconds) == rate.count:
                done.set()

    arrivals = Arrivals(heard)
    loop = asyncio.get_running_loop()
    loop.add_reader(arrivals, arrivals.receive)
    before = run.cost()
    started_at = perf_counter()
    try:
        for number in range(rate.count):
            ip, event = cluster.change()
            early = started_at + number / rate.per_second - perf_counter()
            await asyncio.sleep(max(0.0, early))
            sent_at[ip] = perf_counter()
            api.tell(SLICES, event)
        async with asyncio.timeout(ARRIVE_SECONDS):
            await done.wait()
    finally:
        loop.remove_reader(arrivals)
        arrivals.close()
    cpu = run.cost().cpu_seconds - before.cpu_seconds
    in_order = [seconds[ip] for ip in sent_at]
    fifth = rate.count // 5
    return {
        f"change p50 at {rate.name}, ms": percentile(in_order, 50) * 1000,
        f"change p99 at {rate.name}, ms": percentile(in_order, 99) * 1000,
        f"lag growth at {rate.name}, ms": (median(in_order[-fifth:]) - median(in_order[:fifth]))
        * 1000,
        f"CPU per change at {rate.name}, ms": cpu / rate.count * 1000,
    }


async def restart(api: ApiServer, path: Path) -> dict[str, float]:
    """Start again with all as it was: nothing may be written."""
    before = generation()
    async with proxy(api.url, path) as run:
        return {
            "restart, s": run.serving_seconds,
            "restart, first sync, s": await asyncio.to_thread(metric, FULL_SYNC),
            "restart, transactions": generation() - before,
        }


def vips(cluster: Cluster) -> list[str]:
    return [cluster.cluster_ip(n) for n in range(cluster.services)]


# --- others ---------------------------------------------------------------------------------------


def nft_changes(cluster: Cluster) -> dict[str, float]:
    """Let nft(8) replace endpoints in the table that the proxy left."""
    seconds = []
    for number in range(BASELINE_CHANGES):
        old, key = cluster.endpoints(number)[0], f"{cluster.cluster_ip(number)} . tcp . 80 . 0"
        text = f"delete element ip pyproxy endpoints {{ {key} }}\n"
        text += f"add element ip pyproxy endpoints {{ {key} : {old} . {TARGET_PORT} }}\n"
        seconds.append(nft(text))
    return {"nft -f: change p50, ms": median(seconds) * 1000}


def baseline(size: Size) -> dict[str, float]:
    cluster = Cluster(*size)
    load = nft(_kubeproxy.ruleset(cluster))
    packet = first_packet_us(vips(cluster))
    seconds = []
    for _ in range(BASELINE_CHANGES):
        number = cluster.next_to_change()
        before = list(cluster.endpoints(number))
        cluster.change()
        after = cluster.endpoints(number)
        (gone,) = set(before) - set(after)
        seconds.append(nft(_kubeproxy.change(number, gone, after)))
    nft(f"delete table {_kubeproxy.TABLE}\n")
    return {
        "kube-proxy's shape: load, s": load,
        "kube-proxy's shape: change p50, ms": median(seconds) * 1000,
        "kube-proxy's shape: first packet, us": packet,
    }


def nft(text: str) -> float:
    """Run nft(8); return the seconds."""
    started_at = perf_counter()
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)
    return perf_counter() - started_at


# --- figures --------------------------------------------------------------------------------------


def percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[max(0, ceil(len(values) * percent / 100) - 1)]


def show(size: str, figures: dict[str, float]) -> None:
    print(f"\n{size}")
    for name, value in figures.items():
        print(f"  {name:42} {value:10.3f}")
    for name, (theirs, ours) in RATIOS.items():
        if theirs in figures:
            print(f"  {name:42} {figures[theirs] / figures[ours]:9.1f}x", flush=True)


RATIOS = {
    "one change: nft -f / pyproxy": ("nft -f: change p50, ms", "change p50 at rest, ms"),
    "one change: kube-proxy's shape / pyproxy": (
        "kube-proxy's shape: change p50, ms", "change p50 at rest, ms",
    ),
    "full load: kube-proxy's shape / pyproxy": ("kube-proxy's shape: load, s", "first sync, s"),
    "first packet: kube-proxy's shape / pyproxy": (
        "kube-proxy's shape: first packet, us", "first packet, us",
    ),
}  # fmt: skip


def size(text: str) -> Size:
    services, _, endpoints = text.partition("x")
    return Size(int(services), int(endpoints))


def sizes(text: str) -> list[Size]:
    return [size(word) for word in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="500x5, in half a minute")
    parser.add_argument("--sizes", type=sizes, help="Services x endpoints, with commas")
    parser.add_argument("--baseline", type=size, help="the size to load in kube-proxy's shape too")
    parser.add_argument("--json", type=whole_path, help="a file for the figures")
    parser.add_argument("--chart", type=whole_path, help="a PNG; it needs the extra `bench`")
    options = parser.parse_args()
    small = [Size(500, 5)]
    options.sizes = options.sizes or (small if options.quick else sizes("1000x10,10000x10,30000x3"))
    options.baseline = options.baseline or (small[0] if options.quick else Size(1000, 10))
    return options


def whole_path(text: str) -> Path:
    return Path(text).absolute()


def main() -> None:
    options = arguments()
    isolate("bench.nftables")
    make_network()
    warm_up()
    results = asyncio.run(measure(options))
    print(json.dumps(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.chart:
        draw(results, options.chart)


if __name__ == "__main__":
    main()
