"""The demo's clients and pods, on loopback."""

import asyncio
import socket

from pyproxy.demo.expect import Reply
from pyproxy.demo.traffic import ask, http_status, serve
from pyproxy.model import Address


def opened():
    made = socket.socket()
    made.setblocking(False)
    return made


def listening():
    made = opened()
    made.bind(("127.0.0.1", 0))
    made.listen()
    return made, Address(*made.getsockname())


async def test_a_pod_says_its_name_and_who_asked():
    sock, address = listening()
    async with await serve("nginx-1", sock):
        assert await ask(opened(), address) == Reply("ok", "nginx-1", "127.0.0.1")


async def test_nobody_there_is_refused():
    sock, address = listening()
    sock.close()
    assert await ask(opened(), address) == Reply("refused")


async def test_silence_times_out():
    sock, address = listening()  # the kernel accepts, and nobody reads
    with sock:
        assert await ask(opened(), address, timeout_seconds=0.05) == Reply("timed out")


async def test_a_client_that_leaves_early_disturbs_nobody():
    sock, address = listening()
    async with await serve("nginx-1", sock):
        _, writer = await asyncio.open_connection(*address)
        writer.transport.abort()
        assert (await ask(opened(), address)).result == "ok"


async def test_a_health_address_has_a_status():
    sock, address = listening()
    async with await serve("nginx-1", sock):
        assert await http_status(opened(), address, "/healthz") == 200


async def test_a_health_address_that_is_not_there_has_none():
    sock, address = listening()
    sock.close()
    assert await http_status(opened(), address, "/healthz") is None
