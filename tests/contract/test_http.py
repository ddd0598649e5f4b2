import asyncio
import json
import socket
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest
from aiohttp import web

from pyproxy import http
from pyproxy.health import Health
from pyproxy.http import (
    About,
    HttpServer,
    ListenError,
    Responder,
    ServiceHealthServers,
    health_server,
    metrics_server,
    parse_bind,
)
from pyproxy.metrics import Metrics
from pyproxy.model import HealthPort, Node, ObjectName
from pyproxy.report import SyncReport

NOW = 1_700_000_000.0
LOOPBACK = ("127.0.0.1",)
WEB = ObjectName("default", "web")
API = ObjectName("default", "api")
ABOUT = About("userspace", {"kind": "KubeProxyConfiguration", "mode": ""}, {"v": "2"}, NOW - 60)


class Reply(NamedTuple):
    status: int
    headers: dict
    body: str


async def ask(address, path="/", method="GET", body="", **headers):
    """One HTTP exchange; None if the connection is refused."""
    try:
        reader, writer = await asyncio.open_connection(*address)
    except ConnectionRefusedError:
        return None
    headers |= {"Host": "x", "Connection": "close", "Content-Length": str(len(body))}
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items()), "", body]
    writer.write("\r\n".join(lines).encode())
    try:
        async with asyncio.timeout(10):
            head, _, text = (await reader.read()).decode().partition("\r\n\r\n")
    finally:
        writer.close()
        await writer.wait_closed()
    first, *rest = head.split("\r\n")
    return Reply(int(first.split()[1]), dict(line.split(": ", 1) for line in rest), text)


@asynccontextmanager
async def running(server):
    """The address of a server while it runs."""
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(server.run(), name="server")
        async with asyncio.timeout(10):
            await server.listening.wait()
        try:
            yield server.address
        finally:
            task.cancel()


def free_port(ip="127.0.0.1"):
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as probe:
        probe.bind((ip, 0))
        return probe.getsockname()[1]


def taken_port():
    """A socket that listens, so that nobody else can."""
    taken = socket.create_server(("127.0.0.1", 0))
    return taken, taken.getsockname()[1]


def metrics_of(mode="userspace"):
    return Metrics(mode, (4, 6))


def healthy(node=None):
    health = Health(60.0)
    health.started(4, NOW)
    health.node_seen(node or Node("here"))
    return health


def stuck():
    health = healthy()
    health.queued(4, NOW - 60)
    return health


def health_on_loopback(health, metrics=None):
    return health_server("127.0.0.1:0", health, metrics or metrics_of(), lambda: NOW)


def metrics_on_loopback(metrics=None, about=ABOUT):
    return metrics_server("127.0.0.1:0", metrics or metrics_of(), about, lambda: NOW)


# --- health -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("health", "statuses"),
    [
        pytest.param(healthy(), (200, 200), id="all well"),
        pytest.param(healthy(Node("here", eligible=False)), (503, 200), id="node leaves"),
        pytest.param(stuck(), (503, 503), id="stuck"),
    ],
)
async def test_health_is_answered_and_counted(health, statuses):
    metrics = metrics_of()
    async with running(health_on_loopback(health, metrics)) as address:
        replies = [await ask(address, path) for path in ("/healthz", "/livez")]
    text = metrics.exposition("")[1].decode()
    assert tuple(reply.status for reply in replies) == statuses
    for kind, status in zip(("healthz", "livez"), statuses, strict=True):
        assert f'kubeproxy_proxy_{kind}_total{{code="{status}"}} 1.0\n' in text


async def test_health_is_json_that_is_not_to_be_guessed_at():
    async with running(health_on_loopback(healthy())) as address:
        reply = await ask(address, "/healthz")
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Server"] == "pyproxy"
    assert json.loads(reply.body)["nodeEligible"] is True


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS"])
async def test_any_method_will_do(method):
    async with running(health_on_loopback(healthy())) as address:
        assert (await ask(address, "/livez", method, body="x")).status == 200


async def test_head_gets_no_body():
    async with running(health_on_loopback(healthy())) as address:
        reply = await ask(address, "/livez", "HEAD")
    assert (reply.status, reply.body) == (200, "")


