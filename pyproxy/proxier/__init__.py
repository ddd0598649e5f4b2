"""The proxy modes. A mode is a module in this folder, and its name is the file's.

A mode that is not chosen is never imported. Files that begin with ``_`` are shared parts.
"""

import asyncio
import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pyproxy.config import Config
from pyproxy.host import Host
from pyproxy.model import Family, Node, Proto
from pyproxy.reconcile import Clock, Proxier
from pyproxy.report import RestoreReport

WORKER_MODULE = "pyproxy.worker"  # where a worker process of a mode begins
PREFERENCE = ("nftables", "iptables", "ipvs", "userspace")  # for ``auto``, best first


@dataclass(frozen=True, slots=True)
class Env:
    """What a mode is built from, for one family."""

    family: Family
    config: Config
    clock: Clock
    tasks: asyncio.TaskGroup  # for what lives as long as the process
    host: Host
    node: Node | None
    node_ips: tuple[str, ...]  # of the Node object, both families, the primary one first
    observe: Callable[[Proto, str], None]  # a connection's result, for the metrics
    service_cidrs: Callable[[], tuple[str, ...]] = tuple  # of both families, as of now
    resync: Callable[[], None] = lambda: None  # ask for a sync that compares everything
    cleaned: Callable[[float, int], None] = lambda seconds, flows: None  # of conntrack
    # Others changed so much of a table: the count, and who it may have been.
    drifted: Callable[[str, int, str], None] = lambda table, count, who: None
    restored: Callable[[RestoreReport], None] = lambda report: None
    worker_lost: Callable[[], None] = lambda: None  # a worker process ended by itself
    # A metric that the kernel counts, and how to read it; and packets by chain of a table.
    counted: Callable[[str, Callable[[], int | None]], None] = lambda metric, read: None
    passed: Callable[[str, Mapping[str, int]], None] = lambda table, packets: None


class Mode(Protocol):
    """What a module in this folder defines."""

    def unsupported(self) -> str | None:
        """Say why this node cannot run the mode; None if it can."""
        ...

    def settled(self, config: Config) -> Config:
        """Return the settings with what ``auto`` means on this node. Raises ``LookupError``."""
        ...

    def prepare(self, config: Config) -> tuple[str, ...]:
        """Set what the mode needs of the kernel and outlives it; return what could not be set."""
        ...

    def build(self, env: Env) -> Proxier:
        """Return the proxier of one family. It opens nothing: the first sync does."""
        ...

    def fixed(self, env: Env) -> Sequence[tuple[str, str, str]]:
        """Return what is to be written besides for Services, as of now, as ``rules.entries`` do."""
        ...

    async def cleanup(self, family: Family, config: Config, /, *, ours: bool = True) -> str | None:
        """Remove every trace of the mode and of its like in kube-proxy; return what went wrong.

        Without ``ours``, remove only what kube-proxy alone can have left. Beside another proxy,
        what that one may have written stays.
        """
        ...


def modes() -> tuple[str, ...]:
    """Return the names of all modes there are, the preferred first."""
    found = {m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")}
    return tuple(name for name in PREFERENCE if name in found)


def load(name: str) -> Mode:
    """Import a mode. Raises ``KeyError`` when there is none of this name."""
    if name not in modes():
        raise KeyError(name)
    mode: Mode = importlib.import_module(f"{__name__}.{name}")
    return mode


def best(among: Collection[str] = PREFERENCE) -> str:
    """Return the name of the first of some modes that this node supports."""
    return next(n for n in modes() if n in among and load(n).unsupported() is None)
