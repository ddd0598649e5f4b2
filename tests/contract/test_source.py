import asyncio
import logging
import socket
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from pyproxy.kube import api as kube_api
from pyproxy.kube.api import Regarding, Throttle, UnreachableError, connect, split_lines
from pyproxy.kube.events import Bookmark, Changed
from pyproxy.kube.source import follow
from pyproxy.kube.watch import Watch, WatchMachine
from pyproxy.model import Remove, Replace, Upsert
from tests.fakes.apiserver import FakeApiServer, bookmark

LIMIT_SECONDS = 10.0


class Mirror:
    """What the changes add up to, by name; and the errors that were told."""

    def __init__(self):
        self.objects = None  # None: nothing is complete yet
        self.replacement_count = 0
        self.errors = []

    def change(self, change):
        match change:
            case Replace(objects=objects):
                self.objects = {str(obj.name): obj for obj in objects}
                self.replacement_count += 1
            case Upsert(obj=obj):
                self.objects[str(obj.name)] = obj
            case Remove(name=name):
                self.objects.pop(str(name), None)

    @property
    def types(self):
        return None if self.objects is None else {n: s.type for n, s in self.objects.items()}

    async def until(self, is_true):
        async with asyncio.timeout(LIMIT_SECONDS):
            while not is_true():  # noqa: ASYNC110 - what a server was asked wakes nobody
                await asyncio.sleep(0.002)

    async def becomes(self, **types):
        wanted = {f"default/{name}": type for name, type in types.items()}
        await self.until(lambda: self.types == wanted)


@asynccontextmanager
async def following(server, kind="Service", **options):
    """A mirror of one kind of the server's objects, kept by a task."""
    mirror = Mirror()
    machine = WatchMachine(kind, random=lambda: 0.0)
    async with (
        await connect("", server.url, node="here", **options) as api,
        asyncio.TaskGroup() as tasks,
    ):
        task = tasks.create_task(follow(machine, api, mirror.change, mirror.errors.append))
        yield mirror
        task.cancel()


@pytest.fixture
async def server():
    async with FakeApiServer() as running:
        yield running


def put(server, name, type="ClusterIP", **fields):
    server.put("services", name, spec={"type": type}, **fields)


# --- following ----------------------------------------------------------------------------------


async def test_what_is_there_and_what_then_happens_is_followed(server):
    put(server, "web")
    async with following(server) as mirror:
        await mirror.becomes(web="ClusterIP")
        put(server, "api", "NodePort")
        put(server, "web", "LoadBalancer")
        await mirror.becomes(web="LoadBalancer", api="NodePort")
        server.delete("services", "web")
        await mirror.becomes(api="NodePort")
    assert (mirror.replacement_count, mirror.errors) == (1, [])


@pytest.mark.parametrize("streams", ["refuses", "ignores"])
async def test_a_server_without_streamed_lists_is_followed_by_pages(server, streams):
    server.streams = streams
    server.page_limit = 2
    for name in ("a", "b", "c", "d", "e"):
        put(server, name)
    async with following(server) as mirror:
        if streams == "ignores":
            await mirror.until(lambda: server.open_watches)
            await server.send(bookmark(6))
        await mirror.becomes(**dict.fromkeys("abcde", "ClusterIP"))
        put(server, "f")
        await mirror.becomes(**dict.fromkeys("abcdef", "ClusterIP"))
    pages = [asked.query for asked in server.asked if not asked.is_watch]
    assert [page["limit"] for page in pages] == ["500"] * 3
    assert mirror.errors == []


async def test_a_cut_watch_resumes_where_it_was_though_a_line_was_cut(server):
    put(server, "web")
    async with following(server) as mirror:
        await mirror.becomes(web="ClusterIP")
        await server.send(b'{"type":"MODIFIED","object":{"metadata":{"na')
        server.cut()
        put(server, "api")
        await mirror.becomes(web="ClusterIP", api="ClusterIP")
    assert server.asked[-1].query["resourceVersion"] == "2"
    assert (mirror.replacement_count, mirror.errors) == (1, [])


async def test_repeated_events_do_no_harm(server):
    async with following(server) as mirror:
        await mirror.becomes()
        put(server, "web")
        put(server, "web", "NodePort")
        server.delete("services", "web")
        put(server, "api")
        await mirror.becomes(api="ClusterIP")
        server.repeats = 4
        server.cut()
        put(server, "other")
        await mirror.becomes(api="ClusterIP", other="ClusterIP")


