"""Keeps what the API server said on disk, and goes by it when a start finds the server away.

What changes after the file was written is appended before anybody hears of it, and a file that
cannot be continued is removed: a start that went by an older word would take away what works. Only
a list has nothing appended, and makes a new file due at once.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pyproxy.feed import Between, Feed
from pyproxy.metrics import Metrics
from pyproxy.model import KINDS, Change, Kind, Replace
from pyproxy.state import LastKnown, StateError, appended, read, read_head

MAX_BYTES = 256 << 20
FILE = "state"

log = logging.getLogger(__name__)


class Times(NamedTuple):
    """In seconds."""

    patience: float = 5.0  # that a start waits for the API server's lists
    delay: float = 30.0  # from a change to a new file
    hurry: float = 0.5  # the same where there is none to append to


class RememberedFeed(Between):
    """A feed whose objects outlive the process. ``origin`` says whose they are."""

    def __init__(
        self, feed: Feed, folder: Path, origin: str, metrics: Metrics, unix: Callable[[], float]
    ) -> None:
        super().__init__(feed)
        self._unix = unix
        self.times = Times()
        self._path = folder / FILE
        self._origin = origin
        self._metrics = metrics
        self._known = LastKnown()
        self._fresh: set[Kind] = set()  # kinds that this process has a list of
        self._stale: set[Kind] = set()  # kinds that are known from the file only
        self._changed = asyncio.Event()
        self._trouble: str | None = None
        self._journal: Journal | None = None  # the file, once it has all that we know
        self._saving: list[bytes] | None = None  # changes of while it is written
        self._urgent = asyncio.Event()
        self._writing: asyncio.Future[None] | None = None  # a thread, which nothing can cancel
        self._on_change: Callable[[Change], None] = self._known.see

    async def follow(self, on_change: Callable[[Change], None]) -> None:
        self._on_change = on_change
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._feed.follow(self._take_in), name="follow the API server")
            tasks.create_task(self._fall_back(), name="known state")
            tasks.create_task(self._save_changes(), name="save state")

    async def aclose(self) -> None:
        has_all = self._journal is not None and self._saving is None
        if self._knows_all() and not has_all:
            await self._save()
        self._close_journal()
        await super().aclose()

    def _knows_all(self) -> bool:
        """Whether nothing is missing, nor known from the file only: another file is better."""
        return set(KINDS) <= self._fresh

    def _take_in(self, change: Change) -> None:
        self._known.see(change)
        self._append(change)
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
            known = await gathered(read(data))
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
                change = Replace(kind, known.objects(kind), head.saved_at)
                self._known.see(change)
                self._on_change(change)
        if self._stale:
            fields = {"kinds": ",".join(sorted(self._stale)), "age_seconds": age}
            log.warning("the API server is away: going by what it said before", extra=fields)

    def _append(self, change: Change) -> None:
        """Continue the file with a change; a list makes a new file due instead, at once."""
        if isinstance(change, Replace):
            self._close_journal()
            self._saving = None
            return
        try:
            if self._saving is not None:
                self._saving.append(appended(change))
            if self._journal is not None:
                self._journal.append(appended(change))
        except OSError as error:
            self._complain(error)
            self._close_journal()
            self._remove_file()

    def _remove_file(self) -> None:
        """Let no start go by a file that lacks what we have passed on."""
        with suppress(OSError):
            self._path.unlink()

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._urgent.set()

    async def _save_changes(self) -> None:
        while True:
            await self._changed.wait()
            if self._journal is not None or self._trouble is not None:
                self._urgent.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self.times.delay):
                        await self._urgent.wait()
            await asyncio.sleep(self.times.hurry)
            if self._knows_all():
                self._changed.clear()
                await self._save()

    async def _save(self) -> None:
        """Replace the file at once or not at all, and append to it from now on."""
        since = self._saving = []
        parts: list[bytes] = []
        for part in self._known.records(self._origin, self._unix()):
            parts.append(part)
            await asyncio.sleep(0)
        data = b"".join(parts)
        try:
            if len(data) > MAX_BYTES:
                raise OSError(0, f"{len(data)} bytes are more than {MAX_BYTES}")
            await self._replace_file(data)
            self._close_journal()
            if self._saving is since:  # else there was a list meanwhile: all is to be written anew
                self._journal = Journal(self._path, len(data))
                self._journal.append(b"".join(since))
        except OSError as error:
            self._complain(error)
            if self._journal is None:  # else the old file is still continued
                self._remove_file()
        else:
            self._trouble = None
        self._saving = None

    async def _replace_file(self, data: bytes) -> None:
        """Write after whoever writes already, also if we are cancelled. Raises ``OSError``."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
        loop = asyncio.get_running_loop()
        self._writing = loop.run_in_executor(None, replace_file, self._path, data)
        await asyncio.shield(self._writing)

    def _complain(self, error: OSError) -> None:
        if error.strerror != self._trouble:
            extra = {"file": str(self._path), "error": error.strerror}
            log.warning("cannot save what is known of the cluster", extra=extra)
        self._trouble = error.strerror


class Journal:
    """The end of a file, to which changes are appended."""

    def __init__(self, path: Path, size: int) -> None:
        """Raises ``OSError``."""
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._size = size

    def append(self, data: bytes) -> None:
        """Write to the kernel's memory, which outlives this process. Raises ``OSError``."""
        self._size += len(data)
        if self._size > MAX_BYTES:
            raise OSError(0, f"{self._size} bytes are more than {MAX_BYTES}")
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._handle, rest) :]

    def close(self) -> None:
        os.close(self._handle)


async def gathered(batches: Iterator[Iterable[Change]]) -> LastKnown:
    """Raises ``StateError``."""
    found = LastKnown()
    for batch in batches:
        for change in batch:
            found.see(change)
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
