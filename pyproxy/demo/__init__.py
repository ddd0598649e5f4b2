"""``pyproxy demo``: a small cluster in network namespaces, and real requests to its Services."""

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from pyproxy import proxier
from pyproxy.demo.lab import Lab, Unavailable, isolate
from pyproxy.demo.proxy import ProxyFailed, tail
from pyproxy.demo.story import Demo
from pyproxy.demo.table import EIGHTHS, Look, as_json

EXIT_OK, EXIT_WRONG, EXIT_UNAVAILABLE, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(argv: list[str]) -> int:
    """Play the demo and return the exit code: 0 only if all was as it should be.

    The process is moved into namespaces of its own and cannot leave them.
    """
    options = _parser().parse_args(argv)
    try:
        as_user = isolate()
        lab = Lab()
        with TemporaryDirectory(prefix="pyproxy-demo-") as folder:
            return asyncio.run(_performance(options, lab, Path(folder), as_user=as_user))
    except (Unavailable, ProxyFailed) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_UNAVAILABLE if isinstance(error, Unavailable) else EXIT_WRONG
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.stderr.write("interrupted; everything is removed\n")
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyproxy demo",
        description="Build a small cluster in network namespaces, send requests to every Service"
        " of it, and update its pods under load. Needs no cluster, and no root where ordinary"
        " users may have namespaces. Nothing outside the namespaces is touched.",
    )
    parser.add_argument(
        "--mode", choices=proxier.modes(), default="userspace", help="default: %(default)s"
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave it running to play with, until Ctrl-C"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON only")
    return parser


async def _performance(
    options: argparse.Namespace, lab: Lab, folder: Path, *, as_user: bool
) -> int:
    task = asyncio.current_task()
    assert task is not None, "a coroutine runs in a task"
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    manifests = folder / "manifests"
    manifests.mkdir()
    look = _look()
    demo = Demo(lab, manifests, options.mode, _silent if options.json else _say, look)
    log = folder / "pyproxy.log"
    async with demo.on_stage(log):
        outcome = await demo.play()
        correct = not any(check.complaints for check in outcome.checks)
        if options.json:
            result = as_json(options.mode, outcome.rows, outcome.update, outcome.checks)
            _say(json.dumps(result, indent=2, ensure_ascii=False))
        elif not correct:
            _say(f"\nthe end of pyproxy's log:{tail(log)}")
        if options.keep:
            await _kept(manifests, as_user=as_user)
    return EXIT_OK if correct else EXIT_WRONG


async def _kept(manifests: Path, *, as_user: bool) -> None:
    """Say what to type in another terminal, and wait for Ctrl-C."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    for line in what_to_type(os.getpid(), manifests, as_user=as_user):
        _say(line)
    await stopped.wait()


def what_to_type(pid: int, manifests: Path, *, as_user: bool) -> Sequence[str]:
    user = f"-t {pid} -U --preserve-credentials " if as_user else ""
    return (
        "",
        "still running, until Ctrl-C. In another terminal, type first:",
        f'  at() {{ n=$1; shift; nsenter {user}--net=/proc/{pid}/root/run/netns/$n "$@"; }}',
        "and then, for example:",
        "  at shell curl http://10.96.0.10          from a pod",
        "  at node-1 curl http://192.0.2.11:30080   from the node",
        "  at client curl http://198.18.0.11        from outside",
        "  at node-1 curl http://127.0.0.1:10249/metrics",
        f"  edit {manifests}/services.yaml",
    )


def _look() -> Look:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    try:
        f"{EIGHTHS}✓✗·".encode(sys.stdout.encoding)
    except (UnicodeEncodeError, LookupError):
        return Look(colour, blocks=False)
    return Look(colour)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _silent(_line: str) -> None:
    pass
