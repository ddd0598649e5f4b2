"""Removes what others left on the node, in a process of its own."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from pyproxy import child
from pyproxy.config import Config
from pyproxy.config.text import duration_text

CLEANUP_SECONDS = 300.0  # that it may take at most: it starts programs, and all of Python
POLL_SECONDS = 30.0  # between looks whether what is left is idle: a process each
LOOK_SECONDS, TELL_SECONDS = 1.0, 30.0  # of who waits for connections, and says so
WAITS: Final = 3  # the exit code of a cleanup that has to be repeated

log = logging.getLogger(__name__)


class Left(NamedTuple):
    """What a clean-up could not remove, in words, and whether it only waits for something."""

    what: str
    waits: bool


async def clean_up_after_others(config: Config, clock: Callable[[], float]) -> None:
    """Remove what others left; where it still has connections, when these have ended.

    It is waited for no longer than ``ipvs.drainTimeout``. What goes wrong is logged.
    """
    until = clock() + config.ipvs.drain_timeout_seconds
    left = await cleaned_up_after_others(config)
    if left is not None and left.waits:
        log.info("cleaning up after others", extra={"left": left.what})
    while left is not None and left.waits:
        await asyncio.sleep(POLL_SECONDS)
        left = await cleaned_up_after_others(config, patient=clock() < until)
    if left is not None:
        log.warning("cannot clean up after others", extra={"error": left.what})


async def outlast(
    held: Callable[[], Awaitable[int]],
    config: Config,
    clock: Callable[[], float],
    say: Callable[[str], None],
) -> Left | None:
    """Wait until virtual servers hold no connections, and remove them; return what is left.

    It is waited for no longer than ``ipvs.drainTimeout``: then the connections end with them.
    ``held`` may raise ``OSError``: nobody knows then whether there are any, and it is asked again.
    """
    until, tell_at = clock() + config.ipvs.drain_timeout_seconds, clock()
    while (count := await counted(held)) and (rest := until - clock()) > 0:
        if clock() >= tell_at:
            say(f"waiting for {count} connections of virtual servers, for {rest:.0f} s at most")
            tell_at = clock() + TELL_SECONDS
        await asyncio.sleep(LOOK_SECONDS)
    if count:
        say(f"{count} connections of virtual servers end now, as ipvs.drainTimeout asks")
    return await cleaned_up_after_others(config, patient=False)


async def counted(held: Callable[[], Awaitable[int]]) -> int | str:
    """Return how many there are, or in words that nobody knows."""
    try:
        return await held()
    except OSError as error:
        return f"an unknown number ({error.strerror}) of"


async def cleaned_up_after_others(config: Config, *, patient: bool = True) -> Left | None:
    """Remove what kube-proxy or another mode left, once ours works; return what is left.

    ``patient``: virtual servers that have connections stay until these end. Beside another proxy,
    only what another of our modes left is removed.
    A process of its own, so that this one never imports a mode that it does not run.
    """
    words = child.command("pyproxy", "cleanup", f"--keep={config.mode}")
    seconds = config.ipvs.drain_timeout_seconds if patient else 0.0
    words.append(f"--ipvs-drain-timeout={duration_text(seconds)}")
    if config.ipvs.exclude_cidrs:
        words.append(f"--ipvs-exclude-cidrs={','.join(config.ipvs.exclude_cidrs)}")
    if config.service_proxy_name:
        words.append(f"--service-proxy-name={config.service_proxy_name}")
    try:
        async with asyncio.timeout(CLEANUP_SECONDS):
            process = await asyncio.create_subprocess_exec(
                *words,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=child.environment(),
            )
            output, _ = await process.communicate()
    except TimeoutError:
        return Left(f"no end after {CLEANUP_SECONDS:.0f} s", waits=False)
    except OSError as error:
        return Left(str(error), waits=False)
    if not process.returncode:
        return None
    lines = output.decode(errors="replace").splitlines()[-3:]
    told = "; ".join(line.removeprefix("pyproxy: ") for line in lines)
    return Left(told, waits=process.returncode == WAITS)