async def test_a_forgotten_version_means_a_new_list(server):
    put(server, "web")
    async with following(server) as mirror:
        await mirror.becomes(web="ClusterIP")
        server.cut()
        server.delete("services", "web")
        put(server, "api")
        server.forget()
        await mirror.becomes(api="ClusterIP")
    assert (mirror.replacement_count, mirror.errors) == (2, [])


async def test_an_object_of_megabytes_arrives_in_small_pieces(server):
    server.chunk_bytes = 16 << 10
    put(server, "web", metadata={"annotations": {"big": "x" * (3 << 20)}})
    async with following(server) as mirror:
        await mirror.becomes(web="ClusterIP")


async def test_a_bad_object_is_told_and_stops_no_other(server):
    server.put("services", "bad", spec={"ports": [{"port": 0}]})
    put(server, "web")
    async with following(server) as mirror:
        await mirror.becomes(web="ClusterIP")
    assert mirror.errors == ["Service default/bad: spec.ports[0].port: 0 is not a port"]


async def test_an_api_that_is_absent_has_no_objects(server):
    server.absent.add("servicecidrs")
    async with following(server, "ServiceCIDR") as mirror:
        await mirror.becomes()
    assert (len(server.asked), mirror.errors) == (1, [])


async def test_a_refusal_is_told_and_tried_again(server):
    server.failures = [(403, {}, '{"message":"forbidden","code":403}'), (503, {}, "starting")]
    async with following(server) as mirror:
        await mirror.becomes()
    assert mirror.errors == [
        f"Service: {server.url} refused: 403 forbidden",
        f"Service: {server.url} refused: 503 starting",
    ]


async def test_a_server_that_asks_to_be_left_alone_is(server):
    server.failures = [(429, {"Retry-After": "1"}, "")]
    clock = asyncio.get_running_loop().time
    started_at = clock()
    async with following(server) as mirror:
        await mirror.becomes()
    assert clock() - started_at >= 1.0


async def test_no_server_is_told_and_tried_again():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    async with following(SimpleNamespace(url=url)) as mirror:
        await mirror.until(lambda: len(mirror.errors) == 2)
    assert mirror.errors[0].startswith(f"Service: cannot ask {url}: ")
    assert mirror.objects is None


# --- requests -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "resource", "selection"),
    [
        (
            "Service",
            "services",
            {
                "labelSelector": "!service.kubernetes.io/service-proxy-name",
                "fieldSelector": "spec.clusterIP!=None",
            },
        ),
        ("EndpointSlice", "endpointslices", {"labelSelector": "!service.kubernetes.io/headless"}),
        ("Node", "nodes", {"fieldSelector": "metadata.name=here"}),
        ("ServiceCIDR", "servicecidrs", {}),
    ],
)
async def test_the_server_selects_for_us(server, kind, resource, selection):
    async with following(server, kind) as mirror:
        await mirror.becomes()
    [asked] = server.asked
    query = dict(asked.query)
    assert 300 <= int(query.pop("timeoutSeconds")) <= 600
    assert (asked.resource, query) == (
        resource,
        {
            **selection,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "sendInitialEvents": "true",
            "resourceVersionMatch": "NotOlderThan",
        },
    )


async def test_a_proxy_with_a_name_asks_for_the_services_that_have_it(server):
    label = "service.kubernetes.io/service-proxy-name"
    for name, labels in (("plain", {}), ("ours", {label: "canary"}), ("other", {label: "x"})):
        put(server, name, metadata={"labels": labels})
    async with following(server, proxy_name="canary") as mirror:
        await mirror.becomes(ours="ClusterIP")
    assert dict(server.asked[0].query)["labelSelector"] == f"{label}=canary"


async def test_a_list_that_falls_silent_before_its_end_mark_is_left(server, monkeypatch):
    monkeypatch.setattr(kube_api, "LIST_SILENCE_SECONDS", 0.05)
    server.streams = "ignores"
    put(server, "web")
    async with await connect("", server.url, node="here") as api:
        request = Watch("", send_initial_events=True)
        events = [event async for event in api.events("Service", request)]
    assert [type(event) for event in events] == [Changed]


async def test_a_complete_list_may_be_silent(server, monkeypatch):
    monkeypatch.setattr(kube_api, "LIST_SILENCE_SECONDS", 0.05)
    async with await connect("", server.url, node="here") as api:
        events = api.events("Service", Watch("", send_initial_events=True))
        assert await anext(events) == Bookmark("1", is_complete=True)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(events), 0.3)


async def test_every_request_is_observed(server):
    server.failures = [(503, {}, "")]
    seen = []
    async with following(server, observe=lambda *what: seen.append(what)) as mirror:
        await mirror.becomes()
    host = server.url.removeprefix("http://")
    assert [what[:3] for what in seen] == [("GET", host, "503"), ("GET", host, "200")]
    assert all(0.0 <= what[3] < LIMIT_SECONDS for what in seen)


