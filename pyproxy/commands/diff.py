"""``pyproxy diff``: what would change, before it does; or whether the kernel holds what it should.

Exit code 0: nothing differs; 1: something does; 2: nobody can tell.
"""

import argparse
import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from textwrap import fill

from pyproxy.commands import CommandError
from pyproxy.commands._ask import (
    Daemon,
    Files,
    Source,
    as_json,
    of_files,
    parsed,
    parser,
    show,
    tell,
)
from pyproxy.commands._flows import with_flows
from pyproxy.commands._table import WIDTH, table
from pyproxy.commands.get import brief
from pyproxy.comparison import (
    EntryChange,
    RouteChange,
    RouteChanges,
    endpoint_changes,
    entry_changes,
    route_changes,
)
from pyproxy.doctor.setup import Setup
from pyproxy.host import Host
from pyproxy.listing import Endpoints, Routes
from pyproxy.planned import Plans
from pyproxy.proxier._flavour import chosen_flavour
from pyproxy.proxier._kubeipvs import DEVICE
from pyproxy.settings import SettingsError
from pyproxy.written import Entries, Verification, VerifiedFamily

EQUAL, DIFFERS, TROUBLE = 0, 1, 2
HEAD = ("", "FRONTEND", "SERVICE", "WHAT", "BEFORE", "AFTER", "FLOWS", "END")
SIGNS: Mapping[str, str] = {"added": "+", "removed": "-", "changed": "~"}


def main(words: Sequence[str]) -> int:
    made = parser(
        "diff",
        "Without files: compare the kernel with what this node should have programmed. With -f or"
        " --kubeconfig, and --mode and --config: what these would change.",
        without_daemon=" (-f FILE with --against FILE works without one)",
    )
    made.add_argument(
        "--against", action="append", default=[], metavar="PATH",
        help="with -f: compare with these manifests, and not with the running pyproxy",
    )  # fmt: skip
    made.add_argument(
        "--entries", action="store_true", help="with -f: tell each entry that would be written"
    )
    own, source = parsed(made, words)
    try:
        if not isinstance(source, Files):
            return of_kernel(own, source)
        return of_plan(own, source)
    except (CommandError, SettingsError) as error:
        for line in error.args:
            tell(line)
        return TROUBLE


def of_kernel(own: argparse.Namespace, source: Source) -> int:
    if own.mode is not None or own.against or own.entries:
        raise CommandError(
            "diff: which objects? --mode, --against and --entries go with -f or --kubeconfig"
        )
    found = source.ask("verify", Verification, {})
    show(as_json(found) if own.output == "json" else "".join(map(family_text, found.families)))
    return verdict(found)


def verdict(found: Verification) -> int:
    if any(family.verdict == "unknown" for family in found.families):
        return TROUBLE
    return DIFFERS if any(family.differences for family in found.families) else EQUAL


def family_text(family: VerifiedFamily) -> str:
    if family.verdict == "unknown":
        return f"IPv{family.family}: unknown: {family.problem}\n"
    if not family.differences:
        return f"IPv{family.family}: {family.entries} entries agree\n"
    head = f"IPv{family.family}: {len(family.differences)} of {family.entries} entries differ\n"
    rows = ((d.entry, d.wanted or "", d.held or "missing") for d in family.differences)
    return head + table(("ENTRY", "SHOULD BE", "IS"), rows)


