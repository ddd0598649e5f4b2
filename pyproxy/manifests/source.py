"""Services and endpoints from manifest files: reads them, and notices when they change.

Files are looked at once in each poll interval, and read only when their status has changed: this
works on every file system, with editors that rename, and with mounted ConfigMaps, which swap a
symbolic link.
"""

import asyncio
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from pyproxy.ip import parse_network
from pyproxy.manifests.objects import Documents
from pyproxy.manifests.resolve import Manifests, Settings, Step, Unreadable
from pyproxy.manifests.text import ManifestTextError, documents_of
from pyproxy.model import Change, Network

SUFFIXES: Final = (".yaml", ".yml", ".json")
MAX_BYTES: Final = 64 * 2**20
SETTLE_SECONDS: Final = 0.05
MAX_SETTLES: Final = 20

log = logging.getLogger(__name__)


class ManifestError(Exception):
    """The source cannot start as it was asked to; the message is one line that says what to do."""


class Status(NamedTuple):
    """What differs after a file was written, replaced or made readable."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int
    mode: int


Listing = Mapping[str, Status | Unreadable]


class ManifestSource:
    """Follows one file, or all manifests in a directory and below it.

    Hidden files and directories do not count, and symbolic links to directories are not followed:
    editors and mounted ConfigMaps keep second copies there.
    """

    def __init__(
        self,
        path: str | Path,
        node_name: str,
        service_cidrs: Sequence[str],
        poll_seconds: float = 1.0,
        proxy_name: str = "",
    ) -> None:
        self._path = Path(path)
        self._poll_seconds = poll_seconds
        ranges = _one_of_each_family(service_cidrs)
        self._manifests = Manifests(Settings(node_name, ranges, proxy_name))
        self._listing: Listing = {}
        self._contents: dict[str, Documents | Unreadable] = {}
        self._trouble: str | None = None

    def check(self) -> None:
        """Raise ManifestError unless the path is a file or directory that can be opened."""
        try:
            _listed(self._path)
        except OSError as error:
            raise ManifestError(
                f"--manifests {self._path}: {error.strerror}; create it, or give the path of "
                "a file or directory with Services in YAML or JSON"
            ) from error

    async def follow(
        self, on_change: Callable[[Change], None], on_error: Callable[[str], None]
    ) -> None:
        """Tell what the files mean, and again each time that it changes; never returns.

        First comes one Replace for each kind, even if it has no objects: everything is listed
        then. An error is told when it appears and once more when it is gone. If the path itself
        vanishes, what was read last stays: a file system that is not mounted removes no Service.
        """
        await asyncio.to_thread(self.check)
        step: Step | None = await asyncio.to_thread(self._first_step)
        while True:
            if step is not None:
                _tell(step, on_change, on_error)
            await asyncio.sleep(self._poll_seconds)
            step = await self._next_step(on_error)

    async def _next_step(self, on_error: Callable[[str], None]) -> Step | None:
        """Look once; return what has changed since the last look, if anything has."""
        trouble: str | None = None
        step: Step | None = None
        try:
            listing = await asyncio.to_thread(_listed, self._path)
            if listing != self._listing:
                listing = await self._settled(listing)
                step = await asyncio.to_thread(self._step, listing)
        except OSError as error:
            trouble = f"{self._path}: {error.strerror}; what was read last stays"
        if trouble != self._trouble:
            on_error(trouble or f"mended: {self._trouble}")
        self._trouble = trouble
        return step

    async def _settled(self, listing: Listing) -> Listing:
        """Wait until nobody writes any more: half a file is short, not wrong.

        Without this the Services at its end would be removed for a moment.
        """
        for _ in range(MAX_SETTLES):
            await asyncio.sleep(min(SETTLE_SECONDS, self._poll_seconds))
            before, listing = listing, await asyncio.to_thread(_listed, self._path)
            if before == listing:
                break
        return listing

    def _first_step(self) -> Step:
        return self._step(_listed(self._path))

    def _step(self, listing: Listing) -> Step:
        """Read what differs from the last listing. Runs in a thread, one call at a time."""
        contents: dict[str, Documents | Unreadable] = {}
        for file, status in listing.items():
            if self._listing.get(file) == status and file in self._contents:
                contents[file] = self._contents[file]
            elif (content := _content(_path_of(self._path, file), status)) is not None:
                contents[file] = content
        self._listing, self._contents = listing, contents
        return self._manifests.receive(contents)


def _one_of_each_family(texts: Sequence[str]) -> tuple[Network, ...]:
    networks = []
    for text in texts:
        network = parse_network(text)
        if network is None:
            raise ManifestError(f"--service-cidr: {text} is not a range; write 10.96.0.0/16")
        networks.append(network)
    versions = [network.version for network in networks]
    if len(set(versions)) < len(versions):
        raise ManifestError(
            f"--service-cidr: {','.join(texts)} has two of one family; give one of each"
        )
    return tuple(networks)


def _tell(step: Step, on_change: Callable[[Change], None], on_error: Callable[[str], None]) -> None:
    for note in step.notes:
        log.info("manifest", extra={"note": note})
    for error in step.errors:
        on_error(error)
    for error in step.mended:
        on_error(f"mended: {error}")
    for change in step.changes:
        on_change(change)


def _listed(path: Path) -> Listing:
    """Return the manifests there are, by path below ``path``, sorted.

    Raises OSError where a directory cannot be read: its files are not gone, they are unknown.
    """
    if not stat.S_ISDIR(path.stat().st_mode):
        status = _status(path)
        return {path.name: status} if status is not None else {}
    found = {str(file.relative_to(path)): status for file, status in _statuses(path)}
    return dict(sorted(found.items()))


def _statuses(path: Path) -> Iterator[tuple[Path, Status | Unreadable]]:
    for folder, subfolders, names in os.walk(path, onerror=_refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if name.endswith(SUFFIXES) and not name.startswith("."):
                file = Path(folder, name)
                if (status := _status(file)) is not None:
                    yield file, status


def _refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # removed while we walk: that is an answer
        raise error


def _status(file: Path) -> Status | Unreadable | None:
    """Return None for a file that was removed meanwhile, or a link that leads nowhere."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return Unreadable(error.strerror or str(error))
    return Status(
        found.st_dev,
        found.st_ino,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
        found.st_mode,
    )


def _path_of(path: Path, file: str) -> Path:
    return path / file if path.is_dir() else path


def _content(file: Path, status: Status | Unreadable) -> Documents | Unreadable | None:
    """Return the documents of a file; None if it was removed meanwhile."""
    if isinstance(status, Unreadable):
        return status
    # To open a pipe or a device would wait for whoever is at its other end.
    if not stat.S_ISREG(status.mode):
        return Unreadable("it is not a regular file")
    if status.size > MAX_BYTES:
        return Unreadable(f"it is larger than {MAX_BYTES >> 20} MiB")
    try:
        return documents_of(file.read_text(encoding="utf-8-sig"), is_json=file.suffix == ".json")
    except FileNotFoundError:
        return None
    except OSError as error:
        return Unreadable(error.strerror or str(error))
    except UnicodeDecodeError as error:
        return Unreadable(f"byte {error.start} is not UTF-8")
    except ManifestTextError as error:
        return Unreadable(str(error))
