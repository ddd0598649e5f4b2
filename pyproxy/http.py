"""Serves health and metrics that others have already computed.

It stands on aiohttp's low-level server: the client part, which ``source`` needs, has paid for most
of it (``import aiohttp.web`` after ``import aiohttp``: 50 ms and 1.1 MiB more), and a load
balancer's probes are foreign input that is better parsed by code with many users.
"""

import asyncio
import contextlib
import logging
import platform
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final

import msgspec
from aiohttp import web
from msgspec import Struct

from pyproxy import __version__
from pyproxy.debug import Debug, Page, sent, text
from pyproxy.health import (
    JSON_HEADERS,
    Answer,
    Health,
    Verdict,
    healthz,
    livez,
    rfc3339,
    service_health,
)
from pyproxy.metrics import Metrics, Probe
from pyproxy.model import HealthPort, ObjectName

log = logging.getLogger(__name__)

Clock = Callable[[], float]
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

RETRY_SECONDS: Final = 5.0
CLOSE_SECONDS: Final = 1.0  # for answers under way when a server closes
# For a client to ask, and to ask again: longer than from one scrape to the next, mostly a minute.
IDLE_SECONDS: Final = 75.0
UNREAD_SECONDS: Final = 30  # for a client to read on; the kernel ends the connection then
CLIENTS: Final = 200  # at a time: one more, and the oldest has to go
BACKLOG: Final = 100  # that come at once: so many more there may be, until the next comes


class ListenError(Exception):
    """An address that the configuration insists on cannot be listened on."""


class Responder:
    """One HTTP handler on one or more addresses: all of them, or it is not opened.

    Anybody may connect, and each connection is a file that the forwarder would need: a client has
    so long to ask and to read, and a newcomer, as a probe is, comes before those that linger.
    """

    def __init__(self, handler: Handler) -> None:
        # Without access log: a probe each second is not news.
        self._http = web.Server(handler, access_log=None, keepalive_timeout=IDLE_SECONDS)
        self._sockets: list[socket.socket] = []
        self._servers: list[asyncio.Server] = []

    async def open(self, addresses: Sequence[tuple[str, int]], *, dual_stack: bool) -> None:
        """Listen. Raises OSError, and then listens nowhere."""
        try:
            for ip, port in addresses:
                self._sockets.append(_bound_socket(ip, port, dual_stack=dual_stack))
            await self._listen()
        except (OSError, asyncio.CancelledError):
            await self.close()
            raise

    async def open_unix(self, bound: socket.socket) -> None:
        """Listen on a Unix socket that has its path already."""
        self._sockets.append(bound)
        await self._listen()

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        for bound in self._sockets:
            is_unix = bound.family == socket.AF_UNIX
            create = loop.create_unix_server if is_unix else loop.create_server
            self._servers.append(await create(self._client, sock=bound, backlog=BACKLOG))

    def _client(self) -> asyncio.Protocol:
        """Return who talks to a client that has just come."""
        for oldest in self._http.connections[: 1 - CLIENTS]:
            if oldest.transport is not None:
                oldest.transport.abort()  # not close(), which waits for what is not read
        return self._http()

    async def close(self) -> None:
        """Stop listening, end what is under way; the addresses are free when this returns."""
        for server in self._servers:
            server.close()
        for bound in self._sockets:
            bound.close()
        self._http.pre_shutdown()
        await self._http.shutdown(CLOSE_SECONDS)
        # From Python 3.12 on this waits for clients, too, and one that does not read may never go.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                for server in self._servers:
                    await server.wait_closed()
        self._servers, self._sockets = [], []

    def address(self) -> tuple[str, int]:
        ip, port, *_ = self._sockets[0].getsockname()
        return ip, port