@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz/", "/healthz/x"])
async def test_the_health_server_has_nothing_else(path):
    async with running(health_on_loopback(healthy())) as address:
        assert (await ask(address, path)).status == 404


async def test_a_query_does_not_change_the_path():
    async with running(health_on_loopback(healthy())) as address:
        assert (await ask(address, "/healthz?verbose=1")).status == 200


async def test_nonsense_is_refused_and_the_server_goes_on():
    async with running(health_on_loopback(healthy())) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"\x16\x03\x01\x00\xa5\r\n\r\n")
        first = await reader.readline()
        writer.close()
        await writer.wait_closed()
        assert b" 400 " in first
        assert (await ask(address, "/livez")).status == 200


async def test_a_silent_client_does_not_keep_the_server_from_ending():
    async with running(health_on_loopback(healthy())) as address:
        reader, writer = await asyncio.open_connection(*address)
    async with asyncio.timeout(30):
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_one_connection_serves_several_probes():
    request = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    async with running(health_on_loopback(healthy())) as address:
        reader, writer = await asyncio.open_connection(*address)
        for _ in range(3):
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(x for x in head.split("\r\n") if x.startswith("Content-Length: "))
            assert json.loads(await reader.readexactly(int(length.split()[1])))["healthy"]
        writer.close()
        await writer.wait_closed()


# --- where it listens ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bind", "address"),
    [
        pytest.param("0.0.0.0:10256", ("0.0.0.0", 10256), id="IPv4"),
        pytest.param("[::]:10256", ("::", 10256), id="IPv6"),
        pytest.param("[fd00::1]:80", ("fd00::1", 80), id="IPv6 address"),
    ],
)
def test_an_address_to_bind_is_split(bind, address):
    assert parse_bind(bind) == address


@pytest.mark.parametrize(
    ("bind", "answering"),
    [
        pytest.param("0.0.0.0:0", ["127.0.0.1", "::1"], id="0.0.0.0 is both"),
        pytest.param("[::]:0", ["127.0.0.1", "::1"], id=":: is both"),
        pytest.param("127.0.0.1:0", ["127.0.0.1"], id="one address"),
        pytest.param("[::1]:0", ["::1"], id="one IPv6 address"),
    ],
)
async def test_a_server_listens_where_it_is_told(bind, answering):
    async with running(health_server(bind, healthy(), metrics_of(), lambda: NOW)) as (_, port):
        ips = ("127.0.0.1", "::1")
        assert [ip for ip in ips if await ask((ip, port), "/livez")] == answering


async def test_a_taken_address_is_told_once_and_tried_until_it_is_free(caplog):
    caplog.set_level("INFO", logger="pyproxy.http")
    taken, port = taken_port()
    failures = []
    failed = asyncio.Event()

    async def answer(_):
        return web.Response(text="here")

    async def free_after_some_tries():
        await failed.wait()
        for _ in range(10):
            await asyncio.sleep(0)
        taken.close()

    server = HttpServer(
        "proxy healthz",
        f"127.0.0.1:{port}",
        answer,
        on_failure=lambda error: (failures.append(error), failed.set()),
        retry_seconds=0,
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(free_after_some_tries(), name="free")
        async with running(server) as address:
            assert (await ask(address)).body == "here"
    assert failures == [
        f"failed to start proxy healthz on 127.0.0.1:{port}: Address already in use"
    ]
    assert [record.message for record in caplog.records] == ["cannot listen", "listening"]


async def test_a_taken_address_ends_a_server_that_must_have_it():
    taken, port = taken_port()
    failures = []
    server = health_server(
        f"127.0.0.1:{port}",
        healthy(),
        metrics_of(),
        lambda: NOW,
        hard_fail=True,
        on_failure=failures.append,
    )
    with taken, pytest.raises(ListenError, match="Address already in use"):
        await server.run()
    assert len(failures) == 1


async def test_an_address_is_free_again_when_its_server_has_ended():
    async with running(health_on_loopback(healthy())) as address:
        assert await ask(address, "/livez")
    assert await ask(address, "/livez") is None
    bind = f"127.0.0.1:{address[1]}"
    async with running(health_server(bind, healthy(), metrics_of(), lambda: NOW)) as again:
        assert (await ask(again, "/livez")).status == 200


# --- metrics ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "content_type", "body"),
    [
        pytest.param("/proxyMode", "text/plain; charset=utf-8", "userspace", id="mode"),
        pytest.param("/healthz", "text/plain; charset=utf-8", "ok", id="healthz"),
        pytest.param("/healthz/ping", "text/plain; charset=utf-8", "ok", id="ping"),
        pytest.param(
            "/configz",
            "application/json",
            '{"kubeproxy.config.k8s.io":{"kind":"KubeProxyConfiguration","mode":""}}',
            id="configuration",
        ),
        pytest.param("/flagz", "text/plain; charset=utf-8", "pyproxy flags\n\n--v=2\n", id="flags"),
    ],
)
async def test_the_metrics_server_tells_what_runs(path, content_type, body):
    async with running(metrics_on_loopback()) as address:
        reply = await ask(address, path)
    assert (reply.status, reply.headers["Content-Type"], reply.body) == (200, content_type, body)
    assert reply.headers["X-Content-Type-Options"] == "nosniff"