def of_plan(own: argparse.Namespace, after: Files) -> int:
    before: Source = Daemon(own.options.control_socket, own.without_daemon)
    if not own.against:
        after.own_ips = asyncio.run(own_ips())
        after.commented = after.view.mode != "iptables" or chosen_flavour() != "legacy"
        after.service_cidrs = before.ask("setup", Setup, {}).service_cidrs
    else:
        view = after.view
        objects = of_files(own.against, view.node, own.options.service_cidr, after.config)
        before = Files(objects, after.config, view.mode, view.node)
    sides = (before, after)
    old, new = (side.ask("routes", Routes, {}) for side in sides)
    reached, reaching = (side.ask("endpoints", Endpoints, {}) for side in sides)
    found = RouteChanges(
        node=new.node,
        mode_before=old.mode,
        mode_after=new.mode,
        items=route_changes(old.items, new.items),
        endpoints=endpoint_changes(reached.items, reaching.items),
        entries=entry_changes(*(side.ask("entries", Entries, {}) for side in sides)),
    )
    were, will = (side.ask("plan", Plans, {}).items for side in sides)
    found = with_flows(
        found,
        were,
        will,
        {f.family: f.around for f in after.view.families},
        ends_forbidden=after.config.conntrack.end_forbidden_flows,
    )
    show(as_json(found) if own.output == "json" else text_of(found, with_entries=own.entries))
    return EQUAL if found.is_equal else DIFFERS


async def own_ips() -> frozenset[str]:
    """Return the addresses of this node, which modes look at beside those of its Node."""
    host = Host()
    await host.read()
    addresses = {ip for name, ip in host.snapshot.addresses if name != DEVICE}
    return frozenset(text.partition("/")[0] for text in addresses)


def text_of(found: RouteChanges, *, with_entries: bool) -> str:
    if found.is_equal:
        return "nothing would change\n"
    entries = (entries_text if with_entries else kinds_text)(found)
    parts = (plan_text(found), flows_text(found), entries)
    return "\n".join(part for part in parts if part)


def flows_text(found: RouteChanges) -> str:
    if found.flows is None or found.ending is None:
        return "connections: nobody could look, which takes root\n"
    return f"connections: {found.flows} on what changes, {found.ending} of them would not go on\n"


def kinds_text(found: RouteChanges) -> str:
    """Return how many entries of each kind would come, go and change."""
    if found.entries is None:
        return "entries: what is written now is not known: the last sync failed, or one runs\n"
    counts: Counter[tuple[int, str, str]] = Counter(
        (e.family, e.kind, e.change) for e in found.entries
    )
    places = dict.fromkeys((family, kind) for family, kind, _ in counts)
    rows = [
        (f"{kind}, IPv{family}", *(str(counts[family, kind, sign]) for sign in SIGNS))
        for family, kind in places
    ]
    return table(("ENTRIES", *SIGNS.values()), rows) if rows else ""


def entries_text(found: RouteChanges) -> str:
    if not found.entries:
        return kinds_text(found)
    return "entries:\n" + "".join(
        f"{line}\n" for entry in found.entries for line in entry_lines(entry)
    )


def entry_lines(entry: EntryChange) -> Iterator[str]:
    """Yield which entry it is, and what it has and would have."""
    head = f"{SIGNS[entry.change]} IPv{entry.family} {entry.kind} {entry.name}"
    yield from fill(head, WIDTH, subsequent_indent="    ", break_on_hyphens=False).splitlines()
    for word, content in (("before", entry.before), ("after", entry.after)):
        if content:
            start = f"    {word:<8}"
            indent = " " * len(start)
            text = fill(
                content, WIDTH, initial_indent=start, subsequent_indent=indent,
                break_on_hyphens=False,
            )  # fmt: skip
            yield from text.splitlines()


def plan_text(found: RouteChanges) -> str:
    mode = ""
    if found.mode_before != found.mode_after:
        mode = f"mode: {found.mode_before} -> {found.mode_after}: all rules are written anew\n"
    rows = [row for item in found.items for row in change_rows(item)]
    rows += [
        (SIGNS[item.change], item.address, item.service, "endpoint", "", "", "", "")
        for item in found.endpoints
    ]
    if not rows:
        return mode
    return mode + table(HEAD, rows)


def change_rows(item: RouteChange) -> list[Sequence[str]]:
    flows = tuple("?" if n is None else str(n) for n in (item.flows, item.ending))
    family = " IPv6" if item.family == 6 and "[" not in item.frontend else ""
    start = (SIGNS[item.change], item.frontend + family, item.service)
    if not item.fields:
        return [(*start, item.change, "", "", *flows)]
    return [(*start, f.field, brief(f.before), brief(f.after), *flows) for f in item.fields]
