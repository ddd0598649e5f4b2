"""Rules of others that may get hold of packets before ours: read from listings. No I/O.

A chain is walked from its hook on, and each rule has the limits of all jumps that lead to it. What
is not understood makes a rule partial: it is for some packets only, nobody knows which.
"""

import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address, ip_network, summarize_address_range
from typing import Any, Final, NamedTuple

from pyproxy.doctor.facts import Barrier, Kind, Limits
from pyproxy.ip import parse_network
from pyproxy.model import Family, Network
from pyproxy.rules.iptables_text import is_ours, parsed

DEEPEST: Final = 8  # jumps; what is behind more is not looked at
PROTOCOLS: Final = {"tcp": "TCP", "udp": "UDP", "sctp": "SCTP", "6": "TCP", "17": "UDP"}


class Step(NamedTuple):
    """What a rule does: it ends here with a verdict, or goes on in another chain."""

    limits: Limits
    kind: Kind | None
    jump: str
    text: str


class Start(NamedTuple):
    """A chain that the kernel calls."""

    chain: str
    hook: str
    priority: int


def walked(
    family: Family,
    where: str,
    chains: Mapping[str, Sequence[Step]],
    starts: Iterable[Start],
    is_end: Callable[[str], bool] = lambda chain: False,
) -> Iterator[Barrier]:
    """Yield what is reached from the hooks. A jump to an ``is_end`` chain ends the first chain."""

    def within(chain: str, limits: Limits, start: Start, depth: int) -> Iterator[Barrier]:
        for step in chains.get(chain, ()):
            narrowed = both(limits, step.limits)
            if step.jump and is_end(step.jump):
                return
            if step.jump and depth < DEEPEST:
                yield from within(step.jump, narrowed, start, depth + 1)
            if step.kind is not None:
                place = f"{where} {chain}"
                yield Barrier(
                    family, start.hook, start.priority, step.kind, narrowed, place, step.text
                )

    for start in starts:
        yield from within(start.chain, Limits(), start, 0)


def both(one: Limits, two: Limits) -> Limits:
    """Return the limits of a rule behind a jump. Two that differ in one respect are partial."""
    clash = any(
        a is not None and b is not None and a != b
        for a, b in zip(one[:3], two[:3], strict=True)
    )  # fmt: skip
    return Limits(
        two.destinations if two.destinations is not None else one.destinations,
        two.protocols if two.protocols is not None else one.protocols,
        two.ports if two.ports is not None else one.ports,
        one.is_local or two.is_local,
        one.is_partial or two.is_partial or clash,
    )


# --- iptables-save --------------------------------------------------------------------------------

TABLE_PRIORITY: Final = {"raw": -300, "mangle": -150, "nat": -100, "filter": 0}
HOOKS: Final = {"PREROUTING": "prerouting", "INPUT": "input", "OUTPUT": "output"}
TARGETS: Final[Mapping[str, Kind]] = {
    "DNAT": "nat", "REDIRECT": "nat", "DROP": "drop", "REJECT": "drop",
}  # fmt: skip
PORTS: Final = re.compile(r"(\d+(:\d*)?|:\d+)(,(\d+(:\d*)?|:\d+))*", re.ASCII)
HARMLESS_MATCHES: Final = {"tcp", "udp", "sctp", "comment", "multiport", "addrtype"}
BUILTIN: Final = {"ACCEPT", "RETURN", "MARK", "LOG", "CONNMARK", "NOTRACK", "CT", "TPROXY"}


def of_iptables(family: Family, flavour: str, text: str) -> list[Barrier]:
    """Read what ``iptables-save`` prints. Our chains, and kube-proxy's, are left out."""
    tables: dict[str, dict[str, list[Step]]] = {}
    for (table, chain), rules in parsed(text).items():
        tables.setdefault(table, {})[chain] = [step_of(chain, rule) for rule in rules]
    found: list[Barrier] = []
    for table, chains in tables.items():
        if table in TABLE_PRIORITY:
            starts = [Start(c, hook, TABLE_PRIORITY[table]) for c, hook in HOOKS.items()]
            others = {chain: steps for chain, steps in chains.items() if not is_ours(chain)}
            is_end = is_ours if table == "nat" else nobody
            where = f"iptables ({flavour}) IPv{family} {table}"
            found += walked(family, where, others, starts, is_end)
    return found


def nobody(_chain: str) -> bool:
    return False


def step_of(chain: str, rule: str) -> Step:
    """Understand a rule as ``iptables-save`` prints it."""
    limits, target, negated = Limits(), "", False
    words = iter(words_of(rule))
    for word in words:
        match word:
            case "!":
                negated = True
                continue
            case "-j" | "-g":
                target = next(words, "")
                break  # what follows are the target's own words
            case "-m":
                if next(words, "") not in HARMLESS_MATCHES:
                    limits = limits._replace(is_partial=True)
            case "--comment":
                next(words, "")
            case _ if negated:
                next(words, "")
                limits = limits._replace(is_partial=True)
            case _:
                limits = limited(limits, word, next(words, ""))
        negated = False
    kind = TARGETS.get(target)
    jump = "" if kind is not None or target in BUILTIN else target
    return Step(limits, kind, jump, f"-A {chain} {rule}")


def words_of(rule: str) -> list[str]:
    try:
        return shlex.split(rule)
    except ValueError:  # a quote without its fellow
        return rule.split()


