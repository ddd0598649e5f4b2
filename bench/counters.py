"""What it costs mode nftables to count connections by Service and endpoint, beside not counting.

python -m bench.counters [--services 1000] [--endpoints 10] [--rounds 3]
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._apiserver import ApiServer
from bench._cluster import Cluster
from bench._kernel import first_packet_us
from bench._lab import isolate, make_network, metric, proxy, warm_up
from bench.nftables import DELETE_TABLES, FULL_SYNC, nft, vips

SETTINGS = ("off", "service", "endpoint")


async def measured(api: ApiServer, cluster: Cluster, setting: str) -> dict[str, float]:
    """Start a proxy that counts so; return what a packet, a sync and a scrape cost."""
    with tempfile.TemporaryDirectory() as folder:
        lines = f"serviceMetrics: '{setting}'\n"
        async with proxy(api.url, Path(folder), settings=lines) as run:
            sync = await asyncio.to_thread(metric, FULL_SYNC)
            packet = await asyncio.to_thread(first_packet_us, vips(cluster))
            started_at = perf_counter()
            await asyncio.to_thread(metric, FULL_SYNC)
            scrape = perf_counter() - started_at
            peak = run.cost().peak_mib
    nft(DELETE_TABLES)
    return {"first packet, us": packet, "first sync, s": sync, "scrape, s": scrape,
            "peak RSS, MiB": peak}  # fmt: skip


async def measure(services: int, endpoints: int, rounds: int) -> None:
    """Take turns, so that who else uses the machine disturbs all alike; the least counts."""
    cluster = Cluster(services, endpoints)
    found: dict[str, list[dict[str, float]]] = {setting: [] for setting in SETTINGS}
    async with ApiServer(cluster.lists()).serve() as api:
        for _ in range(rounds):
            for setting in SETTINGS:
                found[setting].append(await measured(api, cluster, setting))
    print(f"{services} Services of {endpoints} endpoints, the least of {rounds} rounds")
    for name in found["off"][0]:
        least = {setting: min(each[name] for each in found[setting]) for setting in SETTINGS}
        figures = [f"{s} {v:.3g} ({v / least['off']:.2f}x)" for s, v in least.items()]
        print(f"{name}: {', '.join(figures)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--services", type=int, default=1000)
    parser.add_argument("--endpoints", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    isolate("bench.counters")
    make_network()
    warm_up()
    asyncio.run(measure(options.services, options.endpoints, options.rounds))


if __name__ == "__main__":
    main()
