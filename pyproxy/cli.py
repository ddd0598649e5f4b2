"""Turns arguments, file and environment into a ``Config``, and an outcome into an exit code."""

import asyncio
import logging
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path

import yaml

from pyproxy import __version__, proxier
from pyproxy.config import Config, gate, node_name, with_mode
from pyproxy.config_check import validate, warnings
from pyproxy.config_file import dump
from pyproxy.config_text import ConfigError, did_you_mean
from pyproxy.flags import Options, effective_config, flag_values, help_text, parse

COMMANDS = ("run", "demo", "cleanup", "version", "help")

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words.pop(0) if words and not words[0].startswith("-") else "run"
    try:
        match command:
            case "run":
                return run(parse(words))
            case "cleanup":
                return run(parse([*words, "--cleanup"]))
            case "demo":
                from pyproxy import demo

                return demo.main(words)
            case "version":
                return show(f"pyproxy {__version__}")
            case "help":
                return show(help_text())
            case _:
                return fail(f'unknown command "{command}"{did_you_mean(command, COMMANDS)}')
    except ConfigError as error:
        return fail(f"{error} (pyproxy --help lists all flags)")
    except KeyboardInterrupt:
        return 130


def run(options: Options) -> int:
    """Do what the flags say: mostly, serve this node."""
    if options.help:
        return show(help_text())
    if options.version:
        return show(f"pyproxy {__version__}")
    hostname = socket.gethostname()
    try:
        text = Path(options.config).read_text() if options.config else None
    except OSError as error:
        return fail(f"--config {options.config}: {error.strerror}")
    loaded = effective_config(options, text, hostname)
    config = loaded.config
    if problems := validate(config):
        return fail(*problems)
    if options.write_config_to:
        return write_config(config, Path(options.write_config_to))
    from pyproxy.log import setup

    setup(config.logging)
    for warning in loaded.warnings:
        log.warning(warning)
    return clean_up() if options.cleanup else serve(options, config, node_name(config, hostname))


def write_config(config: Config, path: Path) -> int:
    try:
        path.write_text(yaml.safe_dump(dump(config), sort_keys=False))
    except OSError as error:
        return fail(f"--write-config-to {path}: {error.strerror}")
    return 0


def serve(options: Options, config: Config, node: str) -> int:
    """Run until a signal or a reason to end; exit code 1 for the latter."""
    try:
        config = with_mode(config, resolved_mode(config.mode))
    except LookupError as error:
        return fail(str(error))
    for warning in warnings(config):
        log.warning(warning)
    return in_loop(options.event_loop, lambda: serving(options, config, node))


def resolved_mode(name: str) -> str:
    """Return the mode to run. Raises ``LookupError`` if it cannot be on this node."""
    if name == "auto":
        return proxier.best()
    if name not in proxier.modes():
        known = ", ".join(proxier.modes())
        raise LookupError(f"mode: {name} is not part of this version; there is: {known}")
    reason = proxier.load(name).unsupported()
    if reason is not None:
        raise LookupError(f"mode: {name} cannot work on this node: {reason}")
    return name


async def serving(options: Options, config: Config, node: str) -> int:
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

    calm_collector()
    adjust_oom_score(config.oom_score_adj)
    files = raise_file_limit()
    settings = Settings(
        config=config,
        node_name=node,
        families=families(),
        flags=flag_values(options),
        init_only=options.init_only,
        waits_for_node=not options.manifests,
    )
    metrics = Metrics(config.mode, settings.families)
    metrics.features(enabled_features(config))
    log.info(
        "pyproxy", extra={"version": __version__, "mode": config.mode, "node": node, "files": files}
    )
    try:
        feed = await feed_from(options, config, node, metrics)
        watchdogs = [until_changed(Path(options.config))] if options.config else []
        await App(settings, feed, metrics, SystemClock()).run(*watchdogs)
    except (Fatal, FeedError) as error:
        return fail(str(error))
    return 0


def clean_up() -> int:
    """Remove what each mode may have left on this node, and say what could not be removed."""
    from pyproxy.process import families

    async def clear() -> int:
        problems = [
            f"{mode}, IPv{family}: {problem}"
            for mode in proxier.modes()
            for family in families()
            if (problem := await proxier.load(mode).cleanup(family)) is not None
        ]
        return fail(*problems) if problems else 0

    return asyncio.run(clear())


def in_loop(name: str, coroutine: Callable[[], Coroutine[object, object, int]]) -> int:
    """Run on uvloop where it is wanted or to be had, never by installing it for everybody."""
    if name != "asyncio":
        try:
            import uvloop
        except ImportError:
            if name == "uvloop":
                return fail("--event-loop=uvloop: the package uvloop is not installed")
        else:
            return uvloop.run(coroutine())
    return asyncio.run(coroutine())


def enabled_features(config: Config) -> dict[tuple[str, str], bool]:
    from pyproxy.config import GATES

    return {
        (name, known.stage): gate(config, name)
        for name, known in GATES.items()
        if known.stage != "group"
    }


def show(text: str) -> int:
    print(text)  # noqa: T201 - a command's answer
    return 0


def fail(*problems: str) -> int:
    for problem in problems:
        print(f"pyproxy: {problem}", file=sys.stderr)  # noqa: T201 - the one line that helps
    return 1
