"""Looks at what takes longer: what the kernel can, and the rules of everybody on this node."""

import ctypes
import gzip
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from pyproxy import proxier
from pyproxy.config import Config
from pyproxy.doctor import barriers
from pyproxy.doctor.facts import KUBE_PROXY_TABLE, Barrier, Facts, Link, Module, Served
from pyproxy.doctor.look import CannotLookError, Looked, attempted
from pyproxy.model import FAMILIES, Frontend
from pyproxy.proxier import _capture, _iptc
from pyproxy.proxier._conntrack import Conntrack
from pyproxy.proxier._flavour import answer_of, census, chosen_flavour, programs_of
from pyproxy.proxier._socketlb_site import Off, chosen_cgroup
from pyproxy.rules.iptables_text import is_of_owner, parsed
from pyproxy.rules.nft_base import TABLE_NAME

FILLING: Final = 0.5  # of the table of connections: from then on, it is told whose they are
TIME_ERROR: Final = 5  # adjtimex(2): the clock is not synchronised
IPTABLES_TABLES: Final = {"raw", "mangle", "nat", "filter", "security"}


def thoroughly(facts: Facts, config: Config) -> Facts:
    """Return more facts: what others have written, what the kernel can. It may take seconds."""
    mode = facts.mode
    facts, reason = attempted(facts, f"mode {mode}", proxier.load(mode).unsupported, None)
    names = proxier.modes() if reason is not None else ()
    others = {name: proxier.load(name).unsupported() for name in names if name != mode}
    facts = replace(
        facts,
        unsupported={mode: reason} | others,
        modules=modules(Looked(), os.uname().release),
        is_clock_synchronised=is_clock_synchronised(),
        leftovers=tuple(old_parts(mode, facts.links)),
    )
    if mode == "userspace":
        facts = replace(
            facts, capture=_capture.why_not("sk_lookup") or "", socket_lb=why_no_socket_lb(config)
        )
    facts, found = attempted(facts, "rules of nf_tables", nft_tables, ((), ()))
    facts = replace(facts, barriers=facts.barriers + found[0], leftovers=facts.leftovers + found[1])
    facts, written = attempted(facts, "rules of iptables", lambda: with_iptables(facts), facts)
    return with_owners_of_flows(replace(written, unseen=facts.unseen))


# --- the kernel -----------------------------------------------------------------------------------


def modules(files: Looked, release: str) -> Module:
    """Return what tells which parts the kernel has."""
    loaded = frozenset(path.name for path in (files.root / "sys/module").glob("*"))
    folder = files.root / "lib/modules" / release
    installed: frozenset[str] | None = None
    texts = [
        files.text(str(Path("lib/modules") / release / n))
        for n in ("modules.dep", "modules.builtin")
    ]
    if (folder / "modules.dep").exists():
        lines = "\n".join(text for text in texts if text).splitlines()
        installed = frozenset(module_name(line.partition(":")[0]) for line in lines)
    try:
        options = options_in(gzip.decompress((files.root / "proc/config.gz").read_bytes()).decode())
    except (OSError, EOFError, UnicodeDecodeError):
        options = None
    return Module(loaded, installed, options)


def module_name(path: str) -> str:
    return Path(path).name.partition(".ko")[0].replace("-", "_")


def options_in(text: str) -> Mapping[str, str]:
    pairs = (line.partition("=") for line in text.splitlines() if line.startswith("CONFIG_"))
    return {name: value for name, _, value in pairs}


