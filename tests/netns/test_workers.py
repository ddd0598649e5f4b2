"""Worker processes carry the traffic of mode userspace: who gets which client, and who may end."""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager

import pytest

from pyproxy.config import Config, with_setting
from pyproxy.counters import Tally, Where
from pyproxy.counting import settled
from pyproxy.proxier import userspace
from pyproxy.proxier._capture import why_not
from pyproxy.proxier._leftover import workers_here
from tests.builders import owner
from tests.netns import node as node_module
from tests.netns.abuse import becomes
from tests.netns.node import POD, STRANGER, proxied, udp_client
from tests.netns.test_socketlb_process import manifest
from tests.netns.test_userspace import Backend

WORKERS = 2
CLIENTS = 24
PATIENCE = 1500  # looks: a limit for a test that fails, not a wait


@pytest.fixture(params=[("sk_lookup", 4), ("tproxy", 6)], ids=["sk_lookup", "tproxy"])
def family(request, monkeypatch):
    """Do each test with each way to capture, of another family: those are the same code."""
    capture, family = request.param
    reason = why_not(capture)
    if reason is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    monkeypatch.setattr(node_module, "CAPTURE", capture)
    monkeypatch.setattr(node_module, "WORKERS", WORKERS)
    return family


@pytest.fixture
def config(tmp_path):
    return with_setting(Config(), "userspace.runtime_dir", str(tmp_path))


@asynccontextmanager
async def crew(family, config):
    """A node, and its workers by number."""
    async with proxied(family, config) as node:
        assert await becomes(WORKERS, lambda: len(node.frontends._crew._ready())) == WORKERS
        yield node, node.frontends._crew._members


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (3, 3), (64, 4)])
def test_there_is_a_worker_for_each_core_but_no_more_than_four(cores, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: range(cores))
    assert userspace.settled(Config()).userspace.workers == workers
    told = with_setting(Config(), "userspace.workers", 6)
    assert userspace.settled(told).userspace.workers == 6


async def counts(node, name, proto="TCP"):
    reading = await settled(node.carrier, by_endpoint=True)
    return Tally().take(reading, by_endpoint=True)[Where(owner(name, proto=proto))]


async def test_counts_are_sums_over_workers_who_all_serve(family, config):
    async with Backend(family, "a") as a, crew(family, config) as (node, workers):
        await node.service("web", 1)
        await node.endpoints("web", a.address)
        for _ in range(CLIENTS):
            assert await node.ask(node.vip(1)) == b"a ?"
        found = await counts(node, "web")
        assert (found.connections, found.bytes_in, found.bytes_out) == (
            CLIENTS,
            CLIENTS,
            3 * CLIENTS,
        )
        shares = [
            sum(c.connections for (_f, endpoint), c in w.counts.items() if endpoint is None)
            for w in workers.values()
        ]
        assert sum(shares) == CLIENTS
        assert all(shares)
        assert node.frontends._plane.tcp.open_count == 0
        done = [("TCP", "forwarded")] * CLIENTS + [("TCP", "closed")] * CLIENTS
        await becomes(len(done), lambda: len(node.observer.results))
        assert sorted(node.observer.results) == sorted(done)


async def test_datagrams_of_a_client_stay_with_their_worker(family, config):
    async with (
        Backend(family, "a") as a,
        Backend(family, "b") as b,
        crew(family, config) as (node, _workers),
    ):
        await node.service("dns", 1, port=53, proto="UDP")
        await node.endpoints("dns", a.address, b.address, proto="UDP")
        for _ in range(CLIENTS):
            with udp_client(node.vip(1), 53) as client:
                answers = {await node.ask_udp("", 0, sock=client) for _ in range(3)}
                assert len(answers) == 1
        assert (await counts(node, "dns", "UDP")).connections == CLIENTS


@pytest.mark.parametrize("proto", ["TCP", "UDP"])
async def test_a_client_with_affinity_keeps_its_backend(family, proto, config):
    async with (
        Backend(family, "a") as a,
        Backend(family, "b") as b,
        Backend(family, "c") as c,
        crew(family, config) as (node, _workers),
    ):
        await node.service("web", 1, proto=proto, affinity_seconds=60)
        await node.endpoints("web", a.address, b.address, c.address, proto=proto)
        ask = node.ask if proto == "TCP" else node.ask_udp
        for source in (POD[family], STRANGER[family]):
            answers = {await ask(node.vip(1), 80, source=source) for _ in range(CLIENTS)}
            assert len(answers) == 1