async def test_an_unreachable_server_is_observed_too():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        host = f"127.0.0.1:{unused.getsockname()[1]}"
    seen = []
    async with await connect("", host, node="here", observe=lambda *w: seen.append(w[:3])) as api:
        with pytest.raises(UnreachableError):
            await anext(api.events("Service", Watch("1")))
    assert seen == [("GET", host, "<error>")]


def test_a_connection_notices_that_the_other_side_is_gone():
    address = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 0))
    with kube_api._guarded_socket(address) as guarded:
        assert guarded.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert guarded.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000


@pytest.mark.parametrize(
    ("tail", "chunk", "lines", "rest"),
    [
        pytest.param(b"", b"a\nb\n", [b"a", b"b"], b"", id="whole lines"),
        pytest.param(b"", b"a\nb", [b"a"], b"b", id="the last is cut"),
        pytest.param(b"a", b"b\nc", [b"ab"], b"c", id="the first goes on"),
        pytest.param(b"a", b"b", [], b"ab", id="no end yet"),
        pytest.param(b"", b"\n\na\n", [b"a"], b"", id="empty lines mean nothing"),
    ],
)
def test_bytes_are_split_into_lines(tail, chunk, lines, rest):
    assert split_lines(tail, chunk) == (lines, rest)


def test_a_line_without_end_is_no_line(monkeypatch):
    monkeypatch.setattr(kube_api, "MAX_LINE", 10)
    with pytest.raises(UnreachableError, match="more than 10 bytes"):
        split_lines(b"x" * 10, b"x")


# --- Events -------------------------------------------------------------------------------------


async def test_an_event_is_created_where_its_object_is(server):
    async with await connect("", server.url, node="here") as api:
        await api.create_event("Starting", "", Regarding("Node", "here", uid="here"))
        web = Regarding("Service", "web", "shop", "u-1")
        await api.create_event("NoPort", "port 1 is taken", web, type="Warning", action="Listen")
    assert [namespace for namespace, _ in server.events] == ["default", "shop"]
    event = server.events[1][1]
    assert event.pop("metadata")["name"].startswith("web.")
    assert event.pop("eventTime").endswith("Z")
    assert event == {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "reportingController": "kube-proxy",
        "reportingInstance": "here",
        "action": "Listen",
        "reason": "NoPort",
        "regarding": {
            "apiVersion": "v1",
            "kind": "Service",
            "name": "web",
            "namespace": "shop",
            "uid": "u-1",
        },
        "note": "port 1 is taken",
        "type": "Warning",
    }


async def test_our_node_is_annotated_by_way_of_its_status(server):
    async with await connect("", server.url, node="here") as api:
        assert await api.annotate_node({"pyproxy.io/programmed": "x"}) is None
        server.failures = [(403, {}, '{"message":"forbidden"}')]
        assert await api.annotate_node({"pyproxy.io/programmed": "y"}) == "403 forbidden"
    patch = {"metadata": {"annotations": {"pyproxy.io/programmed": "x"}}}
    assert server.patches == [("here", patch)]


async def test_an_event_that_cannot_be_created_is_only_logged(server, caplog):
    server.failures = [(403, {}, '{"message":"forbidden"}')]
    with caplog.at_level(logging.WARNING):
        async with await connect("", server.url, node="here") as api:
            await api.create_event("Starting", "", Regarding("Node", "here"))
    assert caplog.messages == ["could not create the event Starting: 403 forbidden"]


@pytest.mark.parametrize(
    ("qps", "burst", "asked_at", "delays"),
    [
        pytest.param(5.0, 3, [0.0] * 5, [0.0, 0.0, 0.0, 0.2, 0.4], id="a burst, and then evenly"),
        pytest.param(5.0, 1, [0.0, 0.1, 0.5], [0.0, 0.1, 0.0], id="one at once"),
        pytest.param(5.0, 0, [0.0, 0.0], [0.0, 0.2], id="no burst is one"),
        pytest.param(5.0, 2, [0, 0, 9, 9, 9], [0.0, 0.0, 0.0, 0.0, 0.2], id="rest saves no more"),
        pytest.param(-1.0, 1, [0.0] * 3, [0.0] * 3, id="no limit"),
    ],
)
def test_a_throttle(qps, burst, asked_at, delays):
    throttle = Throttle(qps, burst)
    assert [throttle.delay(now) for now in asked_at] == pytest.approx(delays)
