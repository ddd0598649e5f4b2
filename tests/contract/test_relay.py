"""Two TCP sockets that the relay joins: whatever each side says, the other hears, and no more."""

import asyncio
import os
import socket
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyproxy.proxier import _relay
from pyproxy.proxier._poller import Poller
from pyproxy.proxier._relay import READS, Connection, Side
from pyproxy.proxier._splice import Pipes

SIZES = st.sampled_from(
    [
        0,
        1,
        64,
        _relay.FEW - 1,
        _relay.FEW,
        _relay.FEW + 1,
        1500,
        _relay.SMALL - 1,
        _relay.SMALL,
        _relay.SMALL + 1,
        100_000,
        1_000_000,
    ]
)
SCRIPT = st.lists(st.tuples(SIZES, st.booleans()), max_size=6)  # what to say; then let others run
NOISE = os.urandom(1_000_000)


def pair():
    """Two ends of a TCP connection; the relay's is the first."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = socket.create_connection(server.getsockname())
        near, _ = server.accept()
    return socket.SocketType(near.family, near.type, 0, near.detach()), far


class Recorded(Connection):
    over: asyncio.Event

    def closed(self):
        self.over.set()


@asynccontextmanager
async def joined(pipes):
    """The outer ends of two connections whose inner ends are joined."""
    poller, pool = Poller.of_loop(), Pipes(pipes)
    (near, client), (far, backend) = pair(), pair()
    near, far = sides = [Side(sock, sock.fileno()) for sock in (near, far)]
    near.other, far.other = far, near
    near.connection = far.connection = connection = Recorded(poller, pool, *sides, asyncio.Event())
    for side in sides:
        poller.add(side.fd, READS, side)
    try:
        yield client, backend, connection
    finally:
        if not connection.over.is_set():
            connection.abort()
        pool.close()
        poller.close()
        client.close()
        backend.close()


async def speaks(sock, script):
    """Say what the script has, end, and return all that is heard."""
    reader, writer = await asyncio.open_connection(sock=sock)
    hearing = asyncio.ensure_future(reader.read())  # noqa: TID251 - awaited below
    for size, pauses in script:
        writer.write(NOISE[:size])
        if pauses:
            await writer.drain()
            await asyncio.sleep(0)
    writer.write_eof()
    heard = await hearing
    writer.close()
    return heard


@pytest.mark.parametrize("pipes", [0, 8], ids=["by copy", "by splice"])
@settings(max_examples=15, deadline=None)
@given(SCRIPT, SCRIPT)
def test_each_side_hears_all_that_the_other_says_and_its_end(pipes, ours, theirs):
    async def run():
        async with asyncio.timeout(60), joined(pipes) as (client, backend, connection):
            heard = await asyncio.gather(speaks(client, ours), speaks(backend, theirs))
            await connection.over.wait()
            return heard

    wanted = [b"".join(NOISE[:size] for size, _ in said) for said in (theirs, ours)]
    assert asyncio.run(run()) == wanted


@pytest.mark.parametrize("pipes", [0, 8], ids=["by copy", "by splice"])
async def test_a_reset_is_passed_on_while_the_other_side_takes_nothing(pipes):
    async with joined(pipes) as (client, backend, connection):
        client.setblocking(False)
        await fill(client)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _relay.LINGER_RESET)
        client.close()
        await connection.over.wait()
        with pytest.raises(ConnectionResetError):
            drain(backend)


@pytest.mark.parametrize("pipes", [0, 8], ids=["by copy", "by splice"])
async def test_an_answer_arrives_that_was_given_before_a_reset(pipes):
    """A server may answer, and close without having read all: its kernel resets."""
    async with joined(pipes) as (client, backend, connection):
        client.setblocking(False)
        await fill(client)
        backend.send(b"too large")
        backend.close()
        await connection.over.wait()
        assert client.recv(100) == b"too large"


class Recorder:
    """A socket, and what is done with it."""

    def __init__(self, sock, done):
        self._sock = sock
        self._done = done

    def recv(self, *args):
        self._done.append("recv")
        return self._sock.recv(*args)

    def send(self, *args):
        self._done.append("send")
        return self._sock.send(*args)

    def __getattr__(self, name):
        return getattr(self._sock, name)


async def test_what_many_say_at_once_is_read_first_and_written_then():
    done = []
    async with joined(8) as (client, backend, first), joined(8) as (other, behind, second):
        for connection in (first, second):
            for side in (connection.near, connection.far):
                side.sock = Recorder(side.sock, done)
        client.send(b"a")
        other.send(b"b")
        backend.send(b"c")
        await asyncio.sleep(0.01)
        assert done == ["recv"] * 3 + ["send"] * 3
        heard = [sock.recv(2, socket.MSG_DONTWAIT) for sock in (backend, behind, client)]
        assert heard == [b"a", b"b", b"c"]


async def test_a_message_of_some_length_is_one_write():
    done = []
    async with joined(8) as (client, backend, connection):
        connection.near.sock = Recorder(connection.near.sock, done)
        connection.far.sock = Recorder(connection.far.sock, done)
        for _ in range(2):
            client.send(bytes(5000))
            await asyncio.sleep(0.01)
            assert len(backend.recv(9000, socket.MSG_DONTWAIT)) == 5000
    assert done[:3] == ["recv", "recv", "send"]
    assert done[3:5] == ["recv", "send"], "such messages are expected by now"


async def test_what_was_read_is_not_written_to_a_side_that_is_gone_by_then():
    async with joined(8) as (client, backend, connection):
        client.send(b"x")
        backend.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _relay.LINGER_RESET)
        backend.close()
        await connection.over.wait()
        with pytest.raises(ConnectionResetError):
            drain(client)


class Stumbling(Recorder):
    def send(self, *_args):
        raise ZeroDivisionError


async def test_who_stumbles_in_writing_loses_connections_of_that_round_and_no_other():
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, fields: told.append(fields))
    async with joined(8) as (client, _, first), joined(8) as (other, behind, second):
        first.far.sock = Stumbling(first.far.sock, [])
        client.send(b"a")
        await first.over.wait()
        with pytest.raises(ConnectionResetError):
            drain(client)
        other.send(b"b")
        await asyncio.sleep(0.01)
        assert behind.recv(2, socket.MSG_DONTWAIT) == b"b"
        assert not second.over.is_set()
    assert [type(fields["exception"]) for fields in told] == [ZeroDivisionError]


def drain(sock):
    while sock.recv(1 << 20):
        pass


async def fill(sock):
    """Write until nothing is taken any more."""
    for _ in range(20):
        try:
            while True:
                sock.send(NOISE)
        except BlockingIOError:
            await asyncio.sleep(0.01)
