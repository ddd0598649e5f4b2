"""Workers in this network namespace whose process that plans is gone, and that nobody met.

They are told by a signal. Workers that are not alone take no notice.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pyproxy.model import Family
from pyproxy.proxier import WORKER_MODULE

# Let nobody in any more, and end with the last connection. Who does not listen yet ignores it.
ANOTHER_SERVES = signal.SIGWINCH
END = signal.SIGTERM  # at once


def words(family: Family, fd: int) -> list[str]:
    """Return the module and the arguments of a worker, by which it is known."""
    return [WORKER_MODULE, f"IPv{family}", str(fd)]


def tell_leftovers(family: Family, number: signal.Signals) -> None:
    """Send a signal to all workers of a family here, also to those that are not alone."""
    for pid in workers_here(family):
        with suppress(OSError):  # it has ended
            os.kill(pid, number)


def workers_here(family: Family) -> Iterator[int]:
    """Yield the numbers of the worker processes of this network namespace."""
    own = os.stat("/proc/self/ns/net").st_ino
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if is_worker(process, family) and os.stat(process / "ns/net").st_ino == own:
                yield int(process.name)


def is_worker(process: Path, family: Family) -> bool:
    """Say whether a process is a worker, by its words. Raises ``OSError``."""
    wanted = {word.encode() for word in words(family, 0)[:-1]}
    return wanted <= set((process / "cmdline").read_bytes().split(b"\0"))
