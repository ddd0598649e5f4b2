"""Which of the two flavours of iptables this host uses, and the programs of each.

They fill different tables of the kernel: ``legacy`` and ``nft``. Rules in the one that nobody
else uses would be traversed beside the others, in an order that nobody expects.
"""

import logging
import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from pyproxy.model import FAMILIES, Family
from pyproxy.proxier import _iptc
from pyproxy.proxier._iptables import Flavour, Iptables, LegacyIptables, Programs
from pyproxy.rules.iptables_text import parsed

FLAVOURS: tuple[Flavour, ...] = ("nft", "legacy")
PROGRAMS: Mapping[Family, str] = {4: "iptables", 6: "ip6tables"}
HINTS = {"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"}  # kubelet leaves these in table mangle
RANDOM_FULLY = (1, 6, 2)

VERSION = re.compile(r"v(\d+)\.(\d+)\.(\d+)(?: \((\w+)\))?")

log = logging.getLogger(__name__)


class Census(NamedTuple):
    """What there is of one flavour, as far as it tells who uses it."""

    rules: int
    is_hinted: bool  # kubelet has left a sign


@lru_cache
def chosen_flavour() -> Flavour | None:
    """Return the flavour that this host uses; None without programs.

    That is kubelet's where it left a hint, or else the one with more rules, or else that of the
    ``iptables`` in PATH.
    """
    found: dict[Flavour, list[Census]] = {}
    for family in FAMILIES:
        for flavour, of_family in programs_of(family).items():
            found.setdefault(flavour, []).append(census(of_family))
    plain = next((f for n in PROGRAMS.values() if (f := version_of(n)[1]) is not None), None)
    return preferred({flavour: united(parts) for flavour, parts in found.items()}, plain)


def preferred(found: Mapping[Flavour, Census], plain: Flavour | None) -> Flavour | None:
    """Choose a flavour by what there is of each."""
    if len(found) > 1 and all(census.rules for census in found.values()):
        rules = ", ".join(f"{census.rules} {flavour}" for flavour, census in sorted(found.items()))
        log.warning("this host has iptables rules of both flavours", extra={"rules": rules})
    hinted = [flavour for flavour, census in found.items() if census.is_hinted]
    if len(hinted) == 1:
        return hinted[0]
    return max(found, key=lambda flavour: (found[flavour].rules, flavour == plain), default=None)


def tables_with(found: Programs) -> Iptables:
    """Return the tables that these programs write to."""
    return (LegacyIptables if found.flavour == "legacy" else Iptables)(found)


# --- what there is --------------------------------------------------------------------------------


def census(found: Programs) -> Census:
    """Count without leaving a trace: tables of flavour legacy come into being when looked into."""
    if found.flavour == "legacy" and not _iptc.existing(found.family):
        return Census(0, is_hinted=False)
    tables: dict[str, dict[str, int]] = {}
    for (table, chain), rules in parsed(answer_of(found.save)[1]).items():
        tables.setdefault(table, {})[chain] = len(rules)
    return counted(tables)


def counted(tables: Mapping[str, Mapping[str, int]]) -> Census:
    rules = sum(sum(chains.values()) for chains in tables.values())
    return Census(rules, is_hinted=bool(HINTS & tables.get("mangle", {}).keys()))


def united(parts: list[Census]) -> Census:
    return Census(sum(p.rules for p in parts), is_hinted=any(p.is_hinted for p in parts))


# --- programs -------------------------------------------------------------------------------------


@lru_cache
def programs_of(family: Family) -> dict[Flavour, Programs]:
    """Return the programs there are in PATH, by flavour."""
    name = PROGRAMS[family]
    found: dict[Flavour, Programs] = {}
    version, plain_flavour = version_of(name)
    for flavour in FLAVOURS:
        own = f"{name}-{flavour}"
        if plain_flavour == flavour and complete(name):
            found[flavour] = programs(family, flavour, name, version)
        elif complete(own):
            found[flavour] = programs(family, flavour, own, version_of(own)[0])
    return found


def programs(family: Family, flavour: Flavour, name: str, version: tuple[int, ...]) -> Programs:
    random_fully = version >= RANDOM_FULLY
    return Programs(family, flavour, name, f"{name}-save", f"{name}-restore", random_fully)


def complete(name: str) -> bool:
    return all(shutil.which(f"{name}{word}") for word in ("", "-save", "-restore"))


@lru_cache
def version_of(name: str) -> tuple[tuple[int, ...], Flavour | None]:
    """Return a program's version and flavour; before there were two, it was legacy."""
    code, text = answer_of(name, "--version")
    found = VERSION.search(text)
    if code or found is None:
        return (), None
    numbers = tuple(int(number) for number in found.groups()[:3])
    return numbers, "nft" if found[4] == "nf_tables" else "legacy"


def answer_of(*argv: str) -> tuple[int, str]:
    """Run a program that answers at once, before anything else runs.

    The answer is for people, and to be counted: a byte that is not UTF-8 is not kept in it.
    """
    try:
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        return -1, error.strerror or str(error)
    output, _ = child.communicate()
    return child.returncode, output.decode(errors="replace")