async def test_status_tells_how_long_it_runs_and_what_else_there_is():
    async with running(metrics_on_loopback()) as address:
        body = (await ask(address, "/statusz")).body
    assert "Started: 2023-11-14T22:12:20Z\nUp: 60 s\n" in body
    assert "/metrics /metrics/slis /proxyMode" in body


@pytest.mark.parametrize(
    ("accept", "content_type", "ending"),
    [
        pytest.param("*/*", "text/plain; version=0.0.4; charset=utf-8", "\n", id="text"),
        pytest.param(
            "application/openmetrics-text",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            "# EOF\n",
            id="openmetrics",
        ),
    ],
)
async def test_metrics_are_served_in_the_format_that_was_asked_for(accept, content_type, ending):
    metrics = metrics_of()
    metrics.observe_sync(SyncReport("userspace", 4, full=True, finished_at=NOW, seconds=0.1))
    async with running(metrics_on_loopback(metrics)) as address:
        reply = await ask(address, "/metrics", Accept=accept)
    assert (reply.status, reply.headers["Content-Type"]) == (200, content_type)
    assert 'kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv4"} 1.0' in reply.body
    assert reply.body.endswith(ending)


async def test_indicators_are_reset_by_deleting_them():
    metrics = metrics_of()
    metrics.probe("livez", 200)
    async with running(metrics_on_loopback(metrics)) as address:
        before = await ask(address, "/metrics/slis")
        reset = await ask(address, "/metrics/slis", "DELETE")
        after = await ask(address, "/metrics/slis")
    assert ("livez" in before.body, reset.status, "livez" in after.body) == (True, 200, False)


@pytest.mark.parametrize(
    "path", ["/debug/pprof/", "/debug/pprof/profile", "/debug/pprof/tasks", "/debug/flags/v", "/x"]
)
async def test_without_profiling_there_is_nothing_to_debug(path):
    async with running(metrics_on_loopback()) as address:
        assert (await ask(address, path)).status == 404


def debuggable(set_verbosity=lambda level: None):
    return metrics_on_loopback(
        about=About("userspace", {}, {}, NOW, profiling=True, set_verbosity=set_verbosity)
    )


async def test_a_profile_shows_where_the_event_loop_spends_its_time():
    loop = asyncio.get_running_loop()
    ticking = True

    def tick_of_this_test():
        if ticking:
            loop.call_soon(tick_of_this_test)

    async with running(debuggable()) as address:
        tick_of_this_test()
        reply = await ask(address, "/debug/pprof/profile?seconds=0.05")
        ticking = False
    assert reply.status == 200
    assert "tick_of_this_test" in reply.body


async def test_only_one_profile_is_taken_at_a_time():
    async with running(debuggable()) as address, asyncio.TaskGroup() as tasks:
        path = "/debug/pprof/profile?seconds=0.2"
        asked = [tasks.create_task(ask(address, path), name=f"ask {i}") for i in range(2)]
    assert sorted(task.result().status for task in asked) == [200, 409]


@pytest.mark.parametrize("seconds", ["0", "-1", "301", "nan", "1e9", "x", ""])
async def test_a_profile_has_a_length(seconds):
    async with running(debuggable()) as address:
        assert (await ask(address, f"/debug/pprof/profile?seconds={seconds}")).status == 400