async def test_after_a_sync_no_worker_calls_an_endpoint_that_is_gone(family, config):
    async with (
        Backend(family, "a") as a,
        Backend(family, "b") as b,
        crew(family, config) as (node, _workers),
    ):
        await node.service("web", 1)
        await node.endpoints("web", a.address)
        for one, said in [(b, b"b ?"), (a, b"a ?"), (b, b"b ?")]:
            await node.endpoints("web", one.address)
            assert {await node.ask(node.vip(1)) for _ in range(8)} == {said}
        await node.remove("web")
        with pytest.raises((OSError, TimeoutError)):
            await node.ask(node.vip(1))


async def test_a_killed_worker_takes_nothing_but_its_own_connections_with_it(family, config):
    lost = []
    async with Backend(family, "a") as a, crew(family, config) as (node, workers):
        node.frontends._crew._lost = lambda: lost.append(1)
        await node.service("web", 1)
        await node.endpoints("web", a.address)
        opened = [await node.connect(node.vip(1)) for _ in range(CLIENTS)]
        await becomes(CLIENTS, lambda: open_connections(node))
        victim, other = (workers[n].process.pid for n in (1, 2))
        os.kill(victim, signal.SIGKILL)
        assert {await node.ask(node.vip(1)) for _ in range(CLIENTS)} == {b"a ?"}
        survived = [await said(*each) for each in opened].count(b"a !")
        assert 0 < survived < CLIENTS
        assert await becomes(WORKERS, lambda: len(node.frontends._crew._ready())) == WORKERS
        assert lost == [1]
        assert workers[2].process.pid == other
        assert workers[1].process.pid != victim
        assert {await node.ask(node.vip(1)) for _ in range(CLIENTS)} == {b"a ?"}
        assert node.frontends._plane.fronts.sockets == []  # nobody is stood in for
        await becomes(True, lambda: open_connections(node) == 0)
        assert open_connections(node) == 0


def open_connections(node):
    results = node.observer.results
    return results.count(("TCP", "forwarded")) - results.count(("TCP", "closed"))


async def said(reader, writer):
    """Return what a connection that was open answers, if it does."""
    try:
        writer.write(b"!")
        writer.write_eof()
        async with asyncio.timeout(5):
            return await reader.read()
    except OSError:
        return None
    finally:
        writer.close()


def test_workers_serve_on_when_who_plans_is_killed_until_the_next_start(tmp_path):
    asyncio.run(killed_and_started(tmp_path))


async def killed_and_started(folder):
    async with Backend(4, "a") as a, Backend(4, "b") as b:
        (folder / "objects.json").write_text(manifest(a))
        async with running(folder) as process:
            opened = [await connection() for _ in range(CLIENTS)]
            process.kill()
            assert await becomes(-signal.SIGKILL, process.poll) == -signal.SIGKILL
            assert {await said(*await connection()) for _ in range(CLIENTS)} == {b"a !"}
            left = set(workers_here(4))
        (folder / "objects.json").write_text(manifest(b))
        async with running(folder) as process:
            assert {await said(*await connection()) for _ in range(CLIENTS)} == {b"b !"}
            assert {await said(*each) for each in opened} == {b"a !"}
            assert await becomes(set(), lambda: left & set(workers_here(4))) == set()
            process.kill()


def test_a_later_start_takes_over_from_workers_that_were_left(tmp_path):
    asyncio.run(ended_and_started(tmp_path))


async def ended_and_started(folder):
    async with Backend(4, "a") as a:
        (folder / "objects.json").write_text(manifest(a))
        async with running(folder) as process:
            opened = [await connection() for _ in range(CLIENTS)]
            process.terminate()
            assert await becomes(0, process.poll) == 0
        assert await said(*await connection()) == b"a !"
        async with running(folder) as process:
            assert {await said(*each) for each in opened} == {b"a !"}
            assert await said(*await connection()) == b"a !"
            process.kill()


@asynccontextmanager
async def running(folder):
    """A pyproxy that serves; in the end nothing is left of it if it was killed the last time."""
    said = folder / "log"
    with said.open("wb") as log:
        words = ["-m", "pyproxy", "run", *flags(folder)]
        process = await asyncio.to_thread(subprocess.Popen, [sys.executable, *words], stderr=log)
    try:
        for _ in range(PATIENCE):
            await asyncio.sleep(0.02)
            if b'"serving"' in said.read_bytes():
                break
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    clean = [sys.executable, "-m", "pyproxy", "cleanup"]
    if anybody():
        assert subprocess.Popen(clean).wait() == 0
        assert asyncio.run(becomes([], anybody)) == []


def anybody():
    return [pid for each in (4, 6) for pid in workers_here(each)]


def connection():
    return asyncio.open_connection("10.96.0.77", 80)


def flags(folder):
    return (
        f"--manifests={folder / 'objects.json'}",
        "--proxy-mode=userspace",
        "--userspace-socket-lb=off",
        f"--userspace-workers={WORKERS}",
        f"--userspace-runtime-dir={folder}",
        "--userspace-drain-timeout=20s",
        "--hostname-override=here",
    )
