"""A scenario file: a node and objects, and what becomes of them as lines of text."""

import re
from pathlib import Path
from typing import NamedTuple

import yaml

from pyproxy.config import Config
from pyproxy.manifests.resolve import Memory, resolve
from pyproxy.manifests.resolve import Settings as ManifestSettings
from pyproxy.model import Forward
from pyproxy.render import Settings, by_owner, scenes
from tests.manifest_builders import DUAL, rules_text

FOLDER = Path(__file__).parent
FILES = sorted(FOLDER.glob("*.yaml"))
PODS = "10.244.0.0/16,fd00:10:244::/48"
NODE_IPS = ("192.0.2.11", "fd00:c0de::11")
ORIGINS = ("pod", "node", "outside")


class Scenario(NamedTuple):
    title: str
    objects: dict  # by kind, as a source gives them
    settings: Settings
    then: dict


def read(path):
    """Return what a file says. Its objects are manifests, and must be without fault."""
    told = yaml.safe_load(path.read_text())
    node = told.get("node", {})
    name = node.get("name", "here")
    documents = (*told["given"], node_manifest(name, node.get("zone", "")))
    found = resolve({path.name: documents}, Memory(), ManifestSettings(name, DUAL))
    assert not found.faults, found.faults
    settings = Settings(name, Config(cluster_cidr=PODS))
    return Scenario(told["title"], found.objects(), settings, told.get("then", {}))


def node_manifest(name, zone):
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
        "status": {"addresses": [{"type": "InternalIP", "address": ip} for ip in NODE_IPS]},
    }


def rewrite(path, then):
    """Put another end to a file; what comes before it stays as people wrote it."""
    head = path.read_text().partition("\nthen:")[0].rstrip()
    blocks = [f"  {name}: |\n{indented(text)}" for name, text in then.items()]
    path.write_text(f"{head}\nthen:\n{''.join(blocks)}")


def indented(text):
    return "".join(f"    {line}\n" if line else "\n" for line in text.splitlines())


def outcome(scenario):
    """Return the ``then`` part as it is now."""
    return {
        "plan": plan_text(scenario),
        "nftables": summary(scenario, "nftables", nft_entries),
        "iptables": summary(scenario, "iptables", iptables_entries),
    }


# --- the plan -------------------------------------------------------------------------------------


def plan_text(scenario):
    rows, conflicts = [], ""
    for scene in scenes("nftables", scenario.objects, scenario.settings):
        for port in by_owner(scene.plan):
            for route in port.routes:
                rows += [(str(route.frontend), *row) for row in treatments(route)]
        conflicts += "".join(
            f"{line}\n" for lines in scene.plan.conflicts.values() for line in lines
        )
    return aligned(rows) + conflicts


def treatments(route):
    """Yield for whom, and what."""
    actions = {origin: getattr(route, f"from_{origin}") for origin in ORIGINS}
    groups = {}
    for origin, action in actions.items():
        groups.setdefault(action_text(action), []).append(origin)
    within = ""
    if route.allowed_sources is not None:
        within = f" in {', '.join(map(str, route.allowed_sources))}"
        yield "everybody else", "drop"
    for text, origins in groups.items():
        yield ("everybody" if len(origins) == 3 else ", ".join(origins)) + within, text


def action_text(action):
    if not isinstance(action, Forward):
        return type(action).__name__.lower()
    pool = action.pool
    backends = ", ".join(
        f"{b.address}" if b.weight == 1 else f"{b.address} x{b.weight}" for b in pool.backends
    )
    affinity = f", the same for {pool.affinity_seconds} s" if pool.affinity_seconds else ""
    return f"-> {backends}{affinity}{' masqueraded' if action.masquerade else ''}"


def aligned(rows):
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in padded)


# --- rules ----------------------------------------------------------------------------------------


def summary(scenario, mode, entries):
    """Return what there is on account of the objects: not what always is."""
    empty = {kind: found for kind, found in scenario.objects.items() if kind == "Node"}
    empty["ServiceCIDR"] = scenario.objects["ServiceCIDR"]
    always = set(entries(rules_text(mode, empty, scenario.settings)))
    found = entries(rules_text(mode, scenario.objects, scenario.settings))
    return aligned([entry for entry in found if entry not in always])


def nft_entries(text):
    """Yield family, chain or set, and line for each rule, element and declared time-out."""
    family = block = ""
    for line in text.splitlines():
        if opened := re.match(r"table (\S+) \S+ \{", line):
            family = opened[1]
        elif opened := re.match(r"\t(?:set |map |(?=chain ))(.+) \{", line):
            block = opened[1]
        elif line.startswith("\t\t\t"):
            yield family, block, line.strip().removesuffix(",")
        elif line.startswith("\t\t" if block.startswith("chain ") else "\t\ttimeout"):
            yield family, block, line.strip()


def iptables_entries(text):
    """Yield program, table or set, chain and rule; of a set, its members."""
    program = table = ""
    for line in text.splitlines():
        if opened := re.match(r"# for (\S+)-restore", line):
            program = opened[1]
        elif line.startswith("*"):
            table = line[1:]
        elif member := re.match(r"# ipset add (\S+) (.+)", line):
            yield program, "ipset", *member.groups()
        elif rule := re.match(r"-A (\S+) (.+)", line):
            yield program, table, *rule.groups()
