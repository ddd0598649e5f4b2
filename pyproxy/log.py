"""The log: events with fields, as klog's text or as JSON, from the standard library's records.

``log.info`` is always written and ``log.debug`` from verbosity 4 on (8 for other packages);
``vlog`` names its verbosity itself. A pattern of vmodule replaces the verbosity for its files.
"""

import json
import logging
import sys
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import PurePath
from time import localtime, strftime
from typing import Final, TextIO

from pyproxy.config import Logging, LogStream, VModule

DEBUG_VERBOSITY: Final = 4
DEBUG_VERBOSITY_OF_OTHERS: Final = 8

_SEVERITIES: Final = {
    logging.DEBUG: "I",
    logging.INFO: "I",
    logging.WARNING: "W",
    logging.ERROR: "E",
    logging.CRITICAL: "F",
}
# What a record has by itself; all else came with ``extra``.
_OWN_ATTRIBUTES: Final = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "taskName",
    "fields",
    "verbosity",
}


class _Verbosity:
    """How much to log, for each source file."""

    def __init__(self) -> None:
        self._level = 0
        self._vmodule: tuple[VModule, ...] = ()
        self._level_by_file: dict[str, int] = {}

    def set_level(self, level: int) -> None:
        self._level = level
        self._level_by_file.clear()
        most = max([level, *(item.verbosity for item in self._vmodule)])
        # The root's level spares a debug call the making of a record that nobody will see.
        logging.getLogger().setLevel(logging.DEBUG if most >= DEBUG_VERBOSITY else logging.INFO)

    def set_vmodule(self, vmodule: tuple[VModule, ...]) -> None:
        self._vmodule = vmodule
        self.set_level(self._level)

    def allows(self, level: int, file: str) -> bool:
        if not self._vmodule:
            return level <= self._level
        if file not in self._level_by_file:
            self._level_by_file[file] = self._find(PurePath(file))
        return level <= self._level_by_file[file]

    def _find(self, file: PurePath) -> int:
        """Return the level of the first pattern that matches; one with a slash sees the path."""
        for item in self._vmodule:
            pattern = item.file_pattern
            names = (str(file.with_suffix("")),) if "/" in pattern else (file.stem, file.name)
            if any(fnmatchcase(name, pattern) for name in names):
                return item.verbosity
        return self._level


_VERBOSITY: Final = _Verbosity()
_HANDLERS: Final[list[logging.Handler]] = []  # ours, on the root logger


def setup(config: Logging, *, stderr: TextIO | None = None, stdout: TextIO | None = None) -> None:
    """Send all logging of the process where the settings say. A second call replaces the first."""
    root = logging.getLogger()
    for handler in _HANDLERS:
        root.removeHandler(handler)
    in_json = config.format == "json"
    options: LogStream = config.options.json if in_json else config.options.text
    errors = logging.StreamHandler(stderr or sys.stderr)
    _HANDLERS[:] = [errors]
    if options.split_stream:
        rest = logging.StreamHandler(stdout or sys.stdout)
        errors.setLevel(logging.ERROR)
        rest.addFilter(lambda record: record.levelno < logging.ERROR)
        _HANDLERS.append(rest)
    for handler in _HANDLERS:
        handler.setFormatter(_Formatter(_json_line if in_json else _text_line))
        handler.addFilter(_is_wanted)
        root.addHandler(handler)
    _VERBOSITY.set_vmodule(config.vmodule)
    _VERBOSITY.set_level(config.verbosity)


def set_verbosity(level: int) -> None:
    """Change how much is logged while the process runs; vmodule stays."""
    _VERBOSITY.set_level(level)


def vlog(log: logging.Logger, level: int, event: str, /, **fields: object) -> None:
    """Log an event if the caller's file logs at this verbosity. Any name of a field will do."""
    if _VERBOSITY.allows(level, sys._getframe(1).f_code.co_filename):
        extra = {"verbosity": level, "fields": fields}
        log.info(event, extra=extra, stacklevel=2)


def _is_wanted(record: logging.LogRecord) -> bool:
    if record.levelno > logging.DEBUG:
        return True
    ours = record.name.partition(".")[0] == "pyproxy"
    level = DEBUG_VERBOSITY if ours else DEBUG_VERBOSITY_OF_OTHERS
    return _VERBOSITY.allows(level, record.pathname)


class _Formatter(logging.Formatter):
    """The standard formatter, told how to make a line."""

    def __init__(self, line: Callable[[logging.LogRecord, str], str]) -> None:
        super().__init__()
        self._line = line

    def format(self, record: logging.LogRecord) -> str:
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        return self._line(record, trace)


def _text_line(record: logging.LogRecord, trace: str) -> str:
    """Print as klog does: ``I1121 06:30:00.123456       1 runner.py:42] "sync" seconds=0.01``."""
    severity = _SEVERITIES.get(record.levelno, "I")
    at = strftime("%m%d %H:%M:%S", localtime(record.created))
    microseconds = int(record.created % 1 * 10**6)
    head = f"{severity}{at}.{microseconds:06d} {record.process or 0:7d}"
    fields = "".join(f" {name}={_json(value)}" for name, value in _fields(record).items())
    line = f"{head} {record.filename}:{record.lineno}] {_json(record.getMessage())}{fields}"
    return f"{line}\n{trace}" if trace else line


def _json_line(record: logging.LogRecord, trace: str) -> str:
    path = PurePath(record.pathname)
    head: dict[str, object] = {
        "ts": round(record.created * 1000, 3),
        "caller": f"{path.parent.name}/{path.name}:{record.lineno}",
        "msg": record.getMessage(),
    }
    if record.levelno < logging.WARNING:
        head["v"] = _verbosity_of(record)
    else:
        head["level"] = record.levelname.lower()
    if trace:
        head["stacktrace"] = trace
    return _json({**head, **_fields(record), **head})  # a field never hides what is ours


def _verbosity_of(record: logging.LogRecord) -> int:
    by_default = DEBUG_VERBOSITY if record.levelno <= logging.DEBUG else 0
    level: int = getattr(record, "verbosity", by_default)
    return level


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    attributes = vars(record)
    extra = {name: v for name, v in attributes.items() if name not in _OWN_ATTRIBUTES}
    return {**extra, **attributes.get("fields", {})}


def _json(value: object) -> str:
    return json.dumps(value, default=str, ensure_ascii=False, skipkeys=True)
