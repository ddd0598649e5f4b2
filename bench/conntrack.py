"""Delete 100 stale UDP flows among many: seconds, and the ratio to conntrack(8) doing the same.

python bench/conntrack.py [ENTRIES ...]      as root: it runs in a network namespace of its own
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1]))

from pyproxy.model import Address, Family, Frontend
from pyproxy.proxier._conntrack import Conntrack, clean
from pyproxy.rules.flows import Review
from pyproxy.rules.listeners import Surroundings
from tests.netns.tracked import inject

ROUNDS = 3
STALE = 100
PREFIX: dict[Family, str] = {4: "10.96.0.", 6: "fd00:10:96::"}
DEAD: dict[Family, Address] = {4: Address("10.244.9.9", 5353), 6: Address("fd00:244::9", 5353)}
ALIVE: dict[Family, Address] = {4: Address("10.244.1.1", 5353), 6: Address("fd00:244::1", 5353)}


def client(family: Family, number: int) -> Address:
    if family == 6:
        return Address(f"fd00:c::{number >> 16:x}:{number & 0xFFFF:x}", 40000)
    return Address(f"172.{16 + (number >> 16)}.{number >> 8 & 255}.{number & 255}", 40000)


def stale_flows(family: Family, services: int) -> list[tuple]:
    """The flows to delete, spread over the services."""
    return [
        (
            "UDP",
            client(family, n),
            Address(f"{PREFIX[family]}{1 + n % services}", 53 + n % services),
            DEAD[family],
        )
        for n in range(STALE)
    ]


def other_flows(family: Family, count: int) -> list[tuple]:
    """As many flows of other Services, on other ports."""
    vips = [Address(f"{PREFIX[family]}{100 + n}", 1000 + n) for n in range(100)]
    return [("UDP", client(family, n), vips[n % 100], ALIVE[family]) for n in range(STALE, count)]


def ours(family: Family, services: int) -> int:
    frontends = [Frontend(f"{PREFIX[family]}{1 + n}", 53 + n, "UDP") for n in range(services)]
    review = Review(dict.fromkeys(frontends, frozenset({ALIVE[family]})), {})
    return clean(Conntrack(family), review, Surroundings())


def theirs(family: Family, services: int) -> int:
    deleted = 0
    for number in range(services):
        command = ["conntrack", "-D", "-f", f"ipv{family}", "-p", "udp"]
        command += [
            "--orig-dst",
            f"{PREFIX[family]}{1 + number}",
            "--orig-port-dst",
            f"{53 + number}",
        ]
        command += ["--reply-src", DEAD[family].ip]
        done = subprocess.run(command, capture_output=True, text=True)
        deleted += len(done.stdout.splitlines())
    return deleted


def shortest(family: Family, services: int, run: Callable[[Family, int], int]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        inject(stale_flows(family, services))
        started_at = perf_counter()
        deleted = run(family, services)
        seconds.append(perf_counter() - started_at)
        assert deleted == STALE, f"{run.__name__} deleted {deleted}"
    return min(seconds)


def main(counts: Sequence[int]) -> None:
    families: tuple[Family, ...] = (4, 6)
    for count in counts:
        for family in families:
            inject(other_flows(family, count))
            for services in (1, 10):
                mine = shortest(family, services, ours)
                line = f"IPv{family}, {count} entries, {services} of the Services: {mine:.3f} s"
                if shutil.which("conntrack"):
                    other = shortest(family, services, theirs)
                    line += f"; conntrack(8) {other:.3f} s; ratio {mine / other:.2f}"
                print(line, flush=True)
            table = Conntrack(family)
            table.delete(list(table.flows([Frontend("", 1000 + n, "UDP") for n in range(100)])))


if __name__ == "__main__":
    if not os.environ.get("PYPROXY_BENCH_ISOLATED"):
        os.environ["PYPROXY_BENCH_ISOLATED"] = "yes"
        isolated = ["unshare", "--net", "--map-root-user", sys.executable, *sys.argv]
        os.execvp(isolated[0], isolated)
    main([int(text) for text in sys.argv[1:]] or [10_000, 100_000])
