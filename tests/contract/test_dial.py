"""Clients of TCP who wait for a backend: what goes wrong for one is nobody else's trouble."""

import asyncio
import socket
from contextlib import ExitStack, contextmanager
from socket import IPPROTO_TCP, TCP_CONGESTION
from types import SimpleNamespace

import pytest

from pyproxy.balancer import Picker
from pyproxy.model import Address, Backend, Forward, Pool
from pyproxy.proxier import _tcp
from pyproxy.proxier._accept import listen, unlisten
from pyproxy.proxier._dial import Dial
from pyproxy.proxier._meter import Meter
from pyproxy.proxier._relay import READS
from pyproxy.proxier._sockets import CongestionControl
from pyproxy.proxier._tcp import TcpRelay
from pyproxy.rules.listeners import Surroundings
from tests.contract.test_relay import pair


@pytest.fixture
async def relay():
    relay = TcpRelay(Surroundings, lambda _result: None)
    yield relay
    relay.close_all()


@pytest.mark.parametrize("is_crowded", [False, True], ids=["alone", "in a crowd"])
@pytest.mark.parametrize("local", [None, b"reno", b"no such thing"])
async def test_what_a_client_said_while_it_waited_arrives(is_crowded, local, relay):
    relay.congestion = CongestionControl(b"cubic", local) if local is not None else None
    relay.is_crowded = is_crowded
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address(*server.getsockname())
        pool, picker = Pool((Backend(address, is_local=True),)), Picker(lambda _below: 0)
        picker.use([pool])
        front = SimpleNamespace(picker=picker, meter=Meter(), always=Forward(pool))
        near, client = pair()
        with client:
            client.send(b"hello")
            Dial(relay, front, near, "192.0.2.1").begin()
            backend, _ = server.accept()
            with backend:
                assert relay.open_count == 1
                backend.setblocking(False)
                heard = await asyncio.get_running_loop().sock_recv(backend, 100)
                assert heard == b"hello"
                (connection,) = relay._open
                assert used_by(connection.far.sock) == b"reno" or local != b"reno"


def used_by(sock):
    return sock.getsockopt(IPPROTO_TCP, TCP_CONGESTION, 16).rstrip(b"\0")


@pytest.mark.parametrize(
    ("around", "expected"),
    [(Surroundings(), b"cubic"), (Surroundings(frozenset({"127.0.0.1"})), b"reno")],
    ids=["from elsewhere", "of this node"],
)
async def test_who_is_written_to_again_from_elsewhere_has_what_is_usual(around, expected):
    relay = TcpRelay(lambda: around, lambda _result: None)
    relay.congestion = CongestionControl(usual=b"cubic", local=b"reno")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listen(relay, listener, SimpleNamespace(sockets=[listener]))
        unlisten(relay, listener)
        with socket.create_connection(listener.getsockname()) as client:
            near, (far, backend) = listener.accept()[0], pair()
            near = socket.SocketType(near.family, near.type, 0, near.detach())
            with backend:
                address = Address(*backend.getsockname())
                connection = relay.join(near, far, address, Meter(), None)
                relay.poller.add(connection.far.fd, READS, connection.far)
                for word, used in ((b"one", b"reno"), (b"two", expected), (b"three", expected)):
                    backend.send(word)
                    loop = asyncio.get_running_loop()
                    client.setblocking(False)
                    assert await loop.sock_recv(client, 100) == word
                    assert used_by(near) == used
        relay.close_all()


class Transparent:
    """Keeps no client's address, from now on."""

    def __init__(self):
        self.distrusted = []

    def guise(self, _action, _ip, _address, _now):
        return None

    def distrust(self, address, _now):
        self.distrusted.append(address)


@contextmanager
def silent():
    """The address of somebody who does not answer: nobody else fits into the backlog."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, ExitStack() as stack:
        for _ in range(3):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(server.getsockname())
        yield Address(*server.getsockname())


@pytest.mark.parametrize("before", [0, 1], ids=["the first", "the second"])
async def test_a_call_as_the_client_that_nobody_answers_is_counted_no_more(before, relay):
    with silent() as one, silent() as two:
        pool, picker = Pool((Backend(one), Backend(two)), scheduler="lc"), Picker(lambda _below: 0)
        picker.use([pool])
        front = SimpleNamespace(picker=picker, meter=Meter(), always=Forward(pool))
        near, client = pair()
        with client:
            dial = Dial(relay, front, near, "192.0.2.1")
            dial.begin()
            for _ in range(before):
                dial.late()
            called = dial.tried[-1]
            relay.transparent, dial.is_dressed = Transparent(), True
            dial.late()
            assert relay.transparent.distrusted == [called]
            assert picker._open == {dial.tried[-1]: 1}, "it calls on, as the node"
            dial.give_up()
            assert picker._open == {}


class Late:
    """A dial that is late at once; it stumbles, or is over."""

    def __init__(self, relay, *, stumbles, stumbles_again=False):
        self.until = 0.0
        self.over = asyncio.Event()
        self._relay = relay
        self._stumbles = stumbles
        self._stumbles_again = stumbles_again

    def late(self):
        if self._stumbles:
            raise ZeroDivisionError
        self.give_up()

    def give_up(self):
        if self._stumbles_again:
            self._stumbles_again = False
            raise ZeroDivisionError
        self._relay.dialled(self)
        self.over.set()


@pytest.mark.parametrize("stumbles_again", [False, True], ids=["once", "also in giving up"])
async def test_a_dial_that_stumbles_is_given_up_and_others_go_on(
    stumbles_again, relay, monkeypatch
):
    monkeypatch.setattr(_tcp, "TICK_SECONDS", 0.001)
    asyncio.get_running_loop().set_exception_handler(lambda _loop, _told: None)
    dials = [
        Late(relay, stumbles=stumbles, stumbles_again=stumbles and stumbles_again)
        for stumbles in (True, False, True)
    ]
    for dial in dials:
        relay.dialling(dial)
    async with asyncio.timeout(2):
        for dial in dials:
            await dial.over.wait()
        await relay.drained()
