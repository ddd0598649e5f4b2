"""The userspace relay beside HAProxy, nginx and no proxy at all, on loopback, in one run.

python -m bench.relay [--rounds 12] [--only WORD] [--workers N] [--json FILE] [--chart FILE.png]

Client, proxy and backend are processes that share the machine; every proxy is one process with one
thread, or with ``--workers`` so many processes, and HAProxy so many threads. HAProxy and nginx
(with its stream module, always one process) take part where they are installed.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._chart import draw_ratios
from bench._relay_load import TESTS, Test, Work, stalled_bytes
from bench._relay_peers import NGINX_MODULES, Target, haproxy, nginx, relays, running

MIB = 1 << 20
PEERS = ("haproxy", "nginx")
Figures = dict[str, dict[str, float]]  # by test, by what is measured


class Round(NamedTuple):
    rate: float  # units in a second
    cpu: float  # seconds of the proxy for a unit


def measured(test: Test, targets: Mapping[str, Target], rounds: int) -> dict[str, list[Round]]:
    """Measure all in each round, for others may use the machine.

    And each after each other equally often in all rounds, if those are a multiple of four: who
    comes next finds ports that are in TIME_WAIT.
    """
    found: dict[str, list[Round]] = {name: [] for name in targets}
    for _, order in zip(range(rounds), cycle(balanced(list(targets))), strict=False):
        for name in order:
            target = targets[name]
            before = target.cpu_seconds()
            work: Work = test.run(target.ports, *test.sizes)
            used = target.cpu_seconds() - before
            found[name].append(Round(work.rate / test.unit, used / work.count * test.unit))
    return found


def balanced(names: Sequence[str]) -> list[list[str]]:
    """Return orders; in them each name follows each other equally often (a Williams design)."""
    count = len(names)
    zigzag = [index // 2 if index % 2 == 0 else -(index // 2) - 1 for index in range(count)]
    rows = [[names[(place + row) % count] for place in zigzag] for row in range(count)]
    return rows if count % 2 == 0 else rows + [row[::-1] for row in rows]


def figures(found: Mapping[str, list[Round]]) -> dict[str, float]:
    """Return medians, and medians of the ratios of each round."""
    result = {}
    for name, rounds in found.items():
        result[f"{name} rate"] = median(r.rate for r in rounds)
        if name != "direct":
            result[f"{name} cpu"] = median(r.cpu for r in rounds)
            result[f"{name}/direct"] = ratio(rounds, found["direct"], "rate")
    for peer in PEERS:
        if found.get(peer):
            result[f"pyproxy/{peer}"] = ratio(found["pyproxy"], found[peer], "rate")
            result[f"pyproxy/{peer} cpu"] = ratio(found["pyproxy"], found[peer], "cpu")
    return result


def ratio(ours: list[Round], theirs: list[Round], what: str) -> float:
    pairs = zip(ours, theirs, strict=True)
    return median(getattr(our, what) / getattr(their, what) for our, their in pairs)


def measure(options: argparse.Namespace) -> Figures:
    results: Figures = {}
    with ExitStack() as stack:
        backend = stack.enter_context(running("backend"))
        targets = {"direct": backend}
        targets["pyproxy"] = stack.enter_context(relays(backend.ports, options.workers))
        if shutil.which("haproxy"):
            targets["haproxy"] = stack.enter_context(haproxy(backend.ports, options.workers))
        if shutil.which("nginx") and (NGINX_MODULES / "ngx_stream_module.so").exists():
            targets["nginx"] = stack.enter_context(nginx(backend.ports))
        print("missing:", *(set(PEERS) - targets.keys()) or ["nothing"])
        for name, test in TESTS.items():
            if options.only in name:
                able = {k: t for k, t in targets.items() if t.ports.datagrams or "UDP" not in name}
                results[name] = figures(measured(test, able, options.rounds))
                show(name, test.words, results[name])
        if options.only in "stalled reader":
            results["stalled reader"] = stalled(targets)
    return results


def stalled(targets: Mapping[str, Target]) -> dict[str, float]:
    """Return the MiB that are on their way to a reader that reads nothing, and the proxy's part."""
    result = {}
    for name, target in targets.items():
        taken, grown = stalled_bytes(target)
        result[f"{name} MiB"] = taken / MIB
        if name != "direct":
            result[f"{name} memory MiB"] = grown / MIB
    words = " | ".join(f"{name} {size:.1f}" for name, size in result.items())
    print(f"stalled reader: {words}", flush=True)
    return result


def show(name: str, unit: str, found: Mapping[str, float]) -> None:
    print(f"{name}: direct {found['direct rate']:.2f} x {unit}/s")
    for proxy in ("pyproxy", *PEERS):
        if f"{proxy} rate" in found:
            line = f"  {proxy:<8}{found[f'{proxy} rate']:8.2f} x {unit}/s"
            line += f"{found[f'{proxy}/direct']:7.2f} of direct"
            line += f"{found[f'{proxy} cpu'] * 1000:9.1f} ms CPU for {unit}"
            if proxy != "pyproxy":
                line += f"   pyproxy has {found[f'pyproxy/{proxy}']:.2f} of its rate"
                line += f" for {found[f'pyproxy/{proxy} cpu']:.2f} of its CPU"
            print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--workers", type=int, default=1, help="of pyproxy, and HAProxy's threads")
    parser.add_argument("--only", default="", help="a word of the names of tests")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--chart", type=Path, help="a PNG; it needs the extra `bench`")
    options = parser.parse_args()
    results = measure(options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.chart:
        draw_ratios(results, ("pyproxy/haproxy", "pyproxy/nginx"), options.chart)


if __name__ == "__main__":
    main()
