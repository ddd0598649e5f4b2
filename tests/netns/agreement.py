"""Asks every frontend from everywhere, and holds what comes back against ``pyproxy explain``.

A program of its own, as it cannot leave its namespaces: ``python -m tests.netns.agreement MODE``
prints the disagreements as JSON, and what the commands said; with the word ``briefly``, less.
"""

import asyncio
import json
import subprocess
import sys
from tempfile import TemporaryDirectory

from pyproxy.commands._ask import Daemon
from pyproxy.demo.cluster import CLUSTER_CIDRS, NODES
from pyproxy.demo.expect import HERE, ORIGINS
from pyproxy.demo.traffic import ask
from pyproxy.explain import Explanation
from pyproxy.listing import Routes
from pyproxy.model import Address
from pyproxy.traffic import TrafficCounts
from pyproxy.written import Verification
from tests.netns.stage import folder_of, isolated, staged

REQUESTS, FEW = 12, 2
SILENCE_SECONDS = 0.5
PATIENCE_SECONDS = 10.0  # with who will answer, on a machine that is busy
NODE_IP = NODES[0].machine.ips[0]
BEYOND = {"timed out"}, {"unreachable"}  # the lab has no load balancer
OTHER = {"nftables": "iptables", "iptables": "userspace", "userspace": "nftables"}
REASONS = ("rejected", "dropped", "denied")
RESULTS = {
    "forward": ({"ok"},),
    "reject": ({"refused"},),
    "drop": ({"timed out"},),
    "pass": BEYOND,
}


async def compared(stage, most):
    """Return what explain and the traffic disagree about, and how many connections were made.

    Of each that is forwarded, ``most`` connections are made.
    """
    daemon = Daemon(str(stage.socket))
    routes = await asyncio.to_thread(daemon.ask, "routes", Routes, {})
    disagreements, count = [], 0
    for row in routes.items:
        where = destination(row.frontend)
        for origin in ORIGINS:
            sender = next(iter(sorted(ip for ip in origin.ips if (":" in ip) == (":" in where.ip))))
            query = {"from": sender, "to": str(where)}
            answer = await asyncio.to_thread(daemon.ask, "explain", Explanation, query)
            case = answer.frontends[0].cases[0]
            forwards = case.action == "forward"
            requests, seconds = (most, PATIENCE_SECONDS) if forwards else (2, SILENCE_SECONDS)
            sockets = [stage.lab.socket(origin.namespace, where.ip) for _ in range(requests)]
            replies = await asyncio.gather(*(ask(sock, where, seconds) for sock in sockets))
            count += requests
            told = {"asked": f"{origin.name} {where}", "case": case.action, "reason": case.reason}
            disagreements += [told | {"wrong": text} for text in wrong(case, origin, replies)]
    return disagreements, count


def wrong(case, origin, replies):
    results = {reply.result for reply in replies}
    if results not in RESULTS[case.action]:
        yield f"came back: {sorted(results)}"
    pods = {share.pod for share in case.endpoints if share.probability}
    if not {reply.pod for reply in replies if reply.pod} <= pods:
        yield f"answered: {sorted({reply.pod for reply in replies})}, not only {sorted(pods)}"
    seen = {reply.client for reply in replies if reply.client}
    allowed = HERE.ips if case.masquerade else origin.ips
    if not seen <= allowed:
        yield f"seen as {sorted(seen)}, masquerade {case.masquerade}"


def destination(frontend):
    where = frontend.partition("/")[0]
    host, _, port = where.rpartition(":")
    return Address(NODE_IP if host == "node" else host.strip("[]"), int(port))


async def refusals(stage):
    """Return which reasons not to forward each Service has had, as they are counted."""
    daemon = Daemon(str(stage.socket))
    answer = await asyncio.to_thread(daemon.ask, "traffic", TrafficCounts, {})
    return {
        f"{row.namespace}/{row.service}": reasons
        for row in answer.items
        if (reasons := [name for name in REASONS if getattr(row, name)])
    }


async def verdicts(stage):
    daemon = Daemon(str(stage.socket))
    routes = await asyncio.to_thread(daemon.ask, "routes", Routes, {})
    found = {}
    for name in sorted({f"{row.namespace}/{row.service}" for row in routes.items}):
        answer = await asyncio.to_thread(daemon.ask, "verify", Verification, {"service": name})
        found[name] = [
            (f.family, f.verdict, [(d.entry, d.wanted, d.held) for d in f.differences], f.problem)
            for f in answer.families
        ]
    return found


