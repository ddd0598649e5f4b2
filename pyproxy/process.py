"""What the process asks of the operating system: time, limits, its file, which families."""

import asyncio
import gc
import logging
import os
import resource
import time
from pathlib import Path

from pyproxy.app import Fatal
from pyproxy.model import Family

WANTED_FILES = 1 << 20  # a socket for each frontend, two for each connection
CONFIG_POLL_SECONDS = 1.0

log = logging.getLogger(__name__)


class SystemClock:
    """The time of this machine."""

    monotonic = staticmethod(time.monotonic)
    unix = staticmethod(time.time)  # noqa: TID251 - this is the clock that others are given


def raise_file_limit() -> int:
    """Allow as many open files as may be; return how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ceiling = int(Path("/proc/sys/fs/nr_open").read_text())
    for wanted in (min(WANTED_FILES, ceiling), hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, hard)))
        except (ValueError, OSError):
            continue
        return wanted
    return soft


def calm_collector() -> None:
    """Let the garbage collector look less often: nearly all we allocate is there to stay.

    With Python's own thresholds, loading 100,000 endpoints spends a quarter of its time in it.
    """
    gc.set_threshold(50_000, 20, 100)


def adjust_oom_score(value: int) -> None:
    """Tell the kernel how readily to kill us when memory ends; a refusal is only logged."""
    try:
        Path("/proc/self/oom_score_adj").write_text(str(value))
    except OSError as error:
        log.info("oom_score_adj stays", extra={"wanted": value, "error": error.strerror})


def families() -> tuple[Family, ...]:
    """Return the IP families of this network namespace."""
    disabled = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6")
    try:
        has_ipv6 = Path("/proc/net/if_inet6").exists() and disabled.read_text().strip() != "1"
    except OSError:
        has_ipv6 = False
    return (4, 6) if has_ipv6 else (4,)


async def until_changed(path: Path, text: str) -> None:
    """Watch a configuration file that said ``text``. Raises ``Fatal`` when it may say another.

    A file that vanishes is waited for: that is how editors and ConfigMaps replace one.
    """
    before = identity(path)
    changed = not says(path, text)  # while we started
    while not changed:
        await asyncio.sleep(CONFIG_POLL_SECONDS)
        now = identity(path)
        changed = now is not None and now != before
    raise Fatal(f"configuration updated: {path} changed, a restart reads it")


def says(path: Path, text: str) -> bool:
    """Say whether the file still has this text, as far as it can be read."""
    try:
        return path.read_text(encoding="utf-8") == text
    except OSError:
        return True
    except UnicodeDecodeError:
        return False


def identity(path: Path) -> tuple[int, int, int] | None:
    """Return what a write or a rename changes, and a chmod does not."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