async def test_tasks_are_listed_by_name():
    async with running(debuggable()) as address:
        reply = await ask(address, "/debug/pprof/tasks")
        index = await ask(address, "/debug/pprof/")
    assert "\nserver at " in f"\n{reply.body}"
    assert "tasks" in index.body


@pytest.mark.parametrize(
    ("method", "body", "status", "levels"),
    [
        pytest.param("PUT", "4", 200, [4], id="set"),
        pytest.param("PUT", "four", 400, [], id="not a number"),
        pytest.param("PUT", "", 400, [], id="nothing"),
        pytest.param("PUT", "9" * 1000, 400, [], id="too long"),
        pytest.param("GET", "", 405, [], id="only PUT"),
    ],
)
async def test_verbosity_is_put(method, body, status, levels):
    seen = []
    async with running(debuggable(seen.append)) as address:
        reply = await ask(address, "/debug/flags/v", method, body)
    assert (reply.status, seen) == (status, levels)


# --- health of Services -------------------------------------------------------------------------


def health_port(port, local_count=1):
    return HealthPort(port, frozenset(f"10.244.1.{n}" for n in range(local_count)))


@asynccontextmanager
async def service_servers(addresses=LOOPBACK, health=None):
    """Responders, and the failures that they tell of."""
    failures = []
    servers = ServiceHealthServers(
        addresses, health or healthy(), lambda: NOW, lambda service, _: failures.append(service)
    )
    try:
        yield servers, failures
    finally:
        await servers.aclose()


async def weight(port, ip="127.0.0.1"):
    """The status and weight that a load balancer sees, or None."""
    reply = await ask((ip, port), "/any/path")
    return reply and (reply.status, reply.headers["X-Load-Balancing-Endpoint-Weight"])


@pytest.mark.parametrize(
    ("health", "local_count", "expected"),
    [
        pytest.param(healthy(), 2, (200, "2"), id="two here"),
        pytest.param(healthy(), 0, (503, "0"), id="none here"),
        pytest.param(stuck(), 2, (503, "2"), id="stuck, and the weight is unchanged"),
        pytest.param(
            healthy(Node("here", eligible=False)), 2, (200, "2"), id="node does not matter"
        ),
    ],
)
async def test_a_service_port_tells_status_and_weight(health, local_count, expected):
    port = free_port()
    async with service_servers(health=health) as (servers, _):
        await servers.update({WEB: health_port(port, local_count)})
        assert await weight(port) == expected


async def test_the_body_names_the_service():
    port = free_port()
    async with service_servers() as (servers, _):
        await servers.update({WEB: health_port(port, 3)})
        reply = await ask(("127.0.0.1", port))
    assert json.loads(reply.body) == {
        "service": {"namespace": "default", "name": "web"},
        "localEndpoints": 3,
        "serviceProxyHealthy": True,
    }


async def test_a_service_port_follows_its_counts():
    port = free_port()
    seen = []
    async with service_servers() as (servers, _):
        for count in (1, 0, 2):
            await servers.update({WEB: health_port(port, count)})
            seen.append(await weight(port))
    assert seen == [(200, "1"), (503, "0"), (200, "2")]


async def test_an_unchanged_responder_keeps_its_connections():
    port = free_port()
    async with service_servers() as (servers, _):
        await servers.update({WEB: health_port(port)})
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await servers.update({WEB: health_port(port, 2), API: health_port(free_port())})
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
    assert b"X-Load-Balancing-Endpoint-Weight: 2\r\n" in head


async def test_a_service_port_closes_with_its_service():
    port = free_port()
    async with service_servers() as (servers, _):
        await servers.update({WEB: health_port(port)})
        await servers.update({})
        assert await weight(port) is None


async def test_a_changed_port_moves():
    old, new = free_port(), free_port()
    async with service_servers() as (servers, _):
        await servers.update({WEB: health_port(old)})
        await servers.update({WEB: health_port(new)})
        assert (await weight(old), await weight(new)) == (None, (200, "1"))


async def test_two_services_can_exchange_their_ports():
    one, two = free_port(), free_port()
    async with service_servers() as (servers, failures):
        await servers.update({WEB: health_port(one, 1), API: health_port(two, 2)})
        await servers.update({WEB: health_port(two, 1), API: health_port(one, 2)})
        assert (await weight(one), await weight(two)) == ((200, "2"), (200, "1"))
    assert failures == []


