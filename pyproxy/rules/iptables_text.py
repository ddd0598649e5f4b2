"""The text that ``iptables-save`` prints and ``iptables-restore`` reads."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from pyproxy.rules.iptables import EXTERNAL, FIREWALL, MARK_MASQ, NODE_PORTS, POSTROUTING, SERVICES
from pyproxy.rules.iptables_base import (
    ANTI_SPOOF,
    CANARY,
    FORWARD,
    HOST_FIREWALL,
    TABLES,
    Jump,
    Place,
)

Rules = Mapping[Place, tuple[str, ...]]
is_of_owner = re.compile(r"KUBE-(?:SVC|SVL|EXT|FW|SEP|T)-[0-9A-Z]+").fullmatch
TARGET = re.compile(r" -[jg] (\S+)")
SHARED = frozenset({
    SERVICES, EXTERNAL, NODE_PORTS, FIREWALL, FORWARD, POSTROUTING, MARK_MASQ, CANARY,
})  # fmt: skip


class Line(NamedTuple):
    """A line of input, and which chain it is about; empty for the words around."""

    text: str
    place: Place | None = None
    rule: str = ""


def from_bytes(output: bytes) -> str:
    """Return the text of bytes, which ``to_bytes`` gives back: comments of others may be any."""
    return output.decode(errors="surrogateescape")


def to_bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def is_ours(chain: str) -> bool:
    """Say whether a chain is ours, or kube-proxy's in mode iptables, to rewrite and to delete."""
    return chain in SHARED or is_of_owner(chain) is not None


def parsed(text: str) -> dict[Place, tuple[str, ...]]:
    """Return what is there: the rules of every chain, without the chain's name."""
    rules: dict[Place, list[str]] = {}
    table = ""
    for line in text.split("\n"):  # splitlines would split comments, at more characters than this
        if line.startswith("-A "):
            _, chain, rule = line.split(" ", 2)
            rules[table, chain].append(rule)
        elif line.startswith(":"):
            rules[table, line[1:].split(" ", 1)[0]] = []
        elif line.startswith("*"):
            table = line[1:].strip()
    return {place: tuple(found) for place, found in rules.items()}


def counted(text: str) -> Iterator[tuple[Place, str, int]]:
    """Yield chain, rule and packets of what ``iptables-save --counters`` prints."""
    table = ""
    for line in text.split("\n"):
        if line.startswith("["):
            counts, _, chain, rule = line.split(" ", 3)
            yield (table, chain), rule, int(counts[1:].partition(":")[0])
        elif line.startswith("*"):
            table = line[1:].strip()


def target_of(rule: str) -> str:
    """Return the chain or the verdict that a rule leads to."""
    found = TARGET.findall(" " + rule)
    return found[-1] if found else ""


# --- what makes things so -------------------------------------------------------------------------


def rewritten(chains: Mapping[Place, tuple[str, ...] | None]) -> list[Line]:
    """Return the input that gives each chain these rules, whatever it had; None deletes it."""
    lines: list[Line] = []
    for table in TABLES:
        own = {place: rules for place, rules in chains.items() if place[0] == table}
        if not own:
            continue
        lines.append(Line(f"*{table}"))
        lines += [Line(f":{place[1]} - [0:0]", place) for place in own]
        for place, rules in own.items():
            name = place[1]
            lines += [Line(f"-A {name} {rule}", place, rule) for rule in rules or ()]
        lines += [Line(f"-X {place[1]}", place) for place, rules in own.items() if rules is None]
        lines.append(Line("COMMIT"))
    return lines


def founded(there: Rules, chains: Collection[Place], jumps: Sequence[Jump]) -> list[str]:
    """Return the input that adds the chains and jumps that are missing, and nothing else."""
    lines: list[str] = []
    for table in TABLES:
        own = [f":{chain} - [0:0]" for t, chain in chains if t == table and (t, chain) not in there]
        wanted = [jump for jump in jumps if jump.table == table]
        if any(jump.rule.endswith(f"-j {HOST_FIREWALL}") for jump in wanted):
            own += host_firewall(there)
        own += [
            f"-I {jump.chain} {jump.rule}"
            for jump in wanted
            if jump.rule not in there.get((table, jump.chain), ())
        ]
        if own:
            lines += [f"*{table}", *own, "COMMIT"]
    return lines


def host_firewall(there: Rules) -> list[str]:
    """Return what the chain needs that we share with kubelet. To declare it would empty it."""
    rules = there.get(("filter", HOST_FIREWALL))
    declared = [f":{HOST_FIREWALL} - [0:0]"] if rules is None else []
    missing = ANTI_SPOOF not in (rules or ())
    return [*declared, *([f"-A {HOST_FIREWALL} {ANTI_SPOOF}"] if missing else [])]


def cleared(there: Rules) -> list[str]:
    """Return the input that removes all chains of ours and every jump to them."""
    lines: list[str] = []
    for table in sorted({table for table, _chain in there}):
        chains = [chain for t, chain in there if t == table and is_ours(chain)]
        if not chains:
            continue
        lines.append(f"*{table}")
        lines += [f":{chain} - [0:0]" for chain in chains]
        lines += [f"-D {chain} {rule}" for chain, rule in foreign_jumps(there, table, chains)]
        lines += [f"-X {chain}" for chain in chains]
        lines.append("COMMIT")
    return lines


def silenced(there: Rules) -> list[str]:
    """Return the input that removes every jump to our chains, which stay: no packet meets them."""
    return _jumping(there, "-D {} {}".format)


def woken(there: Rules) -> list[str]:
    """Return the input that puts back, at the front, what ``silenced`` removes."""
    return _jumping({place: rules[::-1] for place, rules in there.items()}, "-I {} {}".format)


def _jumping(there: Rules, line: Callable[[str, str], str]) -> list[str]:
    lines: list[str] = []
    for table in sorted({table for table, _chain in there}):
        chains = [chain for t, chain in there if t == table and is_ours(chain)]
        if jumps := [line(*jump) for jump in foreign_jumps(there, table, chains)]:
            lines += [f"*{table}", *jumps, "COMMIT"]
    return lines


def foreign_jumps(there: Rules, table: str, chains: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the rules of other chains that lead to one of these."""
    ours = set(chains)
    for (t, chain), rules in there.items():
        if t == table and chain not in ours:
            yield from ((chain, rule) for rule in rules if target_of(rule) in ours)