def is_clock_synchronised() -> bool | None:
    """Ask the kernel, as adjtimex(2) says; None if it cannot be asked."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != TIME_ERROR


def why_no_socket_lb(config: Config) -> str:
    try:
        chosen_cgroup(config)
    except (Off, OSError) as why:
        return str(why)
    return ""


def with_owners_of_flows(facts: Facts) -> Facts:
    """Count the flows of each Service where there are many in all."""
    table = facts.tracked
    if table is None or not facts.served or table.used < FILLING * table.limit:
        return facts
    facts, counts = attempted(facts, "whose connections they are", lambda: flows(facts.served), ())
    return replace(facts, tracked=table._replace(by_service=counts))


def flows(served: Iterable[Served]) -> tuple[tuple[str, int], ...]:
    """Return how many tracked connections each Service has, most first. Raises ``OSError``."""
    owners = {item.frontend: item.service for item in served}
    found: Counter[str] = Counter()
    for family in FAMILIES:
        wanted = [f for f in owners if not f.ip or (":" in f.ip) == (family == 6)]
        for flow in Conntrack(family).flows(wanted) if wanted else ():
            exact = Frontend(flow.destination.ip, flow.destination.port, flow.proto)
            owner = owners.get(exact) or owners.get(exact._replace(ip=""))
            if owner is not None:
                found[owner] += 1
    return tuple(found.most_common())


# --- rules of others ------------------------------------------------------------------------------


def nft_tables() -> tuple[tuple[Barrier, ...], tuple[str, ...]]:
    """Return what other tables hold, and the tables that a kube-proxy left."""
    tables = [item["table"] for item in nft("list", "tables") if "table" in item]
    found: list[Barrier] = []
    left: list[str] = []
    for table in tables:
        family, name = table["family"], table["name"]
        if name == "kube-proxy":
            left.append(f"table {family} {KUBE_PROXY_TABLE}")
        elif not name.startswith(TABLE_NAME) and not is_of_iptables(family, name):
            found += barriers.of_nft(nft("--terse", "list", "table", family, name))
    return tuple(found), tuple(left)


def is_of_iptables(family: str, name: str) -> bool:
    """Say whether a table is one that iptables of flavour nft shows as its own."""
    if name not in IPTABLES_TABLES or family not in ("ip", "ip6"):
        return False
    programs = programs_of(4 if family == "ip" else 6).get("nft")
    return programs is not None and f"*{name}\n" in answer_of(programs.save, "-t", name)[1]


def nft(*words: str) -> list[dict[str, Any]]:
    code, text = answer_of("nft", "--json", *words)
    if code:
        raise CannotLookError(first_line(text) or f"nft: exit code {code}")
    try:
        found: list[dict[str, Any]] = json.loads(text)["nftables"]
    except (ValueError, KeyError) as error:
        raise CannotLookError("nft printed no JSON") from error
    return found


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def with_iptables(facts: Facts) -> Facts:
    """Add what iptables of both flavours has."""
    flavour = chosen_flavour() or ""
    counts: Counter[str] = Counter()
    found: list[Barrier] = []
    left: list[str] = []
    for family in FAMILIES:
        for name, programs in programs_of(family).items():
            if name == "legacy" and not _iptc.existing(family):
                continue
            counts[name] += census(programs).rules
            code, text = answer_of(programs.save)
            if code:
                raise CannotLookError(first_line(text) or f"{programs.save}: exit code {code}")
            is_ours = facts.mode == "iptables" and name == flavour
            found += barriers.of_iptables(family, name, text)
            chains = [] if is_ours else [c for _table, c in parsed(text) if is_of_owner(c)]
            if chains:
                left.append(f"{len(chains)} chains such as {chains[0]} in iptables ({name})")
    return replace(
        facts,
        flavours=dict(counts),
        flavour=flavour,
        barriers=(*facts.barriers, *found),
        leftovers=(*facts.leftovers, *left),
    )


def old_parts(mode: str, links: Iterable[Link]) -> Iterator[str]:
    if mode != "ipvs" and any(link.name == "kube-ipvs0" for link in links):
        yield "interface kube-ipvs0 of mode ipvs"
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text().strip() == "kube-proxy":
                yield f"process {comm.parent.name}, kube-proxy"
        except OSError:
            continue  # it has ended