def limited(limits: Limits, word: str, value: str) -> Limits:
    match word, value:
        case "-d", _ if (network := parse_network(value)) is not None:
            return limits._replace(destinations=(network,))
        case "-p", _ if value in PROTOCOLS:
            return limits._replace(protocols=(PROTOCOLS[value],))
        case (("--dport" | "--dports"), _) if PORTS.fullmatch(value):
            return limits._replace(ports=tuple(span(part) for part in value.split(",")))
        case "--dst-type", "LOCAL":
            return limits._replace(is_local=True)
        case _:
            return limits._replace(is_partial=True)


def span(text: str) -> tuple[int, int]:
    """Read ``80``, ``80:90``, ``:90`` and ``80:``."""
    first, colon, last = text.partition(":")
    return int(first or 0), int(last or (65535 if colon else first))


# --- nft --json -----------------------------------------------------------------------------------

FAMILIES: Final[Mapping[str, tuple[Family, ...]]] = {"ip": (4,), "ip6": (6,), "inet": (4, 6)}
NATS: Final = {"dnat", "redirect"}
DROPS: Final = {"drop", "reject"}
HARMLESS: Final = {"counter", "log", "comment", "mangle"}


def of_nft(items: Iterable[Mapping[str, Any]]) -> list[Barrier]:
    """Read the items of one table, as ``nft --json list table`` has them."""
    starts: list[Start] = []
    chains: dict[str, list[Step]] = {}
    name, families = "", ()  # type: str, tuple[Family, ...]
    for item in items:
        if (chain := item.get("chain")) is not None:
            families, name = (
                FAMILIES.get(chain["family"], ()),
                f"{chain['family']} {chain['table']}",
            )
            if "hook" in chain:
                starts.append(Start(chain["name"], chain["hook"], int(chain.get("prio", 0))))
        elif (rule := item.get("rule")) is not None:
            chains.setdefault(rule["chain"], []).append(nft_step(rule.get("expr", ())))
    return [
        barrier
        for family in families
        for barrier in walked(family, f"nft table {name}, chain", chains, starts)
    ]


def nft_step(expressions: Iterable[Mapping[str, Any]]) -> Step:
    limits, kind, jump, words = Limits(), None, "", []  # type: Limits, Kind | None, str, list[str]
    for expression in expressions:
        for name, value in expression.items():
            if name == "match":
                limits = nft_limited(limits, value)
                words.append(shown(value))
            elif name in ("jump", "goto"):
                jump = value["target"]
            elif name in NATS or name in DROPS:
                kind = "nat" if name in NATS else "drop"
                words.append(name)
            elif name not in HARMLESS and name not in ("accept", "return"):
                limits = limits._replace(is_partial=True)
                words.append(f"({name})")
    return Step(limits, kind, jump, " ".join(words))


def nft_limited(limits: Limits, match: Mapping[str, Any]) -> Limits:
    left, right = match["left"], match["right"]
    partial = limits._replace(is_partial=True)
    if match.get("op", "==") not in ("==", "in"):
        return partial
    field = name_of(left)
    values = values_of(right)
    try:
        match field.split():
            case ["ip" | "ip6", "daddr"]:
                nets = tuple(net for value in values for net in nets_of(value))
                return limits._replace(destinations=nets)
            case ["meta", "l4proto"] | ["ip", "protocol"] | ["ip6", "nexthdr"]:
                protocols = tuple(PROTOCOLS[str(value)] for value in values)
                return limits._replace(protocols=protocols)
            case [protocol, "dport"]:
                own = (PROTOCOLS[protocol],) if protocol != "th" else limits.protocols
                ports = tuple(ports_of(value) for value in values)
                return limits._replace(protocols=own, ports=ports)
            case ["fib", "type"] if values == ["local"]:
                return limits._replace(is_local=True)
            case ["meta", "nfproto"]:
                return limits
            case _:
                return partial
    except (ValueError, KeyError, TypeError):  # a named set, a constant: not known here
        return partial


def name_of(left: object) -> str:
    """Return what an expression looks at, such as ``ip daddr``."""
    match left:
        case {"payload": {"protocol": protocol, "field": field}}:
            return f"{protocol} {field}"
        case {"meta": {"key": key}}:
            return f"meta {key}"
        case {"fib": {"result": result, "flags": flags}} if "daddr" in flags:
            return f"fib {result}"
        case {"ct": {"key": key}}:
            return f"ct {key}"
        case _:
            return "?"


def values_of(right: object) -> Sequence[object]:
    match right:
        case {"set": [*values]}:
            return values
        case _:
            return [right]


def nets_of(value: object) -> Collection[Network]:
    match value:
        case str():
            return (ip_network(value),)
        case {"prefix": {"addr": address, "len": length}}:
            return (ip_network(f"{address}/{length}"),)
        case {"range": [first, last]}:
            return tuple(summarize_address_range(ip_address(first), ip_address(last)))
        case _:
            raise ValueError(value)


def ports_of(value: object) -> tuple[int, int]:
    match value:
        case int():
            return value, value
        case {"range": [int(first), int(last)]}:
            return first, last
        case _:
            raise ValueError(value)


def shown(match: Mapping[str, Any]) -> str:
    return f"{name_of(match['left'])} {', '.join(map(one, values_of(match['right'])))}"


def one(value: object) -> str:
    match value:
        case {"prefix": {"addr": address, "len": length}}:
            return f"{address}/{length}"
        case {"range": [first, last]}:
            return f"{first}-{last}"
        case _:
            return str(value)