class HttpServer:
    """Keeps a handler listening on one address, for as long as ``run`` runs.

    What cannot be listened on is tried again every five seconds, or with ``hard_fail`` ends
    ``run`` with a ListenError. ``on_failure`` hears of it once for each time of trouble.
    """

    def __init__(
        self,
        name: str,
        bind: str,
        handler: Handler,
        *,
        hard_fail: bool = False,
        on_failure: Callable[[str], None] = lambda error: None,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._name = name
        self._bind = bind
        self._handler = handler
        self._hard_fail = hard_fail
        self._on_failure = on_failure
        self._retry_seconds = retry_seconds
        self.listening = asyncio.Event()
        self.address: tuple[str, int] | None = None

    async def run(self) -> None:
        """Serve until cancelled."""
        responder = Responder(self._handler)
        await self._listen(responder)
        try:
            self.address = responder.address()
            self.listening.set()
            await asyncio.get_running_loop().create_future()
        finally:
            self.listening.clear()
            self.address = None
            await responder.close()

    async def _listen(self, responder: Responder) -> None:
        address = parse_bind(self._bind)
        in_trouble = False
        while True:
            try:
                await responder.open([address], dual_stack=True)
            except OSError as error:
                if not in_trouble:
                    self._report(error)
                in_trouble = True
                await asyncio.sleep(self._retry_seconds)
            else:
                log.info("listening", extra={"server": self._name, "bind": self._bind})
                return

    def _report(self, error: OSError) -> None:
        message = f"failed to start {self._name} on {self._bind}: {error.strerror or error}"
        self._on_failure(message)
        if self._hard_fail:
            raise ListenError(message) from error
        log.warning("cannot listen", extra={"server": self._name, "error": message})


class ServiceHealthServers:
    """Answers the health check node ports of one family, on the addresses of its node ports."""

    def __init__(
        self,
        addresses: Sequence[str],
        health: Health,
        clock: Clock,
        on_failure: Callable[[ObjectName, str], None] = lambda service, error: None,
    ) -> None:
        self._addresses = tuple(addresses)
        self._health = health
        self._clock = clock
        self._on_failure = on_failure
        self._responders: dict[ObjectName, tuple[int, Responder]] = {}
        self._local_counts: dict[ObjectName, int] = {}
        self._failing: dict[ObjectName, int] = {}
        self._updating = asyncio.Lock()

    async def update(self, ports: Mapping[ObjectName, HealthPort]) -> None:
        """Open, move and close responders so that they are those of ``ports``.

        A port that cannot be opened is closed on every address and tried again by the next
        update. ``on_failure`` hears of it when this begins.
        """
        async with self._updating:
            self._local_counts = {name: len(port.local_ips) for name, port in ports.items()}
            # Close before opening: a port may have passed from one Service to another.
            for service, (number, responder) in tuple(self._responders.items()):
                if service not in ports or ports[service].port != number:
                    del self._responders[service]
                    await responder.close()
            for service, port in ports.items():
                if service not in self._responders:
                    await self._open(service, port.port)
            self._failing = {s: n for s, n in self._failing.items() if s in ports}

    async def aclose(self) -> None:
        await self.update({})

    async def _open(self, service: ObjectName, port: int) -> None:
        responder = Responder(partial(self._answer, service))
        try:
            await responder.open([(ip, port) for ip in self._addresses], dual_stack=False)
        except OSError as error:
            self._report(service, port, error)
            return
        self._responders[service] = (port, responder)
        if self._failing.pop(service, None) is not None:
            log.info("listening", extra={"service": str(service), "port": port})

    def _report(self, service: ObjectName, port: int, error: OSError) -> None:
        if self._failing.get(service) == port:
            return
        self._failing[service] = port
        message = f"{service}: healthCheckNodePort {port}: {error.strerror or error}"
        log.warning("cannot listen", extra={"service": str(service), "error": message})
        self._on_failure(service, message)

    async def _answer(self, service: ObjectName, _: web.BaseRequest) -> web.Response:
        healthy = self._health.verdict(self._clock()).healthy
        return sent(service_health(service, self._local_counts.get(service, 0), healthy))


def health_server(
    bind: str,
    health: Health,
    metrics: Metrics,
    clock: Clock,
    *,
    hard_fail: bool = False,
    on_failure: Callable[[str], None] = lambda error: None,
) -> HttpServer:
    """Return the server of ``/healthz`` and ``/livez``."""

    def probed(
        kind: Probe, render: Callable[[Verdict], Answer], _: web.BaseRequest
    ) -> web.Response:
        answer = render(health.verdict(clock()))
        metrics.probe(kind, answer.status)
        return sent(answer)

    pages: Mapping[str, Page] = {
        "/healthz": partial(probed, "healthz", healthz),
        "/livez": partial(probed, "livez", livez),
    }
    return HttpServer(
        "proxy healthz", bind, partial(_serve, pages), hard_fail=hard_fail, on_failure=on_failure
    )


class About(Struct, frozen=True):
    """What the metrics server tells of this process besides its metrics."""

    mode: str
    config: Mapping[str, object]  # the effective KubeProxyConfiguration, as its file would say it
    flags: Mapping[str, str]
    started_at: float  # Unix seconds
    profiling: bool = False
    set_verbosity: Callable[[int], None] = lambda level: None


def metrics_server(
    bind: str,
    metrics: Metrics,
    about: About,
    clock: Clock,
    *,
    hard_fail: bool = False,
    on_failure: Callable[[str], None] = lambda error: None,
    before: Callable[[], Awaitable[None]] | None = None,
) -> HttpServer:
    """Return the server of ``/metrics`` and of what helps a person to find out what is wrong.

    ``before`` is awaited before each scrape: it reads what is counted elsewhere.
    """
    configz = msgspec.json.encode({"kubeproxy.config.k8s.io": about.config})
    flagz = "".join(f"--{name}={value}\n" for name, value in sorted(about.flags.items()))
    pages: dict[str, Page] = {
        "/metrics": partial(_scraped, metrics, before),
        "/metrics/slis": partial(_slis, metrics),
        "/proxyMode": lambda _: text(about.mode),
        "/configz": lambda _: sent(Answer(200, JSON_HEADERS, configz)),
        "/healthz": lambda _: text("ok"),
        "/healthz/ping": lambda _: text("ok"),
        "/flagz": lambda _: text(f"pyproxy flags\n\n{flagz}"),
    }
    if about.profiling:
        pages |= Debug(about.set_verbosity).pages()
    pages["/statusz"] = lambda _: text(_status(about.started_at, clock(), sorted(pages)))
    return HttpServer(
        "metrics server", bind, partial(_serve, pages), hard_fail=hard_fail, on_failure=on_failure
    )


def parse_bind(bind: str) -> tuple[str, int]:
    """Split ``IP:port`` or ``[IPv6]:port``, whose form the configuration has checked."""
    ip, _, port = bind.rpartition(":")
    return ip.removeprefix("[").removesuffix("]"), int(port)


def _bound_socket(ip: str, port: int, *, dual_stack: bool) -> socket.socket:
    """Return a bound socket. With ``dual_stack`` each wildcard address stands for both families.

    kube-proxy: Go listens so for "tcp"; a node without IPv6 keeps to IPv4.
    """
    if dual_stack and ip == "0.0.0.0" and _has_ipv6():
        ip = "::"
    is_ipv6 = ":" in ip
    bound = socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
        if is_ipv6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not dual_stack))
        bound.bind((ip, port))
    except OSError:
        bound.close()
        raise
    return bound


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


