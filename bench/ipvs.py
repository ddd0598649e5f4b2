"""Mode ipvs from plan to kernel, and its messages beside pyroute2's own API for IPVS.

python -m bench.ipvs [--quick] [--size 10000x10] [--json FILE]

Where the kernel has no ip_vs, it runs in a virtual machine, at about a tenth of the speed: ratios
are of two things in the same one.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._cluster import NODE_IP, PORT, TARGET_PORT, Cluster, service_name
from bench._lab import ROOT, make_network
from pyproxy.model import Address, Endpoint, Frontend, ServicePort, ServicePortName
from pyproxy.plan import Plan, PortPlan, Site, plan_port
from pyproxy.process import SystemClock, calm_collector
from pyproxy.proxier import _ipvsnl as nl
from pyproxy.proxier._ipvsnl import Ipvs
from pyproxy.proxier._ipvstarget import IpvsTarget
from pyproxy.proxier._nftarget import NfTarget
from pyproxy.proxier._vips import RTPROT_IPVS, Vips
from pyproxy.reconcile import Reconciler
from pyproxy.rules import ipvs_base, nftables
from pyproxy.rules.ipvs import Destination, Ruleset, Server, compile_owner
from pyproxy.topology import Place

SITE = Site(Place("node-a"), NODE_IP)
TABLE = nftables.Ruleset(4, pods=ip_network("10.128.0.0/9"), node_port_ips=(NODE_IP,))
RULESET = Ruleset(TABLE, (NODE_IP,))
GUEST_SECONDS = 1800
CHANGES = 7
ROUNDS = 3
PEERS_SERVICES = 30  # that pyroute2 makes: what it takes for one depends little on how many


class Counting(Ipvs):
    """A connection that counts what it was asked to do."""

    messages = 0

    def carry_out(self, requests):
        Counting.messages += len(requests)
        return super().carry_out(requests)

    def destinations(self, server):
        Counting.messages += 1
        return super().destinations(server)


class Figures(NamedTuple):
    """Of virtual servers, local routes and the table beside them together."""

    full_seconds: float
    full_us_per_message: float
    change_ms: float
    change_messages: float
    restart_seconds: float
    restart_messages: int  # of changes; to ask is one for each server


def main() -> None:
    options = arguments()
    if options.part:
        make_network()
        calm_collector()  # as the proxy does
        print(json.dumps(PARTS[options.part](Cluster(*options.size))))
        return
    go_where_ip_vs_is(options)
    size = "x".join(map(str, options.size))
    rounds = [(part("messages", size), part("pyroute2", size)) for _ in range(ROUNDS)]
    ours, theirs = map(min, zip(*rounds, strict=True))  # others on the machine only ever add
    mode = part("mode", size)
    results = {
        "size": size,
        "a message, us": {"pyproxy": ours, "pyroute2": theirs, "ratio": theirs / ours},
        "mode ipvs": mode
        | {"pyroute2 / a message of a full sync": theirs / mode["full_us_per_message"]},
    }
    print(json.dumps(results, indent=1))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def part(name: str, size: str):
    """Measure in a process and a network namespace of its own.

    What was deleted stays in the kernel for minutes, and each new destination is looked for there.
    """
    own = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    words = [*own, sys.executable, "-m", "bench.ipvs", f"--part={name}", f"--size={size}"]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def go_where_ip_vs_is(options: argparse.Namespace) -> None:
    """Go on in a virtual machine, where this kernel has no ip_vs."""
    try:
        Ipvs(4).close()
    except OSError as error:
        if options.here:
            raise SystemExit(f"the kernel has no ip_vs: {error.strerror}") from error
        os.chdir(ROOT)
        guest = [sys.executable, "-m", "tests.guest.vm", "--timeout", str(GUEST_SECONDS)]
        this = [sys.executable, "-m", "bench.ipvs", "--here", *sys.argv[1:]]
        os.execv(sys.executable, [*guest, *this])


# --- messages alone -------------------------------------------------------------------------------


def messages_us(cluster: Cluster) -> float:
    """Return what a message takes from addresses to the kernel's answer, in microseconds."""
    ipvs = Ipvs(4)
    started_at = perf_counter()
    requests = []
    for number in range(cluster.services):
        server = Frontend(cluster.cluster_ip(number), PORT, "TCP")
        requests.append(nl.new_server(server, Server("rr")))
        requests += [
            nl.new_destination(Destination(server, Address(ip, TARGET_PORT)), 1)
            for ip in cluster.endpoints(number)
        ]
    failed = ipvs.carry_out(requests)
    seconds = perf_counter() - started_at
    assert not failed
    assert len(ipvs.servers()) == cluster.services
    ipvs.close()
    return seconds / len(requests) * 1e6


