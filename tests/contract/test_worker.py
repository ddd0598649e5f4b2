"""What a worker process does before it serves."""

import asyncio
import socket
import sys

import msgspec
import pytest

from pyproxy import __version__
from pyproxy.proxier._channel import PLAIN
from pyproxy.worker import ANOTHER_VERSION


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(["Begin", "0.0.1", 1], id="fewer fields"),
        pytest.param(["Begin", __version__, 1, "two", "/run", [], [], []], id="other fields"),
        pytest.param(["Hurry"], id="an order that is none"),
        pytest.param(["Stop"], id="another order"),
    ],
)
async def test_it_ends_without_a_word_where_another_version_has_started_it(order):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.send(PLAIN + msgspec.msgpack.encode(order))
        words = (sys.executable, "-m", "pyproxy.worker", str(theirs.fileno()))
        process = await asyncio.create_subprocess_exec(
            *words, pass_fds=[theirs.fileno()], stderr=asyncio.subprocess.PIPE
        )
        _output, said = await process.communicate()
    assert (process.returncode, said) == (ANOTHER_VERSION, b"")
