"""Keeps what the API server said on disk, and goes by it when a start finds the server away."""

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pyproxy.app import Feed
from pyproxy.metrics import Metrics
from pyproxy.model import ApiObject, Change, Kind, ObjectName, Replace
from pyproxy.state import KINDS, LastKnown, StateError, read, read_head

MAX_BYTES = 256 << 20
FILE = "state"

log = logging.getLogger(__name__)


class Times(NamedTuple):
    """In seconds."""

    patience: float = 5.0  # that a start waits for the API server's lists
    delay: float = 30.0  # from a change to the file


class RememberedFeed:
    """A feed whose objects outlive the process. ``origin`` says whose they are."""

    def __init__(
        self, feed: Feed, folder: Path, origin: str, metrics: Metrics, unix: Callable[[], float]
    ) -> None:
        self._unix = unix
        self.times = Times()
        self._feed = feed
        self._path = folder / FILE
        self._origin = origin
        self._metrics = metrics
        self._known = LastKnown()
        self._fresh: set[Kind] = set()  # kinds that this process has a list of
        self._stale: set[Kind] = set()  # kinds that are known from the file only
        self._changed = asyncio.Event()
        self._trouble: str | None = None
        self._on_change: Callable[[Change], None] = self._known.see

    async def follow(self, on_change: Callable[[Change], None]) -> None:
        self._on_change = on_change
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._feed.follow(self._take_in), name="follow the API server")
            tasks.create_task(self._fall_back(), name="known state")
            tasks.create_task(self._save_changes(), name="save state")

    async def record(
        self, reason: str, message: str, *, warning: bool, action: str, service: ObjectName | None
    ) -> None:
        await self._feed.record(reason, message, warning=warning, action=action, service=service)

    async def annotate(self, annotations: Mapping[str, str]) -> str | None:
        return await self._feed.annotate(annotations)

    async def aclose(self) -> None:
        if self._changed.is_set() and not self._stale and self._fresh:
            await self._save()
        await self._feed.aclose()

    def _take_in(self, change: Change) -> None:
        self._known.see(change)
        self._on_change(change)
        self._changed.set()
        if isinstance(change, Replace) and change.kind not in self._fresh:
            self._fresh.add(change.kind)
            if change.kind in self._stale:
                self._stale.remove(change.kind)
                self._metrics.stale(change.kind, stale=False)
                log.info("known again from the API server", extra={"kind": change.kind})

    async def _fall_back(self) -> None:
        """Where the API server has not told of all kinds in time, take them from the file."""
        await asyncio.sleep(self.times.patience)
        missing = set(KINDS) - self._fresh
        if not missing:
            return
        try:
            data = await asyncio.to_thread(self._path.read_bytes)
            head = read_head(data)
            if head.origin != self._origin:
                raise StateError(f"it is for {head.origin}")
            objects = await gathered(read(data))
        except (OSError, StateError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            log.warning(
                "the API server is away, and no earlier state is of use",
                extra={"file": str(self._path), "reason": why},
            )
            return
        age = round(self._unix() - head.saved_at)
        for kind in KINDS:
            if kind not in self._fresh:  # it may be here by now
                self._stale.add(kind)
                self._metrics.stale(kind, stale=True)
                change = Replace(kind, tuple(objects[kind]), head.saved_at)
                self._known.see(change)
                self._on_change(change)
        if self._stale:
            fields = {"kinds": ",".join(sorted(self._stale)), "age_seconds": age}
            log.warning("the API server is away: going by what it said before", extra=fields)

    async def _save_changes(self) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(self.times.delay)
            if not self._stale and set(KINDS) <= self._fresh:
                self._changed.clear()
                await self._save()

    async def _save(self) -> None:
        """Replace the file at once or not at all."""
        parts: list[bytes] = []
        for part in self._known.records(self._origin, self._unix()):
            parts.append(part)
            await asyncio.sleep(0)
        data = b"".join(parts)
        try:
            if len(data) > MAX_BYTES:
                raise OSError(0, f"{len(data)} bytes are more than {MAX_BYTES}")
            await asyncio.to_thread(replace_file, self._path, data)
        except OSError as error:
            if error.strerror != self._trouble:
                extra = {"file": str(self._path), "error": error.strerror}
                log.warning("cannot save what is known of the cluster", extra=extra)
            self._trouble = error.strerror
        else:
            self._trouble = None


async def gathered(
    batches: Iterator[tuple[Kind, tuple[ApiObject, ...]]],
) -> dict[Kind, list[ApiObject]]:
    found: dict[Kind, list[ApiObject]] = {kind: [] for kind in KINDS}
    for kind, objects in batches:
        found[kind] += objects
        await asyncio.sleep(0)
    return found


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that others see as it was before, or whole. Raises ``OSError``."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