def pyroute2_us(cluster: Cluster) -> float:
    """Return the same of pyroute2, for a part of the cluster."""
    from pyroute2 import IPVS, IPVSDest, IPVSService

    services = min(PEERS_SERVICES, cluster.services)
    flags = {"flags": nl.OURS, "mask": 0xFFFFFFFF}
    with IPVS() as ipvs:
        started_at = perf_counter()
        for number in range(services):
            ip = cluster.cluster_ip(number)
            server = IPVSService(addr=ip, port=PORT, protocol=6, sched_name="rr", flags=flags)
            ipvs.service("add", server)
            for ip in cluster.endpoints(number):
                ipvs.dest("add", server, IPVSDest(addr=ip, port=TARGET_PORT, fwd_method=0))
        seconds = perf_counter() - started_at
    mine = Ipvs(4)
    assert len(mine.servers()) == services
    mine.close()
    return seconds / (services * (1 + cluster.endpoints_per_service)) * 1e6


# --- the mode -------------------------------------------------------------------------------------


def mode(cluster: Cluster) -> dict[str, float]:
    return asyncio.run(measured(cluster))._asdict()


async def measured(cluster: Cluster) -> Figures:
    await synced(carrier_of_mode(), Plan(), set())  # the kernel loads its modules
    plan = Plan()
    for number in range(cluster.services):
        port = port_plan(cluster, number)
        plan.put(port.owner, port)
    carrier = carrier_of_mode()
    full, messages = await synced(carrier, plan, set(plan.ports))
    changes = []
    for _ in range(CHANGES):
        number = cluster.next_to_change()
        cluster.change()
        port = port_plan(cluster, number)
        plan.put(port.owner, port)
        changes.append(await synced(carrier, plan, {port.owner}))
    await carrier.aclose()
    restart, asked = await synced(carrier_of_mode(), plan, set(plan.ports))
    return Figures(
        full_seconds=full,
        full_us_per_message=full / messages * 1e6,
        change_ms=median(seconds for seconds, _count in changes) * 1000,
        change_messages=median(count for _seconds, count in changes),
        restart_seconds=restart,
        restart_messages=asked - cluster.services,
    )


def carrier_of_mode() -> Reconciler:
    clock = SystemClock()
    table = NfTarget(lambda: TABLE, base=ipvs_base)
    target = IpvsTarget(4, table, clock, connect)
    return Reconciler("ipvs", 4, partial(compile_owner, RULESET), target, clock)


def connect() -> tuple[Ipvs, Vips]:
    return Counting(4), Vips(4, NODE_IP, mark=RTPROT_IPVS)


async def synced(carrier: Reconciler, plan: Plan, changed: set[ServicePortName]):
    """Return the seconds and the messages to ip_vs that a sync took."""
    before, started_at = Counting.messages, perf_counter()
    report = await carrier.sync(plan, changed)
    seconds = perf_counter() - started_at
    assert report.error is None, report.error
    assert not report.unserved, report.unserved
    return seconds, Counting.messages - before


def port_plan(cluster: Cluster, number: int) -> PortPlan:
    owner = ServicePortName("default", service_name(number), "http", "TCP")
    port = ServicePort(name=owner, cluster_ip=cluster.cluster_ip(number), port=PORT)
    addresses = sorted(str(Address(ip, TARGET_PORT)) for ip in cluster.endpoints(number))
    endpoints = [Endpoint(Address(text.split(":")[0], TARGET_PORT)) for text in addresses]
    return plan_port(port, endpoints, SITE)


PARTS = {"messages": messages_us, "pyroute2": pyroute2_us, "mode": mode}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="300x5")
    parser.add_argument("--size", type=size, help="Services x endpoints")
    parser.add_argument("--json", type=lambda text: Path(text).absolute(), help="for the figures")
    parser.add_argument("--here", action="store_true", help="in no virtual machine")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.size = options.size or ((300, 5) if options.quick else (10_000, 10))
    return options


def size(text: str) -> tuple[int, int]:
    services, _, endpoints = text.partition("x")
    return int(services), int(endpoints)


if __name__ == "__main__":
    main()
