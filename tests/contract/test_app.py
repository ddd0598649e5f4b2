"""A whole proxy on loopback: what it does at start, while it runs, and at the end."""

import asyncio
import errno
import os
import signal
import socket
from contextlib import asynccontextmanager
from tempfile import mkdtemp

import pytest
from msgspec import structs

from pyproxy import host, own_node
from pyproxy.app import App, Fatal, Settings
from pyproxy.commands._ask import Daemon
from pyproxy.config import Config, Conntrack, Userspace
from pyproxy.demo.expect import Reply
from pyproxy.demo.traffic import ask, http_status, serve
from pyproxy.explain import Explanation
from pyproxy.feeds import ManifestFeed
from pyproxy.host import Snapshot
from pyproxy.manifests.source import ManifestSource
from pyproxy.metrics import Metrics
from pyproxy.model import Address, Endpoint, Node, Replace, Upsert
from pyproxy.process import SystemClock
from tests.builders import endpoint_slice, service
from tests.fakes.feed import FakeFeed

PATIENCE_SECONDS = 20  # a limit for a test that fails, not a wait
POLL_SECONDS = 0.01
VIP = "127.0.96.1"
HERE = Node("here", ips=("127.0.0.1",), pod_cidrs=("10.244.1.0/24",))
MOVED = Node("here", ips=HERE.ips, pod_cidrs=("10.9.0.0/24",))
NOTHING = (Replace("Service", ()), Replace("EndpointSlice", ()))


def opened():
    made = socket.socket()
    made.setblocking(False)
    return made


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Proxy:
    """An App with addresses of its own, and what tests ask of it."""

    def __init__(self, feed, *, flags=(), **fields):
        self.feed = feed
        self.health = Address("127.0.0.1", free_port())
        addresses = {
            "healthz_bind_address": str(self.health),
            "metrics_bind_address": f"127.0.0.1:{free_port()}",
        }
        # Of two at a time in a network namespace, one would succeed the other. That of root may
        # be the machine's own, in which nothing is to be left: no program, rule, or limit.
        alone = Userspace(
            runtime_dir=mkdtemp(prefix="pyproxy-test-"),
            capture="listeners",
            socket_lb="off",
            keep_client_address=False,
        )
        kernels = Conntrack(0, 0, 0.0, 0.0)
        settled = {"mode": "userspace", "userspace": alone, "conntrack": kernels}
        config = Config(**(settled | addresses | fields))
        settings = Settings(config, "here", (4,), {}, **dict(flags))
        self.app = App(settings, feed, Metrics("userspace", (4,)), SystemClock())

    async def run(self, *watchdogs):
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self.app.run(*watchdogs)

    async def status(self, path="/healthz"):
        return await http_status(opened(), self.health, path)


