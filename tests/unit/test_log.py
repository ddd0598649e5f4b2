import io
import json
import logging
import re
from time import localtime, strftime

import pytest

from pyproxy.config import Logging, LogOptions, LogStream, VModule
from pyproxy.log import set_verbosity, setup, vlog

log = logging.getLogger("pyproxy.test")
AT = 1763706600.1234567


@pytest.fixture(autouse=True)
def _restored():
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    setup(Logging())
    root.handlers[:] = handlers
    root.setLevel(level)


def written(**settings):
    """Set logging up, and return where it writes."""
    stream = io.StringIO()
    setup(Logging(**settings), stderr=stream)
    return stream


def events(stream):
    """Return the event of each line of text."""
    return re.findall(r'\] "(.*?)"', stream.getvalue())


def record(level=logging.INFO, msg="sync", **extra):
    """Make a record whose time, process and place are known."""
    made = logging.makeLogRecord(
        {
            "name": "pyproxy.runner",
            "levelno": level,
            "levelname": logging.getLevelName(level),
            "msg": msg,
            "created": AT,
            "process": 17,
            "pathname": "somewhere/pyproxy/runner.py",
            "filename": "runner.py",
            "lineno": 42,
            **extra,
        }
    )
    logging.getLogger().handle(made)


WHEN = strftime("%m%d %H:%M:%S", localtime(AT)) + ".123456"


@pytest.mark.parametrize(
    ("level", "fields", "line"),
    [
        pytest.param(
            logging.INFO,
            {"family": "IPv4", "seconds": 0.01},
            f'I{WHEN}      17 runner.py:42] "sync" family="IPv4" seconds=0.01',
            id="information",
        ),
        pytest.param(
            logging.WARNING,
            {"full": True},
            f'W{WHEN}      17 runner.py:42] "sync" full=true',
            id="W",
        ),
        pytest.param(
            logging.ERROR,
            {"error": None},
            f'E{WHEN}      17 runner.py:42] "sync" error=null',
            id="E",
        ),
        pytest.param(logging.FATAL, {}, f'F{WHEN}      17 runner.py:42] "sync"', id="F"),
        pytest.param(
            logging.INFO,
            {"error": 'a "b"\nI1121 forged'},
            f'I{WHEN}      17 runner.py:42] "sync" error="a \\"b\\"\\nI1121 forged"',
            id="a value stays in its line",
        ),
        pytest.param(
            logging.INFO,
            {"fields": {"name": "x", "ports": (1, 2)}},
            f'I{WHEN}      17 runner.py:42] "sync" name="x" ports=[1, 2]',
            id="fields with any name",
        ),
    ],
)
def test_text_is_klogs(level, fields, line):
    stream = written()
    record(level, **fields)
    assert stream.getvalue() == f"{line}\n"


@pytest.mark.parametrize(
    ("level", "fields", "expected"),
    [
        pytest.param(
            logging.INFO, {"family": "IPv4"}, {"v": 0, "family": "IPv4"}, id="information"
        ),
        pytest.param(logging.INFO, {"verbosity": 2}, {"v": 2}, id="verbosity"),
        pytest.param(
            logging.WARNING, {"a": {"b": [1]}}, {"level": "warning", "a": {"b": [1]}}, id="W"
        ),
        pytest.param(logging.ERROR, {}, {"level": "error"}, id="E"),
        pytest.param(
            logging.INFO, {"fields": {"msg": "x", "ts": 0}}, {"v": 0}, id="no field hides ours"
        ),
    ],
)
def test_json_is_one_object_a_line(level, fields, expected):
    stream = written(format="json")
    record(level, **fields)
    head = {"ts": 1763706600123.457, "caller": "pyproxy/runner.py:42", "msg": "sync"}
    assert json.loads(stream.getvalue()) == head | expected


@pytest.mark.parametrize("format", ["text", "json"])
def test_an_exception_has_its_trace(format):
    stream = written(format=format)
    try:
        raise RuntimeError("gone")
    except RuntimeError:
        log.exception("lost")
    assert "Traceback (most recent call last)" in stream.getvalue()
    assert "RuntimeError: gone" in stream.getvalue()


def test_vlog_names_the_caller_and_takes_any_field():
    stream = written(verbosity=1)
    vlog(log, 1, "event", name="n", args=1, level=2)
    assert re.search(r'test_log\.py:\d+\] "event" name="n" args=1 level=2$', stream.getvalue())


@pytest.mark.parametrize(("verbosity", "expected"), [(0, ["0"]), (2, ["0", "1", "2"])])
def test_vlog_writes_up_to_the_verbosity(verbosity, expected):
    stream = written(verbosity=verbosity)
    for level in range(4):
        vlog(log, level, str(level))
    assert events(stream) == expected


@pytest.mark.parametrize(
    ("verbosity", "name", "is_written"),
    [
        (3, "pyproxy.runner", False),
        (4, "pyproxy.runner", True),
        (7, "asyncio", False),
        (8, "asyncio", True),
        (7, "pyproxyish", False),
    ],
)
def test_debug_needs_a_verbosity(verbosity, name, is_written):
    stream = written(verbosity=verbosity)
    logging.getLogger(name).debug("detail")
    assert events(stream) == (["detail"] if is_written else [])


@pytest.mark.parametrize(
    ("vmodule", "level"),
    [
        pytest.param([], 1, id="none"),
        pytest.param([("test_log", 5)], 5, id="name"),
        pytest.param([("test_log.py", 5)], 5, id="name with its ending"),
        pytest.param([("test_*", 5)], 5, id="glob"),
        pytest.param([("*/unit/test_log", 5)], 5, id="path"),
        pytest.param([("log", 5)], 1, id="other file"),
        pytest.param([("unit/test_log", 5)], 1, id="path from its start"),
        pytest.param([("test_log", 0)], 0, id="less"),
        pytest.param([("test_log", 3), ("test_*", 5)], 3, id="first counts"),
    ],
)
def test_vmodule_is_the_verbosity_of_its_files(vmodule, level):
    stream = written(verbosity=1, vmodule=tuple(VModule(*item) for item in vmodule))
    for n in range(7):
        vlog(log, n, str(n))
    assert events(stream) == [str(n) for n in range(level + 1)]


def test_vmodule_lets_debug_through_for_its_files():
    stream = written(vmodule=(VModule("test_log", 4),))
    log.debug("here")
    record(logging.DEBUG, "elsewhere")
    assert events(stream) == ["here"]


def test_the_verbosity_changes_while_running():
    stream = written(vmodule=(VModule("runner", 9),))
    vlog(log, 4, "before")
    set_verbosity(4)
    log.debug("now")
    vlog(log, 4, "after")
    assert events(stream) == ["now", "after"]


def test_a_second_setup_replaces_the_first():
    first, second = written(), written()
    log.info("event")
    assert (events(first), events(second)) == ([], ["event"])


def test_a_split_stream_keeps_errors_apart():
    errors, rest = io.StringIO(), io.StringIO()
    options = LogOptions(text=LogStream(split_stream=True))
    setup(Logging(options=options), stderr=errors, stdout=rest)
    log.info("fine")
    log.warning("odd")
    log.error("broken")
    assert (events(errors), events(rest)) == (["broken"], ["fine", "odd"])


def test_the_log_goes_to_stderr(capsys):
    setup(Logging())
    log.info("event")
    captured = capsys.readouterr()
    assert (captured.out, "event" in captured.err) == ("", True)