WORDS = {
    "services": ("get", "services"),
    "apart": ("explain", "service/shop/apart"),
    "nobody": ("explain", "service/default/nobody-home"),
    "inner": ("explain", "service/shop/inner"),
    "fenced": ("explain", "--from", "192.0.2.50", "--to", "198.18.0.21:80"),
    "proxied": ("explain", "--from", "pod/default/nginx-1", "--to", "198.18.0.22:80"),
    "heads": ("explain", "service/default/heads"),
    "conflicts": ("get", "conflicts"),
    "endpoints": ("get", "endpoints", "shop/apart"),
    "routes": ("get", "routes"),
    "wait": ("wait", "service/shop/apart", "--for=programmed"),
    "wait for two": ("wait", "service/shop/apart", "--for=endpoints=2", "--timeout=300ms"),
    "wait for nothing": ("wait", "service/shop/never", "--for=absent"),
    "top": ("top", "-n1", "--interval=600ms"),
    "top of endpoints": ("top", "--by=endpoint", "-n1", "--interval=600ms"),
    "json": ("explain", "service/shop/apart", "-o", "json"),
}


async def differences(stage, mode):
    """Return what ``diff`` says of what is, of a stricter policy, and of another mode."""
    words = ("diff", "--node-name", NODES[0].name, "--cluster-cidr", ",".join(CLUSTER_CIDRS))
    local = stage.stricter()
    as_json = (*words, "-o", "json", "--mode")
    return {
        "same": await stage.command(*as_json, mode, "-f", "manifests"),
        "local": await stage.command(*as_json, mode, "-f", local),
        "moved": await stage.command(*as_json, OTHER[mode], "-f", "manifests"),
        "all": await stage.command(*as_json, mode, "-f", "manifests", "--masquerade-all"),
        "text": await stage.command(*words, "--mode", mode, "-f", local, "--entries"),
    }


async def changed(stage):
    """Change manifests while ``wait`` waits; return how it ended."""
    extra = stage.manifests / "extra.yaml"
    text = extra.read_text()
    async with asyncio.TaskGroup() as tasks:
        words = ("wait", "service/shop/apart", "--for=absent", "--timeout=20s")
        waiting = tasks.create_task(stage.command(*words))
        await asyncio.sleep(0.5)
        extra.write_text(text.partition("---\n")[2].partition("---\n")[2])
    gone = waiting.result()
    extra.write_text(text)
    back = await stage.command("wait", "service/shop/apart", "--for=endpoints=1", "--timeout=20s")
    return {"gone": gone, "back": back}


async def tampered(stage, mode):
    """Break one thing behind the proxy's back, and return what commands say of it."""
    with stage.lab.inside(NODES[0].name):
        break_in(mode)
    explained = await stage.command("explain", "service/shop/apart")
    return {
        "explain": explained,
        "reported": await stage.command("audit", "--repair=false"),
        "repaired": await stage.command("audit"),
        "later": await agreeing(stage),
    }


async def agreeing(stage):
    """Return what diff says once it finds nothing, or at last."""
    for _ in range(50):
        found = await stage.command("diff")
        if found.code == 0:
            break
        await asyncio.sleep(0.2)
    return found


def break_in(mode):
    for words in BREAKS[mode]:
        command(*words)


def command(*words):
    with subprocess.Popen(words) as process:
        assert process.wait() == 0, words


async def noticed(stage, mode):
    """Say whether it is told, as an Event and in the log, that somebody else changed rules."""
    if mode == "nftables":
        with stage.lab.inside(NODES[0].name):
            command("nft", "delete", "element", "ip", "pyproxy", "cluster-ips", "{ 10.96.0.20 }")
    for _ in range(100):
        log = stage.log.read_text()
        if "RulesChanged" in log and "our rules were changed" in log:
            return True
        await asyncio.sleep(0.1)
    return False


BREAKS = {  # mode nftables mends itself at once: its tests look without a daemon
    "nftables": [],
    "iptables": [("ipset", "del", "PYPROXY-CLUSTER-IPS", "10.96.0.20,tcp:80")],
    "userspace": [("ip", "route", "del", "local", "10.96.0.20", "table", "local")],
}


async def told(lab, mode, folder):
    async with staged(lab, folder, mode) as stage:
        await stage.command("wait", "service/default/weighted")
        disagreements, count = await compared(stage, REQUESTS)
        return {
            "disagreements": disagreements,
            "count": count,
            "refusals": await refusals(stage),
            "verdicts": await verdicts(stage),
            "commands": {name: await stage.command(*words) for name, words in WORDS.items()},
            "differences": await differences(stage, mode),
            "waited": await changed(stage),
            "tampered": await tampered(stage, mode),
            "noticed": await noticed(stage, mode),
        }


async def briefly(lab, mode, folder):
    """Return the same but for the commands, of few connections: a guest takes ten times as long."""
    async with staged(lab, folder, mode) as stage:
        disagreements, count = await compared(stage, FEW)
        return {
            "disagreements": disagreements,
            "count": count,
            "refusals": await refusals(stage),
            "verdicts": await verdicts(stage),
        }


def main(mode, how="at length"):
    lab = isolated()
    asked = briefly if how == "briefly" else told
    with TemporaryDirectory(prefix="pyproxy-see-") as folder:
        print(json.dumps(asyncio.run(asked(lab, mode, folder_of(folder)))))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
