"""``pyproxy diff``: what would change, before it does; or whether the kernel holds what it should.

Exit code 0: nothing differs; 1: something does; 2: nobody can tell.
"""

import argparse
from collections.abc import Sequence

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
from pyproxy.commands._table import table
from pyproxy.commands.get import brief
from pyproxy.comparison import RouteChange, RouteChanges, endpoint_changes, route_changes
from pyproxy.listing import Endpoints, Routes, Verification, VerifiedFamily
from pyproxy.model import FAMILIES
from pyproxy.offline import view_of
from pyproxy.settings import SettingsError

EQUAL, DIFFERS, TROUBLE = 0, 1, 2
SIGNS = {"added": "+", "removed": "-", "changed": "~"}


def main(words: Sequence[str]) -> int:
    made = parser(
        "diff",
        "Without files: compare the kernel with what this node should have programmed. With -f or"
        " --kubeconfig, and --mode and --config: what these would change.",
    )
    made.add_argument(
        "--against", action="append", default=[], metavar="PATH",
        help="with -f: compare with these manifests, and not with the running pyproxy",
    )  # fmt: skip
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
    if own.mode is not None or own.against:
        raise CommandError("diff: which objects? --mode and --against go with -f or --kubeconfig")
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
    before: Source = Daemon(own.options.control_socket)
    if own.against:
        view, config = after.view, after.config
        objects = of_files(own.against, view.node, own.options.service_cidr, config)
        before = Files(view_of(objects, config, view.mode, view.node, FAMILIES), config)
    old, new = before.ask("routes", Routes, {}), after.ask("routes", Routes, {})
    reached, reaching = (side.ask("endpoints", Endpoints, {}) for side in (before, after))
    found = with_flows(
        RouteChanges(
            node=new.node,
            mode_before=old.mode,
            mode_after=new.mode,
            items=route_changes(old.items, new.items),
            endpoints=endpoint_changes(reached.items, reaching.items),
        )
    )
    show(as_json(found) if own.output == "json" else plan_text(found))
    return EQUAL if found.is_equal else DIFFERS


def plan_text(found: RouteChanges) -> str:
    mode = ""
    if found.mode_before != found.mode_after:
        mode = f"mode: {found.mode_before} -> {found.mode_after}: all rules are written anew\n"
    if found.is_equal:
        return "nothing would change\n"
    rows = [row for item in found.items for row in change_rows(item)]
    rows += [
        (SIGNS[item.change], item.address, item.service, "endpoint", "", "", "")
        for item in found.endpoints
    ]
    if not rows:
        return mode
    return mode + table(("", "FRONTEND", "SERVICE", "WHAT", "BEFORE", "AFTER", "FLOWS"), rows)


def change_rows(item: RouteChange) -> list[Sequence[str]]:
    flows = "?" if item.flows is None else str(item.flows)
    family = " IPv6" if item.family == 6 and "[" not in item.frontend else ""
    start = (SIGNS[item.change], item.frontend + family, item.service)
    if not item.fields:
        return [(*start, item.change, "", "", flows)]
    return [(*start, f.field, brief(f.before), brief(f.after), flows) for f in item.fields]