async def until(question, answer):
    """Ask until this is the answer."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            if await question() == answer:
                return
            await asyncio.sleep(POLL_SECONDS)


async def test_the_node_is_annotated_where_that_is_asked_for():
    feed = FakeFeed(*NOTHING, Replace("Node", (HERE,)))
    proxy = Proxy(feed, programmed_annotation_period_seconds=0.01)

    async def annotated():
        return feed.annotations

    async with running(proxy):
        text = '{"mode":"userspace","services":"0","endpointSlices":"0"}'
        await until(annotated, {"pyproxy.io/programmed": text})


@asynccontextmanager
async def running(proxy):
    """The proxy while it runs; at the end it is stopped as an init system would."""
    async with asyncio.TaskGroup() as tasks:
        job = tasks.create_task(proxy.run(), name="proxy")
        await until(lambda: proxy.status("/livez"), 200)
        yield proxy
        signal.raise_signal(signal.SIGTERM)
        await job


@asynccontextmanager
async def pod(name="pod-1"):
    """A pod on loopback that says its name."""
    sock = opened()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    address = Address(*sock.getsockname())
    async with await serve(name, sock):
        yield address


def web(address, port):
    """A Service on a loopback address with one pod behind it."""
    return (
        Replace("Service", (service("web", VIP, ports=(("", "TCP", port),)),)),
        Replace("EndpointSlice", (endpoint_slice("web-1", Endpoint(address, node="here")),)),
    )


async def test_it_serves_what_the_feed_tells_and_ends_in_peace_at_a_signal():
    front = Address(VIP, free_port())
    async with pod() as backend:
        feed = FakeFeed(*web(backend, front.port), Replace("Node", (HERE,)))
        async with running(Proxy(feed)):
            await until(lambda: ask(opened(), front), Reply("ok", "pod-1", "127.0.0.1"))
        assert await ask(opened(), front) == Reply("refused")
    assert feed.is_closed
    assert feed.events == [("Starting", "", False)]


async def test_it_begins_once_the_interfaces_can_be_read(monkeypatch, caplog):
    looks = []

    def snapshot(*, with_routes):
        looks.append(with_routes)
        if len(looks) < 4:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return Snapshot()

    monkeypatch.setattr(host, "snapshot", snapshot)
    monkeypatch.setattr(host, "RETRY_SECONDS", POLL_SECONDS)
    front = Address(VIP, free_port())
    async with pod() as backend:
        feed = FakeFeed(*web(backend, front.port), Replace("Node", (HERE,)))
        async with running(Proxy(feed)):
            await until(lambda: ask(opened(), front), Reply("ok", "pod-1", "127.0.0.1"))
    told = [r.error for r in caplog.records if r.message == "interfaces cannot be read"]
    assert told == ["[Errno 24] Too many open files"]


async def test_interfaces_that_can_never_be_read_are_fatal(monkeypatch):
    def snapshot(*, with_routes):
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

    monkeypatch.setattr(host, "snapshot", snapshot)
    with pytest.raises(Fatal, match=r"interfaces of this node cannot be read: .*not supported"):
        await Proxy(FakeFeed(*NOTHING, Replace("Node", (HERE,)))).run()


async def test_what_it_knows_from_the_disk_only_is_told_as_old_until_it_is_listed(tmp_path):
    path = str(tmp_path / "control.sock")
    front = Address(VIP, free_port())

    async def remarks():
        about = {"service": "default/web"}
        answer = await asyncio.to_thread(Daemon(path).ask, "explain", Explanation, about)
        return answer.remarks

    async with pod() as backend:
        services, slices = web(backend, front.port)
        old = (structs.replace(change, as_of=1000.0) for change in (services, slices))
        feed = FakeFeed(*old, Replace("Node", (HERE,)))
        async with running(Proxy(feed, flags={"control_socket": path})):
            await until(lambda: ask(opened(), front), Reply("ok", "pod-1", "127.0.0.1"))
            (remark,) = await remarks()
            assert "EndpointSlices, Services are as they were at 1970-01-01T00:16:40Z" in remark
            feed.tell(services, slices)
            await feed.taken_in()
            assert await remarks() == ()


async def test_a_service_that_makes_the_planner_stumble_is_named_and_the_others_are_served(
    tmp_path, caplog
):
    path = str(tmp_path / "control.sock")
    front = Address(VIP, free_port())
    broken = service("broken", "127.0.96.2", weights=("no rule",))

    def logged():
        return tuple(r.which for r in caplog.records if r.levelname == "ERROR")

    async def is_explained():
        about = {"service": "default/broken"}
        answer = await asyncio.to_thread(Daemon(path).ask, "explain", Explanation, about)
        return logged() == answer.remarks != ()

    async with pod() as backend:
        services, slices = web(backend, front.port)
        both = structs.replace(services, objects=(broken, *services.objects))
        its = endpoint_slice("broken-1", Endpoint(backend, node="here"), of="broken")
        them = structs.replace(slices, objects=(its, *slices.objects))
        feed = FakeFeed(both, them, Replace("Node", (HERE,)))
        async with running(Proxy(feed, flags={"control_socket": path})) as proxy:
            await until(lambda: ask(opened(), front), Reply("ok", "pod-1", "127.0.0.1"))
            await until(is_explained, True)
            (told,) = logged()
            assert told.startswith("default/broken: AttributeError: ")
            assert await proxy.status() == 200
            feed.tell(Upsert("Service", structs.replace(broken, weights=())))
            await until(is_explained, False)


async def test_it_is_alive_but_not_healthy_until_its_node_is_known():
    feed = FakeFeed(*NOTHING, Replace("Node", ()))
    async with running(Proxy(feed)) as proxy:
        assert (await proxy.status("/livez"), await proxy.status()) == (200, 503)
        feed.tell(Upsert("Node", HERE))
        await until(proxy.status, 200)


@pytest.mark.parametrize("kind", ["Service", "EndpointSlice", "Node"])
async def test_nothing_is_served_before_each_kind_has_been_listed(kind):
    front = Address(VIP, free_port())
    async with pod() as backend:
        told = (*web(backend, front.port), Replace("Node", (HERE,)))
        feed = FakeFeed(*(change for change in told if change.kind != kind))
        async with running(Proxy(feed)):
            assert await ask(opened(), front) == Reply("refused")
            feed.tell(*(change for change in told if change.kind == kind))
            await until(lambda: ask(opened(), front), Reply("ok", "pod-1", "127.0.0.1"))


async def test_a_stop_before_anything_is_known_ends_in_peace():
    feed = FakeFeed()
    async with running(Proxy(feed)):
        pass
    assert (feed.is_closed, feed.events) == (True, [])


@pytest.mark.parametrize("bind", ["healthz_bind_address", "metrics_bind_address"])
async def test_a_taken_address_is_fatal_with_hard_fail(bind):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        proxy = Proxy(FakeFeed(), bind_address_hard_fail=True, **{bind: where})
        with pytest.raises(Fatal, match=f"on {where}: Address already in use"):
            await proxy.run()
    assert proxy.feed.is_closed


async def test_a_taken_address_is_an_event_without_hard_fail():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        feed = FakeFeed(*NOTHING, Replace("Node", (HERE,)))
        async with running(Proxy(feed, metrics_bind_address=where)) as proxy:
            await until(proxy.status, 200)
    error = f"failed to start metrics server on {where}: Address already in use"
    assert ("FailedToStartMetricServer", error, True) in feed.events


async def stop():
    signal.raise_signal(signal.SIGTERM)


async def change(feed, node, then=None):
    """Once the proxy has started, tell that the Node is now so."""
    await feed.recorded.wait()
    feed.tell(Upsert("Node", node))
    if then is not None:
        await feed.taken_in()
        await then()


async def test_another_pod_cidr_is_fatal_where_it_tells_pods_from_others():
    feed = FakeFeed(*NOTHING, Replace("Node", (HERE,)))
    with pytest.raises(Fatal, match="PodCIDRs of Node here changed"):
        await Proxy(feed, detect_local_mode="NodeCIDR").run(change(feed, MOVED))
    assert feed.is_closed


async def test_another_pod_cidr_is_nothing_where_pods_are_told_otherwise():
    feed = FakeFeed(*NOTHING, Replace("Node", (HERE,)))
    await Proxy(feed, cluster_cidr="10.244.0.0/16").run(change(feed, MOVED, then=stop))
    assert feed.is_closed


async def test_a_node_without_pod_cidrs_is_fatal_where_they_are_needed(monkeypatch):
    monkeypatch.setattr(own_node, "POD_CIDRS_SECONDS", 0.0)
    feed = FakeFeed(*NOTHING, Replace("Node", (Node("here", ips=("127.0.0.1",)),)))
    with pytest.raises(Fatal, match="waiting for Node here to get a PodCIDR"):
        await Proxy(feed, detect_local_mode="NodeCIDR").run()


async def test_a_node_that_never_exists_is_fatal_where_its_pod_cidrs_are_needed(monkeypatch):
    monkeypatch.setattr(own_node, "IPS_SECONDS", 0.0)
    monkeypatch.setattr(own_node, "POD_CIDRS_SECONDS", 0.0)
    feed = FakeFeed(*NOTHING, Replace("Node", ()))
    with pytest.raises(Fatal, match="Node here to exist: is --hostname-override right"):
        await Proxy(feed, detect_local_mode="NodeCIDR").run()


async def test_what_a_watchdog_finds_is_fatal():
    async def bark():
        raise Fatal("configuration updated")

    feed = FakeFeed()
    with pytest.raises(Fatal, match="configuration updated"):
        await Proxy(feed).run(bark())
    assert feed.is_closed


async def test_init_only_ends_by_itself_and_serves_nothing(tmp_path):
    front = Address(VIP, free_port())
    flags = {"init_only": True, "control_socket": str(tmp_path / "control.sock")}
    async with pod() as backend:
        feed = FakeFeed(*web(backend, front.port), Replace("Node", (HERE,)))
        await Proxy(feed, flags=flags).run()
        assert await ask(opened(), front) == Reply("refused")
    assert (feed.is_closed, feed.events, list(tmp_path.iterdir())) == (True, [], [])


async def test_init_only_needs_no_address_that_the_one_who_serves_has():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        both = {"healthz_bind_address": where, "metrics_bind_address": where}
        feed = FakeFeed(*NOTHING, Replace("Node", (HERE,)))
        await Proxy(feed, flags={"init_only": True}, bind_address_hard_fail=True, **both).run()
    assert feed.events == []


NODE = """
apiVersion: v1
kind: Node
metadata: {name: here}
status: {addresses: [{type: InternalIP, address: 127.0.0.1}]}
"""


def manifests(folder):
    return ManifestFeed(ManifestSource(folder, "here", ("10.96.0.0/16",), POLL_SECONDS))


async def test_a_folder_of_manifests_is_enough_to_be_healthy(tmp_path):
    (tmp_path / "node.yaml").write_text(NODE)
    flags = {"waits_for_node": False}
    async with running(Proxy(manifests(tmp_path), flags=flags)) as proxy:
        await until(proxy.status, 200)


async def test_a_folder_of_manifests_that_is_not_there_is_fatal(tmp_path):
    with pytest.raises(Fatal, match="missing: No such file or directory"):
        await Proxy(manifests(tmp_path / "missing")).run()
