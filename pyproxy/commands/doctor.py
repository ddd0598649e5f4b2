"""``pyproxy doctor``: what is wrong with this node, the evidence, and what to do about it."""

import asyncio
import logging
import socket
from collections.abc import Iterator, Sequence
from textwrap import wrap

from msgspec.structs import replace

from pyproxy import proxier
from pyproxy.commands import CommandError
from pyproxy.commands._ask import (
    WITHOUT_DAEMON,
    Source,
    as_json,
    divided,
    parser,
    show,
    source,
)
from pyproxy.commands._table import WIDTH
from pyproxy.config import MODES_BESIDE, Config, cluster_cidrs, is_beside, node_name
from pyproxy.config.flags import Options, parse
from pyproxy.config.text import did_you_mean
from pyproxy.doctor.facts import Facts, Finding, Served
from pyproxy.doctor.findings import Report, findings
from pyproxy.doctor.look import quickly
from pyproxy.doctor.look_api import server
from pyproxy.doctor.look_closer import thoroughly
from pyproxy.doctor.setup import Setup
from pyproxy.kube.access import SourceError
from pyproxy.listing import Routes
from pyproxy.model import Frontend
from pyproxy.process import SystemClock, families
from pyproxy.settings import file_text, loaded

MARGIN = "  "


def main(words: Sequence[str]) -> int:
    logging.getLogger("pyproxy").addHandler(logging.NullHandler())  # what it would say is a finding
    made = parser("doctor", "Look for what is wrong with this node. It changes nothing.")
    shared, rest = divided(words)
    own = made.parse_args(rest)
    if own.mode is not None and own.mode not in proxier.modes():
        raise CommandError(
            f"--mode={own.mode}: no such mode{did_you_mean(own.mode, proxier.modes())}"
        )
    if own.node_name is not None:
        shared.append(f"--hostname-override={own.node_name}")
    options = parse(shared)
    hostname = socket.gethostname()
    config, _ = loaded(options, file_text(options), hostname)
    facts = facts_of(own.mode, options, own.filename, config, node_name(config, hostname))
    report = Report(facts.node, facts.mode, findings(facts))
    show(as_json(report) if own.output == "json" else text(report))
    return int(any(finding.severity != "note" for finding in report.findings))


def facts_of(
    mode: str | None, options: Options, files: Sequence[str], config: Config, node: str
) -> Facts:
    """Gather everything; what cannot be had is noted."""
    setup, served, unseen = told(options, files)
    if setup is not None:
        node = setup.node
    beside = setup.is_beside if setup is not None else is_beside(config)
    names = MODES_BESIDE if beside else proxier.modes()
    configured = config.mode if config.mode != "auto" else proxier.best(names)
    mode = mode or (setup.mode if setup is not None else configured)
    facts = replace(
        quickly(config, mode, families()),
        node=node,
        is_running=setup is not None,
        is_beside=beside,
        served=served,
        unseen=unseen,
        needs_pod_cidrs=setup.needs_pod_cidrs if setup else config.detect_local_mode == "NodeCIDR",
        pod_cidrs=(setup.pod_cidrs if setup is not None else ()) or cluster_cidrs(config),
        service_cidrs=setup.service_cidrs if setup is not None else (),
        open_files=setup.open_files if setup is not None else None,
    )
    kubeconfig = config.client_connection.kubeconfig or (setup.kubeconfig if setup else "")
    facts = with_server(facts, kubeconfig, options.master)
    return thoroughly(facts, config)


def told(
    options: Options, files: Sequence[str]
) -> tuple[Setup | None, tuple[Served, ...], tuple[tuple[str, str], ...]]:
    """Return what a daemon, or files, say of this node's Services."""
    try:
        whom = source(options, files, WITHOUT_DAEMON)
        setup = whom.ask("setup", Setup, {}) if whom.is_live else None
        return setup, frontends(whom), ()
    except CommandError as error:
        return None, (), (("Services and their rules", error.args[0]),)


def frontends(whom: Source) -> tuple[Served, ...]:
    return tuple(
        Served(Frontend.parse(row.frontend), f"{row.namespace}/{row.service}")
        for row in whom.ask("routes", Routes, {}).items
    )


def with_server(facts: Facts, kubeconfig: str, master: str) -> Facts:
    try:
        found = asyncio.run(server(kubeconfig, master, facts.node, SystemClock.unix))
    except SourceError as error:
        return replace(facts, unseen=(*facts.unseen, ("the API server", str(error))))
    return replace(facts, server=found, pod_cidrs=facts.pod_cidrs or found.pod_cidrs)


# --- text -----------------------------------------------------------------------------------------


def text(report: Report) -> str:
    lines = [line for finding in report.findings for line in paragraph(finding)]
    counts = {
        name: sum(finding.severity == name for finding in report.findings)
        for name in ("error", "warning", "note")
    }
    summary = ", ".join(f"{n} {name}{'s' * (n != 1)}" for name, n in counts.items() if n)
    head = f"{report.node}, mode {report.mode}: {summary or 'nothing is wrong'}"
    return "".join(f"{line}\n" for line in (head, *lines))


def paragraph(finding: Finding) -> Iterator[str]:
    yield ""
    yield from filled(f"{finding.severity}: {finding.subject}: {finding.what}", "")
    if finding.evidence:
        yield from filled(finding.evidence, MARGIN)
    if finding.fix:
        yield from filled(f"fix: {finding.fix}", MARGIN)


def filled(words: str, margin: str) -> list[str]:
    return wrap(
        words, WIDTH, initial_indent=margin, subsequent_indent=margin + MARGIN,
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip
