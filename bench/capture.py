"""Serve 10,000 dual-stack Services in mode userspace: seconds, file descriptors and memory.

python -m bench.capture [SERVICES]     as root: each way to capture, in namespaces of their own

Beside the two ways that share sockets stands a listening socket for each frontend. What is
measured is the first sync: sockets, maps or rules, and the routes that lead addresses here; and
then changes of one Service each.
"""

import asyncio
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

from pyproxy import proxier
from pyproxy.config import Config, with_setting
from pyproxy.delta import Delta
from pyproxy.host import Host
from pyproxy.model import (
    Address,
    Backend,
    Family,
    Forward,
    Frontend,
    Pool,
    Route,
    ServicePortName,
)
from pyproxy.process import SystemClock, calm_collector
from pyproxy.proxier._poller import RelayLoop
from pyproxy.reconcile import Target
from pyproxy.rules.listeners import Listener
from tests.netns.node import Jobs

WAYS = ("sk_lookup", "tproxy", "listeners")
SERVICES = 10_000
ROUNDS = 5
CHANGES = 21
NODE_IPS = ("192.0.2.11", "fd00:c0de::11")


def listeners(family: Family, count: int) -> Iterator[tuple[Frontend, Listener]]:
    for number in range(count):
        low = f"{number >> 8}.{number & 255}" if family == 4 else f"{number:x}"
        vip = f"10.96.{low}" if family == 4 else f"fd00:10:96::{low}"
        pod = Address("10.244.1.2" if family == 4 else "fd00:10:244::2", 8080)
        action = Forward(Pool((Backend(pod),)))
        route = Route(Frontend(vip, 80, "TCP"), "ClusterIP", action, action, action)
        yield (
            route.frontend,
            Listener(ServicePortName("default", f"web-{number}", "", "TCP"), route),
        )


async def seconds_of_change(
    target: Target[Frontend, Listener], wanted: dict[Frontend, Listener], number: int
) -> float:
    """Give one Service another endpoint; return how long that took."""
    frontend, old = list(wanted.items())[number]
    action = Forward(Pool((Backend(Address("10.244.1.3", 8080)),)))
    route = Route(frontend, "ClusterIP", action, action, action)
    start = perf_counter()
    await target.apply(Delta({}, {frontend: (old, Listener(old.owner, route))}, {}))
    return perf_counter() - start


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def memory_mib() -> float:
    """Return the resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def trial(way: str, count: int) -> dict[str, float]:
    """Return the figures of one way, in this process."""
    config = with_setting(Config(mode="userspace"), "userspace.capture", way)
    config = with_setting(config, "userspace.drain_timeout_seconds", 0.0)
    async with asyncio.TaskGroup() as group:
        tasks = Jobs(group)
        targets, files = [], open_files()
        for family in (4, 6):
            env = proxier.Env(
                family=family, config=config, clock=SystemClock(), tasks=tasks, host=Host(),
                node=None, node_ips=NODE_IPS, observe=lambda proto, result: None,
            )  # fmt: skip
            target = proxier.load("userspace").build(env)._target  # type: ignore[attr-defined]
            await target.adopt()
            targets.append((target, dict(listeners(family, count))))
        gc.collect()
        calm_collector()  # as the process does
        memory, start, cpu = memory_mib(), perf_counter(), process_time()
        for target, wanted in targets:
            refused = await target.apply(Delta(wanted, {}, {}))
            assert not refused, next(iter(refused.values()))
        seconds, cpu = perf_counter() - start, process_time() - cpu
        changes = [seconds_of_change(target, wanted, n) for n in range(CHANGES)]
        change = median([await one for one in changes])
        figures = {
            "addresses": 2 * count,
            "seconds": seconds,
            "CPU seconds": cpu,
            "ms a change": change * 1e3,
            "CPU us each": cpu * 1e6 / (2 * count),
            "files": open_files() - files,
            "MiB": memory_mib() - memory,
        }
        for target, _wanted in targets:
            await target.aclose()
            await target.clear()
        await tasks.end()
    return figures


def run(coroutine: Coroutine[None, None, dict[str, float]]) -> dict[str, float]:
    """Run as the mode's own process does."""
    with asyncio.Runner(loop_factory=RelayLoop) as runner:
        return runner.run(coroutine)


def child(way: str, count: int) -> dict[str, float]:
    """Measure in a process and a network namespace of its own."""
    script = 'ip link set lo up && exec "$@"'
    words = [sys.executable, "-m", "bench.capture", str(count), way]
    found = subprocess.run(
        ["unshare", "--net", "sh", "-c", script, "sh", *words], check=True, stdout=subprocess.PIPE
    )
    return json.loads(found.stdout)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else SERVICES
    if len(sys.argv) > 2:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        if sys.argv[2] == "listeners":
            count = min(count, (most - 200) // 2)
        print(json.dumps(run(trial(sys.argv[2], count))))
        return
    rounds = [{way: child(way, count) for way in WAYS} for _ in range(ROUNDS)]
    print(f"{count} Services of two addresses each, median of {ROUNDS} rounds")
    print("(listeners: as many as the limit on open files allows)\n")
    columns = tuple(rounds[0][WAYS[0]])
    print(f"{'capture':12}" + "".join(f"{c:>12}" for c in columns) + f"{'each, ratio':>14}")
    for way in WAYS:
        middle = [median(r[way][column] for r in rounds) for column in columns]
        ratio = median(r[way]["CPU us each"] / r["listeners"]["CPU us each"] for r in rounds)
        print(f"{way:12}" + "".join(f"{value:12.6g}" for value in middle) + f"{ratio:14.2f}")


if __name__ == "__main__":
    main()