async def _serve(pages: Mapping[str, Page], request: web.BaseRequest) -> web.Response:
    page = pages.get(request.path)
    if page is None:
        return text("404 page not found\n", 404)
    response = page(request)
    return response if isinstance(response, web.Response) else await response


def _exposed(
    exposition: Callable[[str], tuple[str, bytes]], request: web.BaseRequest
) -> web.Response:
    content_type, body = exposition(request.headers.get("Accept", ""))
    return sent(Answer(200, {"Content-Type": content_type}, body))


async def _scraped(
    metrics: Metrics, before: Callable[[], Awaitable[None]] | None, request: web.BaseRequest
) -> web.Response:
    if before is not None:
        await before()
    return _exposed(metrics.exposition, request)


def _slis(metrics: Metrics, request: web.BaseRequest) -> web.Response:
    if request.method == "DELETE":
        metrics.reset_slis()
        return text("metrics reset\n")
    return _exposed(metrics.slis, request)


def _status(started_at: float, now: float, paths: Sequence[str]) -> str:
    return (
        f"pyproxy status\n\nStarted: {rfc3339(started_at)}\nUp: {now - started_at:.0f} s\n"
        f"Version: {__version__}\nPython: {platform.python_version()}\nPaths: {' '.join(paths)}\n"
    )
