"""Turns arguments, file and environment into a ``Config``, and an outcome into an exit code."""

import argparse
import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from msgspec.structs import replace

from pyproxy import __version__, commands, proxier
from pyproxy.config import MODES_BESIDE, NAT_MODES, Config, gate, is_beside, node_name, with_mode
from pyproxy.config.check import warnings
from pyproxy.config.file import dump
from pyproxy.config.flags import Options, flag_values, help_text, parse
from pyproxy.config.flags_table import FLAGS
from pyproxy.config.text import ConfigError, did_you_mean
from pyproxy.settings import SettingsError, file_text, loaded

COMMANDS = ("run", "demo", "render", "migrate", "cleanup", "version", "help")

ANY_PORT = "127.0.0.1:0"

if TYPE_CHECKING:  # it is imported where it is needed
    from pyproxy import migration

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words.pop(0) if words and not words[0].startswith("-") else "run"
    if command == "help" and words:
        command, words = words[0], ["--help"]
    try:
        code = carried_out(command, words)
        sys.stdout.flush()
        return code
    except (commands.CommandError, SettingsError) as error:
        return fail(*error.args)
    except ConfigError as error:
        return fail(f"{error} (pyproxy --help lists all flags)")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads has enough: head, or a pager
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to come
        return 141


def carried_out(command: str, words: list[str]) -> int:
    match command:
        case "run":
            return run(parse(words))
        case "cleanup":
            return run(parse(["--cleanup", *cleanup_flags(words)]))
        case "demo":
            from pyproxy import demo

            return demo.main(words)
        case "render":
            return render(words)
        case "migrate":
            return migrate(words)
        case "version" | "help":
            return run(parse([f"--{command}"]))
        case _ if command in commands.names():
            return commands.load(command).main(words)
        case _:
            known = (*COMMANDS, *commands.names())
            return fail(f'unknown command "{command}"{did_you_mean(command, known)}')


def run(options: Options) -> int:
    """Do what the flags say: mostly, serve this node."""
    if options.help:
        return show(help_text())
    if options.version:
        return show(f"pyproxy {__version__}")
    hostname = socket.gethostname()
    try:
        text = file_text(options)
        config, oddities = loaded(options, text, hostname)
    except SettingsError as error:
        return fail(*error.args)
    if options.write_config_to:
        config = with_mode(config, config.mode)
        return write_config(config, Path(options.write_config_to))
    from pyproxy.log import setup

    setup(config.logging)
    for oddity in oddities:
        log.warning(oddity)
    if options.cleanup:
        return clean_up(options.keep, config)
    return serve(options, config, node_name(config, hostname), text)


def cleanup_flags(words: Sequence[str]) -> list[str]:
    """Return the flags of ``run`` that the words of ``pyproxy cleanup`` mean."""
    parser = argparse.ArgumentParser(
        prog="pyproxy cleanup",
        description="Remove from the kernel what every mode, and kube-proxy, may have left there.",
        epilog="All flags of pyproxy run count as well, such as --config and --service-proxy-name:"
        " beside another proxy, only what pyproxy left is removed.",
        allow_abbrev=False,
    )
    keep = FLAGS["keep"].help.removeprefix("With --cleanup: ")
    parser.add_argument("--keep", metavar="MODE", help=keep)
    own, shared = parser.parse_known_args(words)
    return shared if own.keep is None else [*shared, f"--keep={own.keep}"]


def render(words: Sequence[str]) -> int:
    """Print what serving some manifests would make of this node."""
    from pyproxy.render import RenderError, rendered, request

    wanted, shared = request(words)
    options = parse(shared)
    hostname = socket.gethostname()
    try:
        config, _ = loaded(options, file_text(options), hostname)
        node = node_name(config, hostname)
        text, remarks = rendered(wanted, config, node, options.service_cidr)
    except (SettingsError, RenderError) as error:
        return fail(*error.args)
    fail(*remarks)  # told, and no reason to print nothing
    sys.stdout.write(text)
    return 0


