"""Mode iptables from plan to kernel, beside a rule set in the shape of kube-proxy's.

python -m bench.iptables [--quick] [--sizes nft:1000x10,legacy:10000x10] [--alone] [--json FILE]
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from msgspec import structs

from bench._cluster import NODE_IP, PORT, TARGET_PORT, Cluster, service_name
from bench._kernel import first_packet_us
from bench._lab import isolate, make_network
from pyproxy.model import Address, Endpoint, PortPlan, ServicePort, ServicePortName
from pyproxy.plan import Plan, Site, plan_port
from pyproxy.process import SystemClock, calm_collector
from pyproxy.proxier._flavour import FLAVOURS, programs_of, tables_with
from pyproxy.proxier._iptables import LOCK_SECONDS, Flavour, Iptables, run
from pyproxy.proxier._iptarget import IpTarget, remove, remove_chains
from pyproxy.reconcile import Reconciler
from pyproxy.rules.iptables import (
    EXTERNAL,
    FIREWALL,
    MARK_MASQ,
    NODE_PORTS,
    POSTROUTING,
    SERVICES,
    Items,
    Ruleset,
    comment,
    compile_owner,
    hashed,
)
from pyproxy.rules.iptables_base import (
    FORWARD,
    JUMPS,
    fixed_chains,
    forward_rules,
    to_node_ports,
)
from pyproxy.rules.iptables_layout import chains_of
from pyproxy.rules.iptables_text import founded, rewritten
from pyproxy.topology import Place

SITE = Site(Place("node-a"), NODE_IP)
RULESET = Ruleset(4, pods=ip_network("10.128.0.0/9"))
MARK = f"{RULESET.mark:#x}"
FILTER: Mapping[str, Sequence[str]] = {
    NODE_PORTS: (),
    SERVICES: (),
    EXTERNAL: (),
    FORWARD: forward_rules(RULESET),
    FIREWALL: (),
}
NAT: Mapping[str, Sequence[str]] = {
    SERVICES: (),  # comes with each sync
    NODE_PORTS: (),
    POSTROUTING: (
        f"-m mark ! --mark {MARK}/{MARK} -j RETURN",
        f"-j MARK --xor-mark {MARK}",
        f"{comment('kubernetes service traffic requiring SNAT')}-j MASQUERADE --random-fully",
    ),
    MARK_MASQ: (f"-j MARK --or-mark {MARK}",),
}
FIXED = [("filter", chain) for chain in FILTER] + [("nat", chain) for chain in NAT]
CHANGES = 11
LONGEST_SECONDS = 20  # for kube-proxy's; fewer have to do then
PAUSE_SECONDS = 0.05  # between changes, as at rest: the kernel frees what the last one replaced
MANY_ENDPOINTS = 1000  # of all Services: kube-proxy comments no rule for an endpoint then


class Case(NamedTuple):
    flavour: Flavour
    services: int
    endpoints: int

    def __str__(self) -> str:
        return f"{self.flavour} {self.services}x{self.endpoints}"


class Figures(NamedTuple):
    """Seconds to restore all rules, for the first sync, for one changed endpoint; and a packet."""

    restore_seconds: float
    full_seconds: float
    change_seconds: float
    first_packet_us: float


def main() -> None:
    options = arguments()
    isolate("bench.iptables")
    make_network()
    calm_collector()
    results = asyncio.run(measured(options.sizes, alone=options.alone))
    print(json.dumps(results, indent=1))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


async def measured(cases: list[Case], *, alone: bool) -> dict[str, dict[str, object]]:
    results: dict[str, dict[str, object]] = {}
    for case in cases:
        tables = tables_with(programs_of(4)[case.flavour])
        cluster = Cluster(case.services, case.endpoints)
        ips = [cluster.cluster_ip(number) for number in range(case.services)]
        ours = await with_pyproxy(tables, cluster, ips)
        await remove([tables], 4)
        results[str(case)] = {"pyproxy": rounded(ours)}
        if alone:
            continue
        theirs = await in_shape_of_kube_proxy(tables, cluster, ips)
        await remove([tables], 4)
        results[str(case)] |= {
            "kube-proxy's shape": rounded(theirs),
            "kube-proxy's shape / pyproxy": rounded(
                Figures(*(b / a for a, b in zip(ours, theirs, strict=True)))
            ),
        }
    return results


def rounded(figures: Figures) -> dict[str, float]:
    return {name: round(value, 3) for name, value in figures._asdict().items()}


# --- pyproxy --------------------------------------------------------------------------------------


async def with_pyproxy(tables: Iptables, cluster: Cluster, ips: list[str]) -> Figures:
    ruleset = structs.replace(RULESET, commented=tables.programs.flavour != "legacy")
    target = IpTarget(tables, lambda: ruleset)
    carrier = Reconciler("iptables", 4, partial(compile_owner, ruleset), target, SystemClock())
    plan = Plan()
    for number in range(cluster.services):
        port = port_plan(cluster, number)
        plan.put(port.owner, port)
    started_at = perf_counter()
    report = await carrier.sync(plan, set(plan.ports))
    full = perf_counter() - started_at
    assert report.error is None, report.error
    changes = []
    for _ in range(CHANGES):
        number = cluster.next_to_change()
        cluster.change()
        port = port_plan(cluster, number)
        plan.put(port.owner, port)
        await asyncio.sleep(PAUSE_SECONDS)
        started_at = perf_counter()
        await carrier.sync(plan, {port.owner})
        changes.append(perf_counter() - started_at)
    await target.aclose()
    packet_us = first_packet_us(ips)
    return Figures(await restoring(tables, ruleset, plan), full, median(changes), packet_us)


async def restoring(tables: Iptables, ruleset: Ruleset, plan: Plan) -> float:
    """Return how long the program takes for all rules, as kube-proxy's are restored."""
    await remove_chains(tables)
    items: Items = {}
    for port in plan.ports.values():
        items |= compile_owner(ruleset, port, {})
    lines = [line.text for line in rewritten(chains_of(ruleset, items))]
    await tables.restore(founded({}, fixed_chains(ruleset), JUMPS))
    started_at = perf_counter()
    await restored(tables, lines)
    return perf_counter() - started_at


def port_plan(cluster: Cluster, number: int) -> PortPlan:
    owner = ServicePortName("default", service_name(number), "http", "TCP")
    port = ServicePort(name=owner, cluster_ip=cluster.cluster_ip(number), port=PORT)
    addresses = sorted(str(Address(ip, TARGET_PORT)) for ip in cluster.endpoints(number))
    endpoints = [Endpoint(Address(text.split(":")[0], TARGET_PORT)) for text in addresses]
    return plan_port(port, endpoints, SITE)


# --- a rule set in the shape of kube-proxy's ------------------------------------------------------


async def in_shape_of_kube_proxy(tables: Iptables, cluster: Cluster, ips: list[str]) -> Figures:
    """Load the rules, and change an endpoint: its chains and all of the top level are rewritten.

    What kube-proxy has to do before it restores is not in it.
    A chain that is gone stays, as in large clusters, where kube-proxy looks for such once in a
    sync period.
    """
    await tables.restore(founded({}, FIXED, JUMPS))
    lines = text(cluster, list(range(cluster.services)))
    started_at = perf_counter()
    await restored(tables, lines)
    full = perf_counter() - started_at
    changes: list[float] = []
    while len(changes) < CHANGES and sum(changes) < LONGEST_SECONDS:
        number = cluster.next_to_change()
        cluster.change()
        lines = text(cluster, [number])
        await asyncio.sleep(PAUSE_SECONDS)
        started_at = perf_counter()
        await restored(tables, lines)
        changes.append(perf_counter() - started_at)
    return Figures(full, full, median(changes), first_packet_us(ips))


async def restored(tables: Iptables, lines: list[str]) -> None:
    """Restore as kube-proxy does: it starts the program each time."""
    name = tables.programs.restore
    options = ["--noflush", "--counters", "-w", LOCK_SECONDS]
    answer = await run([name, *options], "\n".join([*lines, ""]))
    assert answer.code == 0, answer.error


def text(cluster: Cluster, numbers: list[int]) -> list[str]:
    """Return the input of one sync: both tables, with the chains of these Services."""
    own = dict(entry for number in numbers for entry in chains(cluster, number))
    services = [dispatch(cluster, number) for number in range(cluster.services)]
    nat = {**NAT, SERVICES: [*services, *to_node_ports(RULESET)], **own}
    return [*table("filter", FILTER), *table("nat", nat)]


def table(name: str, chains: Mapping[str, Sequence[str]]) -> Iterator[str]:
    yield f"*{name}"
    yield from (f":{chain} - [0:0]" for chain in chains)
    for chain, rules in chains.items():
        yield from (f"-A {chain} {rule}" for rule in rules)
    yield "COMMIT"


def dispatch(cluster: Cluster, number: int) -> str:
    name, ip = service_name(number), cluster.cluster_ip(number)
    note = comment(f"default/{name}:http cluster IP")
    return f"{note}-m tcp -p tcp -d {ip} --dport {PORT} -j KUBE-SVC-{hashed(name)}"


def chains(cluster: Cluster, number: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the chain of a Service and those of its endpoints, each with its rules."""
    name, ip = service_name(number), cluster.cluster_ip(number)
    whose = f"default/{name}:http"
    is_commented = cluster.endpoint_count <= MANY_ENDPOINTS
    to_service = f"{comment(f'{whose} cluster IP')}-m tcp -p tcp -d {ip} --dport {PORT}"
    rules = [f"{to_service} ! -s {RULESET.pods} -j {MARK_MASQ}"]
    endpoints = cluster.endpoints(number)
    for left, endpoint in zip(range(len(endpoints), 0, -1), endpoints, strict=True):
        chain = f"KUBE-SEP-{hashed(name + endpoint)}"
        note = comment(f"{whose} -> {endpoint}:{TARGET_PORT}") if is_commented else ""
        share = f"-m statistic --mode random --probability {1 / left:0.10f} " if left > 1 else ""
        rules.append(f"{note}{share}-j {chain}")
        note = comment(whose) if is_commented else ""
        masquerading = f"{note}-s {endpoint} -j {MARK_MASQ}"
        to_endpoint = f"{note}-m tcp -p tcp -j DNAT --to-destination {endpoint}:{TARGET_PORT}"
        yield chain, [masquerading, to_endpoint]
    yield f"KUBE-SVC-{hashed(name)}", rules


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="300x5, in half a minute")
    parser.add_argument("--sizes", type=cases, help="flavour:Services x endpoints, with commas")
    parser.add_argument("--alone", action="store_true", help="without kube-proxy's shape")
    parser.add_argument("--json", type=lambda text: Path(text).absolute(), help="for the figures")
    options = parser.parse_args()
    default = "nft:300x5,legacy:300x5" if options.quick else "nft:1000x10,legacy:10000x10"
    options.sizes = options.sizes or cases(default)
    return options


def cases(text: str) -> list[Case]:
    found = []
    for word in text.split(","):
        flavour, _, size = word.partition(":")
        services, _, endpoints = size.partition("x")
        known = next(name for name in FLAVOURS if name == flavour)
        found.append(Case(known, int(services), int(endpoints)))
    return found


if __name__ == "__main__":
    main()
