"""The proxy that the demo tries: ``pyproxy run`` as a process of its own on the first node."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from pyproxy import child
from pyproxy.demo.cluster import CLUSTER_CIDRS, NODES, of_families
from pyproxy.demo.lab import Lab
from pyproxy.demo.traffic import http_status
from pyproxy.model import Address

HEALTH = Address("127.0.0.1", 10256)
METRICS = Address("127.0.0.1", 10249)
HEALTHY_SECONDS = 20.0
STOP_SECONDS = 5.0
TAIL_LINES = 15


class ProxyFailed(Exception):
    """The proxy ended, or never became ready; the message ends with the last lines of its log."""


def arguments(folder: Path, mode: str, *, ipv6: bool) -> tuple[str, ...]:
    return (
        "--manifests", str(folder),
        "--hostname-override", NODES[0].name,
        "--proxy-mode", mode,
        "--cluster-cidr", ",".join(of_families(CLUSTER_CIDRS, ipv6=ipv6)),
        "--healthz-bind-address", str(HEALTH),
        "--metrics-bind-address", str(METRICS),
    )  # fmt: skip


@contextlib.asynccontextmanager
async def running(
    lab: Lab, arguments: Sequence[str], log: Path, command: Sequence[str] = ()
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the proxy for the length of a block, and stop it as an init system would."""
    argv = [*(command or child.command("pyproxy", "run")), *arguments]
    node = NODES[0].name
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=child.environment(),
            preexec_fn=lambda: lab.enter(node),
            start_new_session=True,  # Ctrl-C is for the demo; it stops the proxy itself
        )
    try:
        yield process
    finally:
        await _stop(process)


async def _stop(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def healthy(
    lab: Lab, process: asyncio.subprocess.Process, log: Path, seconds: float = HEALTHY_SECONDS
) -> None:
    """Wait until the proxy says that it is healthy."""
    try:
        async with asyncio.timeout(seconds):
            while await _health(lab) != 200:
                if process.returncode is not None:
                    raise ProxyFailed(f"pyproxy ended with {process.returncode}:{tail(log)}")
                await asyncio.sleep(0.05)
    except TimeoutError as error:
        what = f"pyproxy was not healthy after {seconds:.0f} s"
        raise ProxyFailed(f"{what}:{tail(log)}") from error


async def _health(lab: Lab) -> int | None:
    return await http_status(lab.socket(NODES[0].name, HEALTH.ip), HEALTH, "/healthz")


def tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    return "".join(f"\n    {line}" for line in lines) or " its log is empty"