async def test_a_service_port_answers_on_its_addresses_only():
    port = free_port()
    async with service_servers(("127.0.0.1", "127.0.0.3")) as (servers, _):
        await servers.update({WEB: health_port(port)})
        ips = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
        assert [ip for ip in ips if await weight(port, ip)] == ["127.0.0.1", "127.0.0.3"]


async def test_the_wildcards_of_both_families_do_not_collide():
    port = free_port()
    async with service_servers(("0.0.0.0",)) as (four, _), service_servers(("::",)) as (six, _):
        await six.update({WEB: health_port(port, 6)})
        await four.update({WEB: health_port(port, 4)})
        assert (await weight(port), await weight(port, "::1")) == ((200, "4"), (200, "6"))


async def test_a_port_taken_on_one_address_is_served_on_none_until_it_is_free(caplog):
    caplog.set_level("INFO", logger="pyproxy.http")
    taken, port = taken_port()
    other = free_port("127.0.0.2")
    ports = {WEB: health_port(port), API: health_port(other)}
    async with service_servers(("127.0.0.2", "127.0.0.1")) as (servers, failures):
        with taken:
            await servers.update(ports)
            await servers.update(ports)
            while_taken = (await weight(port, "127.0.0.2"), await weight(other, "127.0.0.2"))
        await servers.update(ports)
        afterwards = await weight(port, "127.0.0.2")
    assert (while_taken, afterwards) == ((None, (200, "1")), (200, "1"))
    assert failures == [WEB]
    assert [record.message for record in caplog.records] == ["cannot listen", "listening"]


async def test_updates_at_the_same_time_do_not_mix():
    port = free_port()
    async with service_servers() as (servers, failures):
        async with asyncio.TaskGroup() as tasks:
            for count in range(4):
                ports = {} if count == 1 else {WEB: health_port(port, count)}
                tasks.create_task(servers.update(ports), name=f"update {count}")
        assert (await weight(port), failures) == ((200, "3"), [])


# --- what a client may cost ---------------------------------------------------------------------

PROBE = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


async def until(holds):
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.02)


async def answered(reader):
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if b"content-length" in line)
    await reader.readexactly(int(length.split(b":")[1]))
    return int(head.split()[1])


async def test_a_client_may_ask_again_on_its_connection():
    async with running(health_on_loopback(healthy())) as address:
        reader, writer = await asyncio.open_connection(*address)
        for _ in range(3):
            writer.write(PROBE)
            assert await answered(reader) == 200
        writer.close()


def test_a_scrape_a_minute_finds_its_connection():
    assert http.IDLE_SECONDS > 60


@pytest.mark.parametrize(
    ("said", "replies"),
    [
        pytest.param(b"", 0, id="nothing"),
        pytest.param(PROBE[:-4], 0, id="half a request"),
        pytest.param(PROBE, 1, id="no second request"),
    ],
)
async def test_a_client_that_does_not_go_on_is_let_go(said, replies, monkeypatch):
    monkeypatch.setattr(http, "IDLE_SECONDS", 0.2)
    async with running(health_on_loopback(healthy())) as address, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(said)
        assert (await reader.read()).count(b"HTTP/1.1 200") == replies
        writer.close()


async def test_a_client_that_does_not_read_is_let_go(monkeypatch):
    monkeypatch.setattr(http, "UNREAD_SECONDS", 1)
    asked = []

    async def much(request):
        asked.append(request.transport)
        return web.Response(body=bytes(32 << 20))

    responder = Responder(much)
    await responder.open([("127.0.0.1", 0)], dual_stack=False)
    with socket.create_connection(responder.address()) as silent:
        silent.send(PROBE)
        await until(lambda: asked and asked[0].is_closing())
    await responder.close()


async def test_a_probe_is_answered_however_many_linger(monkeypatch):
    monkeypatch.setattr(http, "CLIENTS", 3)
    async with running(health_on_loopback(healthy())) as address:
        lingering = []
        for _ in range(10):
            lingering.append(await asyncio.open_connection(*address))
            assert (await ask(address, "/livez")).status == 200
        closed = [reader for reader, _ in lingering if reader.at_eof() or reader.exception()]
        assert len(closed) >= 7
        for _, writer in lingering:
            writer.close()
