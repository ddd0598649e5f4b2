"""Looks into the running process, for a person who asks over HTTP."""

import asyncio
import io
import re
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from pyproxy.health import JSON_HEADERS, Answer

Page = Callable[[web.BaseRequest], web.Response | Awaitable[web.Response]]

PROFILE_SECONDS: Final = 30  # unless asked otherwise, as Go's profiler
PROFILE_SECONDS_MAX: Final = 300
PROFILE_ROWS: Final = 200
VERBOSITY_BYTES_MAX: Final = 64
TEXT: Final = {**JSON_HEADERS, "Content-Type": "text/plain; charset=utf-8"}


class Debug:
    """Looks into the running process; only there if profiling is enabled."""

    def __init__(self, set_verbosity: Callable[[int], None]) -> None:
        self._set_verbosity = set_verbosity
        self._is_profiling = False

    def pages(self) -> dict[str, Page]:
        return {
            "/debug/flags": lambda _: text("v\n"),
            "/debug/flags/v": self._put_verbosity,
            "/debug/pprof/": lambda _: text("profile?seconds=N\ntasks\n"),
            "/debug/pprof/profile": self._profile,
            "/debug/pprof/tasks": lambda _: text(_tasks()),
        }

    async def _put_verbosity(self, request: web.BaseRequest) -> web.Response:
        if request.method != "PUT":
            return text("use PUT\n", 405, Allow="PUT")
        level = (await request.content.read(VERBOSITY_BYTES_MAX)).strip()
        if not re.fullmatch(rb"[0-9]{1,2}", level):
            return text("v: not a number in 0..99\n", 400)
        self._set_verbosity(int(level))
        return text(f"v is now {int(level)}\n")

    async def _profile(self, request: web.BaseRequest) -> web.Response:
        """Profile the event loop's thread for some seconds; print where they went."""
        asked = request.query.get("seconds", str(PROFILE_SECONDS))
        seconds = float(asked) if re.fullmatch(r"\d{1,3}(\.\d+)?", asked, re.ASCII) else 0.0
        if not 0 < seconds <= PROFILE_SECONDS_MAX:
            return text(f"seconds: {asked!r} is not in 0..{PROFILE_SECONDS_MAX}\n", 400)
        if self._is_profiling:
            return text("a profile is being taken\n", 409)
        self._is_profiling = True
        try:
            return text(await _profiled(seconds))
        finally:
            self._is_profiling = False


def sent(answer: Answer) -> web.Response:
    # Named, lest aiohttp tell everybody its version and Python's.
    headers = {**answer.headers, "Server": "pyproxy"}
    return web.Response(status=answer.status, headers=headers, body=answer.body)


def text(body: str, status: int = 200, **headers: str) -> web.Response:
    return sent(Answer(status, {**TEXT, **headers}, body.encode()))


def _tasks() -> str:
    """Return the event loop's tasks, each with the line at which it waits."""
    lines = []
    for task in sorted(asyncio.all_tasks(), key=lambda task: task.get_name()):
        frames = task.get_stack(limit=1)
        where = f"{frames[0].f_code.co_filename}:{frames[0].f_lineno}" if frames else "not begun"
        lines.append(f"{task.get_name()} at {where}\n")
    return "".join(lines)


async def _profiled(seconds: float) -> str:
    # Imported here: half a megabyte for what nearly no process ever does.
    import cProfile
    import pstats

    profile = cProfile.Profile()
    profile.enable()
    try:
        await asyncio.sleep(seconds)
    finally:
        profile.disable()
    output = io.StringIO()
    pstats.Stats(profile, stream=output).sort_stats("cumulative").print_stats(PROFILE_ROWS)
    return output.getvalue()
