"""The kernel settings of connection tracking: which, and setting them.

Nothing here is fatal: where a setting cannot be made the node still forwards, with the limits
that it has. A setting that has the wanted value already is not written, so that a process
without the right to write finds nothing to complain about.
"""

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec import Struct

from pyproxy.config import Conntrack

PREFIX = "net/netfilter/nf_conntrack_"
MAX = PREFIX + "max"
MAX_AT_MOST = 1 << 20
FLOWS_PER_BUCKET = 4

HASHSIZE = Path("sys/module/nf_conntrack/parameters/hashsize")
SYSCTLS = Path("proc/sys")
CPUS = Path("sys/devices/system/cpu")


class Unset(Struct, frozen=True):
    """A setting that could not be made."""

    name: str
    value: int
    reason: str

    def __str__(self) -> str:
        return f"cannot set {self.name} to {self.value}: {self.reason}"


# --- which ----------------------------------------------------------------------------------------


def wanted(conntrack: Conntrack, cpu_count: int) -> Mapping[str, int]:
    """Return the value of each sysctl to set, in the order of setting them.

    A zero leaves the kernel's value, and ``tcp_be_liberal`` that is off is not switched off:
    the administrator may have switched it on.
    """
    values = {
        MAX: max_flows(conntrack, cpu_count),
        PREFIX + "tcp_timeout_established": int(conntrack.tcp_established_timeout_seconds),
        PREFIX + "tcp_timeout_close_wait": int(conntrack.tcp_close_wait_timeout_seconds),
        PREFIX + "tcp_be_liberal": int(conntrack.tcp_be_liberal),
        PREFIX + "udp_timeout": int(conntrack.udp_timeout_seconds),
        PREFIX + "udp_timeout_stream": int(conntrack.udp_stream_timeout_seconds),
    }
    return {name: value for name, value in values.items() if value > 0}


def max_flows(conntrack: Conntrack, cpu_count: int) -> int:
    """Return how many flows may be tracked, 0 to leave that alone.

    The upper limit is for machines with hundreds of CPUs and holds against the default, not
    against an explicit minimum.
    """
    if conntrack.max_per_core <= 0:
        return 0
    scaled = conntrack.max_per_core * cpu_count
    return MAX_AT_MOST if scaled > MAX_AT_MOST else max(scaled, conntrack.min)


def wanted_hashsize(max_count: int, current: int) -> int | None:
    """Return the size that the hash table needs, None if it is large enough."""
    needed = max_count // FLOWS_PER_BUCKET
    return needed if current < needed else None


# --- setting them ---------------------------------------------------------------------------------


def set_limits(conntrack: Conntrack, root: Path = Path("/")) -> tuple[str, ...]:
    """Set the limits and times of connection tracking; return what could not be set, and why."""
    return tuple(str(unset) for unset in apply(wanted(conntrack, count_cpus(root)), root))


def is_tracking(root: Path = Path("/")) -> bool:
    """Say whether the kernel tracks connections; to ask does not have it begin."""
    return (root / SYSCTLS / MAX).exists()


def apply(values: Mapping[str, int], root: Path = Path("/")) -> tuple[Unset, ...]:
    """Set what differs; return what could not be set."""
    return tuple(problems(values, root))


def problems(values: Mapping[str, int], root: Path) -> Iterator[Unset]:
    for name, value in values.items():
        reason = put(root / SYSCTLS / name, value)
        if reason is not None:
            yield Unset(name.replace("/", "."), value, reason)
        if name == MAX:
            yield from enlarged_hash(value, root)


def enlarged_hash(max_count: int, root: Path) -> Iterator[Unset]:
    try:
        current = int((root / HASHSIZE).read_text())
    except (OSError, ValueError):
        return  # not this kernel's name for it: the table has the size it has
    size = wanted_hashsize(max_count, current)
    reason = put(root / HASHSIZE, size) if size is not None else None
    if size is not None and reason is not None:
        yield Unset("nf_conntrack hashsize", size, reason)


def put(path: Path, value: int) -> str | None:
    """Write a value where another one is; return why it could not be done."""
    try:
        if path.read_text().strip() != str(value):
            path.write_text(f"{value}\n")
    except FileNotFoundError:
        return "this kernel has no such setting, or nf_conntrack is not loaded"
    except OSError as error:
        return os.strerror(error.errno or errno.EIO)
    return None


def count_cpus(root: Path = Path("/")) -> int:
    """Return how many CPUs are online, whichever of them this process may use."""
    online = sum(1 for _cpu in (root / CPUS).glob("cpu[0-9]*/topology"))
    return online or os.cpu_count() or 1