def migrate(words: Sequence[str]) -> int:
    """Move this node's traffic to another mode, in one move or in two; end or stay as asked."""
    from pyproxy.migration import DETOUR, request

    asked, shared = request(words)
    code = make_move(asked, shared)
    if code != DETOUR:
        return code
    first = asked.stopover()
    if make_move(first, shared):
        return 1
    show(f"mode {first.to} serves, and goes on if the move to {asked.to} fails")
    gc.unfreeze()  # what the app of the first move left
    code = make_move(asked, shared)
    return fail("migrate: there are new virtual servers") if code == DETOUR else code


def make_move(asked: "migration.Request", shared: Sequence[str]) -> int:
    """Make one move, with the flags that are shared with ``run``; return the exit code."""
    from pyproxy.log import setup

    options = parse(shared)
    if not options.config:  # some flags mean another setting in each mode
        options = parse([*shared, f"--proxy-mode={asked.to}"])
    hostname = socket.gethostname()
    text = file_text(options)
    config, oddities = loaded(options, text, hostname)
    setup(config.logging)
    for oddity in oddities:
        log.warning(oddity)
    if is_beside(config):
        return fail("migrate: serviceProxyName: a node moves as a whole; leave the name out")
    config, node = with_mode(config, asked.to), node_name(config, hostname)
    return serve(options, config, node, text, asked)


def write_config(config: Config, path: Path) -> int:
    try:
        path.write_text(yaml.safe_dump(dump(config), sort_keys=False))
    except OSError as error:
        return fail(f"--write-config-to {path}: {error.strerror}")
    return 0


def serve(
    options: Options,
    config: Config,
    node: str,
    text: str | None,
    asked: "migration.Request | None" = None,
) -> int:
    """Run until a signal or a reason to end; exit code 1 for the latter."""
    try:
        config = with_mode(config, resolved_mode(config))
        config = proxier.load(config.mode).settled(config)
    except LookupError as error:
        return fail(str(error))
    if asked is None:
        return in_loop(
            options.event_loop, config.mode, lambda: serving(options, config, node, text)
        )
    return in_loop(
        options.event_loop, config.mode, lambda: migrating(asked, options, config, node, text)
    )


def resolved_mode(config: Config) -> str:
    """Return the mode to run. Raises ``LookupError`` if it cannot be on this node."""
    name = config.mode
    if name == "auto":
        return proxier.best(allowed_modes(config))
    if name not in proxier.modes():
        known = ", ".join(proxier.modes())
        raise LookupError(f"mode: {name} is not part of this version; there is: {known}")
    reason = proxier.load(name).unsupported()
    if reason is not None:
        raise LookupError(f"mode: {name} cannot work on this node: {reason}")
    return name


def allowed_modes(config: Config) -> tuple[str, ...]:
    """Return the modes that may run, whatever the node can."""
    return MODES_BESIDE if is_beside(config) else proxier.modes()


async def migrating(
    asked: "migration.Request", options: Options, config: Config, node: str, text: str | None
) -> int:
    """Look what there is, say what becomes of it, and make it so."""
    from pyproxy.doctor.findings import worth_a_warning
    from pyproxy.doctor.look import quickly
    from pyproxy.migration import DETOUR, Migration, described, obstacle, situation, way
    from pyproxy.process import families
    from pyproxy.proxier._others import OthersError

    try:
        now = await situation(config, families())
    except OthersError as error:
        return fail(f"migrate: {error}")
    show(f"from: {described(now)}\nto: {way(now, config)}")
    findings = worth_a_warning(await asyncio.to_thread(quickly, config, config.mode, families()))
    for finding in findings:
        show(f"{finding.severity}: {finding.subject}: {finding.what} (fix: {finding.fix})")
    if any(finding.severity == "error" for finding in findings):
        return fail("migrate: this node is not ready; pyproxy doctor says more")
    problem = obstacle(asked, now)
    if problem is not None:
        return fail(f"migrate: {problem}")
    if asked.dry_run:
        return 0
    if now.held:
        return DETOUR
    if not asked.then_run:
        config = replace(config, healthz_bind_address="", metrics_bind_address=ANY_PORT)
        options = replace(options, control_socket="", state_dir="")
    move = Migration(asked, now, config, partial(print, flush=True))
    try:
        code = await serving(options, config, node, text, move)
    finally:
        moved = await move.undo()
    return code if moved else 1


