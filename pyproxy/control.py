"""Answers commands on a Unix socket: HTTP and JSON, for root alone."""

import asyncio
import fcntl
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import IO, Final

import msgspec
from aiohttp import web
from msgspec.structs import replace

from pyproxy import __version__
from pyproxy.debug import sent
from pyproxy.health import JSON_HEADERS, rfc3339
from pyproxy.health import Answer as HttpAnswer
from pyproxy.http import Responder
from pyproxy.questions import QUESTIONS, SHEETS, VERSION, Sheet
from pyproxy.view import Answer, Complaint, NotThereError, Query, QueryError, View, asked_services

AGAIN_SECONDS: Final = 5.0  # until a path that another process has is tried again
PASS_SECONDS: Final = 0.005  # one pass on the event loop

encode: Final = msgspec.json.encode
log = logging.getLogger(__name__)

LiveQuestion = Callable[[Query], Awaitable[Answer]]


class TakenError(Exception):
    """Another process answers at the path."""


class About(Answer, frozen=True):
    """The answer of ``/v1/about``: who answers here."""

    node: str
    mode: str
    version: str
    pid: int
    started: str
    families: tuple[int, ...]


class Control:
    """The API at one path. Questions about the state alone are in ``questions``; others, ``live``.

    Where the path cannot be had, the proxy works without: that is told once, and tried again.
    """

    def __init__(
        self, path: str, view: Callable[[], View], started_at: float,
        live: Mapping[str, LiveQuestion],
    ) -> None:  # fmt: skip
        self._path = Path(path)
        self._view = view
        self._started_at = started_at
        self._live = live

    async def run(self) -> None:
        """Serve until cancelled."""
        told = ""
        while True:
            try:
                with locked(self._path):
                    await self._serve()
            except (OSError, TakenError) as error:
                text = str(error) if isinstance(error, TakenError) else error.strerror
                if text != told:
                    told = text or ""
                    about = {"socket": str(self._path), "reason": told}
                    log.warning("commands find no socket", extra=about)
            await asyncio.sleep(AGAIN_SECONDS)

    async def _serve(self) -> None:
        bound = bound_socket(self._path)
        responder = Responder(self._answered)
        try:
            await responder.open_unix(bound)
            log.info("listening", extra={"server": "control", "bind": str(self._path)})
            await asyncio.get_running_loop().create_future()
        finally:
            await responder.close()
            self._path.unlink(missing_ok=True)

    async def _answered(self, request: web.BaseRequest) -> web.Response:
        try:
            return json(200, await self._answer(request.path, dict(request.query)))
        except QueryError as error:
            return json(400, encode(Complaint(str(error))))
        except NotThereError as error:
            return json(404, encode(Complaint(str(error))))

    async def _answer(self, path: str, query: Query) -> bytes:
        name = path.removeprefix(f"/{VERSION}/")
        if name == "about":
            return encode(about(self._view(), self._started_at))
        if name in self._live:
            return encode(await self._live[name](query))
        if name in SHEETS:
            return await patiently(SHEETS[name], self._view(), query)
        if name not in QUESTIONS:
            known = ", ".join(["about", *QUESTIONS, *self._live])
            raise NotThereError(f"{path}: there is /{VERSION}/ and one of {known}")
        return encode(QUESTIONS[name](self._view(), query))


async def patiently(sheet: Sheet, view: View, query: Query) -> bytes:
    """Return the JSON of a sheet, made in small steps: connections are served in between.

    A Service may change meanwhile; each row is as things were when it was made.
    """
    now = asyncio.get_running_loop().time
    resumed_at = now()
    rows: list[msgspec.Raw] = []
    for service in asked_services(view, query):
        rows += [msgspec.Raw(encode(row)) for row in sheet.rows(view, service)]
        if now() - resumed_at > PASS_SECONDS:
            await asyncio.sleep(0)
            resumed_at = now()
    return encode(replace(sheet.whole(view, ()), items=tuple(rows)))


def about(view: View, started_at: float) -> About:
    families = tuple(family.family for family in view.families)
    return About(view.node, view.mode, __version__, os.getpid(), rfc3339(started_at), families)


def json(status: int, body: bytes) -> web.Response:
    return sent(HttpAnswer(status, JSON_HEADERS, body + b"\n"))


def locked(path: Path) -> IO[bytes]:
    """Return a file that only one process can have open so; it makes the folder.

    Raises ``TakenError``, and OSError. A lock tells who is alive without asking: a process that
    ends, however it ends, lets go of it. The file stays, as its removal would be a race. Who may
    only read a file can lock it, so that nobody else may.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
    file = os.fdopen(os.open(path.with_name(f"{path.name}.lock"), flags, 0o600), "wb")
    try:
        os.fchmod(file.fileno(), 0o600)  # it may be of an earlier version
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise TakenError("another pyproxy answers there") from None
    except OSError:
        file.close()
        raise
    return file


def bound_socket(path: Path) -> socket.socket:
    """Return a socket at the path, for its owner alone; one that was left there is replaced.

    Raises OSError; also for a path that is anything but a socket.
    """
    if path.is_socket():
        path.unlink()
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(bound.fileno(), 0o600)  # before there is a path: nobody gets in meanwhile
        bound.bind(str(path))
    except OSError:
        bound.close()
        raise
    bound.setblocking(False)
    return bound