async def serving(
    options: Options,
    config: Config,
    node: str,
    text: str | None,
    move: "migration.Migration | None" = None,
) -> int:
    from pyproxy.app import App, Fatal, Settings
    from pyproxy.feeds import FeedError, feed_from
    from pyproxy.metrics import Metrics
    from pyproxy.process import (
        SystemClock,
        adjust_oom_score,
        calm_collector,
        families,
        raise_file_limit,
        until_changed,
    )

    settings = Settings(
        config=config,
        node_name=node,
        families=families(),
        flags=flag_values(options),
        init_only=options.init_only,
        control_socket=options.control_socket,
        succeeds_others=move is None,
        waits_for_node=not options.manifests,
    )
    metrics = Metrics(config.mode, settings.families)
    metrics.features(enabled_features(config))
    try:
        feed = await feed_from(options, config, node, metrics, options.state_dir)
        if move is not None:
            feed = move.feed(feed)
        for warning in warnings(config):
            log.warning(warning)
        calm_collector()
        adjust_oom_score(config.oom_score_adj)
        files = raise_file_limit()
        known = {"version": __version__, "mode": config.mode, "node": node, "files": files}
        if config.mode == "userspace":
            known["capture"] = config.userspace.capture
        log.info("pyproxy", extra=known)
        watchdogs = [until_changed(Path(options.config), text)] if text is not None else []
        app = App(settings, feed, metrics, SystemClock())
        if move is not None:
            watchdogs += [move.run(app), move.free_ports()]
        await app.run(*watchdogs)
    except (Fatal, FeedError) as error:
        return fail(str(error))
    return 0


def clean_up(keep: str, config: Config) -> int:
    """Remove what each mode may have left on this node, and say what could not be removed.

    Of the mode to keep, only what kube-proxy left in its stead is removed. Beside another proxy
    only what we left is. Where the mode to keep is one of NAT, virtual servers with connections
    stay until these have ended, and the exit code says that it has to be done again.
    """
    from pyproxy.aftermath import WAITS
    from pyproxy.process import families
    from pyproxy.proxier._ipvsdrain import waiting

    if keep and keep not in proxier.modes():
        return fail(f"--keep={keep}: there is no such mode{did_you_mean(keep, proxier.modes())}")

    async def clear() -> int:
        waits = await waiting(families(), config) if keep in NAT_MODES else {}
        problems = [
            f"{mode}, IPv{family}: {problem}"
            for mode in allowed_modes(config)
            for family in families()
            if not (mode == "ipvs" and family in waits)
            if (problem := await proxier.load(mode).cleanup(family, config, ours=mode != keep))
        ]
        if problems:
            return fail(*problems)
        if waits:
            fail(f"{sum(waits.values())} virtual servers wait for the end of their connections")
        return WAITS if waits else 0

    return asyncio.run(clear())


def in_loop(name: str, mode: str, coroutine: Callable[[], Coroutine[object, object, int]]) -> int:
    """Run on the event loop of this name; ``auto`` is the best for the mode that there is."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if name == "auto" and mode == "userspace":
        from pyproxy.proxier._poller import RelayLoop

        factory = RelayLoop
    elif name != "asyncio":
        try:
            from uvloop import new_event_loop as factory
        except ImportError:
            if name == "uvloop":
                return fail("--event-loop=uvloop: the package uvloop is not installed")
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(coroutine())


def enabled_features(config: Config) -> dict[tuple[str, str], bool]:
    from pyproxy.config import GATES

    return {
        (name, known.stage): gate(config, name)
        for name, known in GATES.items()
        if known.stage != "group"
    }


def show(text: str) -> int:
    print(text, flush=True)  # noqa: T201 - a command's answer
    return 0


def fail(*problems: str) -> int:
    for problem in problems:
        print(f"pyproxy: {problem}", file=sys.stderr)  # noqa: T201 - the one line that helps
    return 1
