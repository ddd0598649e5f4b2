"""One API server: its lists and watches as events, and the Events that we tell it."""

import asyncio
import logging
import math
import socket
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from random import Random
from types import TracebackType
from typing import Final, NamedTuple, Self

import aiohttp
import msgspec

from pyproxy import __version__
from pyproxy.kube.access import Access, SourceError, open_access
from pyproxy.kube.decode import DecodeError, decode_event, decode_list, decode_refusal
from pyproxy.kube.events import (
    Absent,
    Bookmark,
    Event,
    Expired,
    Page,
    Refused,
)
from pyproxy.kube.objects import selector_of_services
from pyproxy.kube.watch import ListPage, Request, Watch
from pyproxy.model import Kind

log = logging.getLogger(__name__)

CONNECT_SECONDS: Final = 10.0
ANSWER_SECONDS: Final = 30.0  # until the first byte
PAGE_SECONDS: Final = 60.0
WATCH_SECONDS: Final = (300, 600)  # what we ask for, at random: servers should not see us in step
WATCH_GRACE_SECONDS: Final = 15.0
LIST_SILENCE_SECONDS: Final = 15.0  # a server that falls silent in its list has no end mark
USER_TIMEOUT_MS: Final = 30_000
MAX_LINE: Final = 64 << 20
MERGE_PATCH: Final = "application/merge-patch+json"

Observe = Callable[[str, str, str, float], None]  # method, host, code, seconds until the answer


class Resource(NamedTuple):
    path: str
    query: Mapping[str, str]


class Regarding(NamedTuple):
    """What an Event is about."""

    kind: str
    name: str
    namespace: str = ""
    uid: str = ""


class Throttle:
    """Lets ``burst`` requests go at once, and ``qps`` each second after that; 0: all of them."""

    def __init__(self, qps: float = 0.0, burst: int = 1) -> None:
        self._interval = 1 / qps if qps > 0 else 0.0
        self._slack = self._interval * (max(burst, 1) - 1)
        self._due = -math.inf  # when the next one would go, if all had kept the interval

    def delay(self, now: float) -> float:
        """Count a request; return after how many seconds it may go."""
        due = max(self._due, now)
        self._due = due + self._interval
        return max(0.0, due - self._slack - now)


class RefusedError(Exception):
    """The server answered a request with an error."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(f"{refused.status} {refused.message}")
        self.refused = refused


class UnreachableError(Exception):
    """A request found no server, or what answered was none."""


async def connect(
    kubeconfig: str,
    master: str = "",
    *,
    node: str,
    proxy_name: str = "",
    observe: Observe | None = None,
    throttle: Throttle | None = None,
) -> "KubeApi":
    """Return the API server that the configuration names. Raises ``SourceError``.

    It is not asked anything yet: it may well come up later than we do.
    """
    access = await open_access(kubeconfig, master)
    return KubeApi(
        access,
        node=node,
        proxy_name=proxy_name,
        observe=observe or _nobody_observes,
        throttle=throttle or Throttle(),
        random=Random(),
    )


class KubeApi:
    """One API server, over one HTTP session."""

    def __init__(
        self,
        access: Access,
        *,
        node: str,
        proxy_name: str,
        observe: Observe,
        throttle: Throttle,
        random: Random,
    ) -> None:
        self._access = access
        self._node = node
        self._proxy_name = proxy_name
        self._observe = observe
        self._throttle = throttle
        self._random = random
        self._resources = _resources(node, proxy_name)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, socket_factory=_guarded_socket),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            headers={"Accept": "application/json", "User-Agent": f"pyproxy/{__version__}"},
            read_bufsize=1 << 18,
            trust_env=True,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._session.close()

    @property
    def url(self) -> str:
        return self._access.url

    async def events(self, kind: Kind, request: Request) -> AsyncGenerator[Event, None]:
        """Ask once, and yield what the answer says until it ends or is cut.

        Raises ``RefusedError`` or ``UnreachableError`` when there is no answer to begin with.
        """
        resource = self._resources[kind]
        try:
            match request:
                case ListPage():
                    yield await self._page(kind, resource, request)
                case Watch():
                    async with aclosing(self._watch(kind, resource, request)) as events:
                        async for event in events:
                            yield event
        except RefusedError as error:
            if kind != "ServiceCIDR" or error.refused.status != 404:
                raise
            yield Absent()  # the API is younger than the others: Kubernetes 1.33

    async def _page(self, kind: Kind, resource: Resource, request: ListPage) -> Page:
        query = dict(resource.query)
        if request.limit:
            query["limit"] = str(request.limit)
        if request.continue_token:
            query["continue"] = request.continue_token
        response = await self._request("GET", resource.path, query)
        async with response:
            try:
                async with asyncio.timeout(PAGE_SECONDS):
                    body = await response.read()
                # Half a second for 500 full slices: not on the event loop.
                return await asyncio.to_thread(decode_list, body, kind, self._proxy_name)
            except (aiohttp.ClientError, OSError, DecodeError) as error:
                raise UnreachableError(_words(error)) from error

    async def _watch(
        self, kind: Kind, resource: Resource, request: Watch
    ) -> AsyncGenerator[Event, None]:
        seconds = self._random.randint(*WATCH_SECONDS)
        response = await self._request(
            "GET", resource.path, {**resource.query, **_watch_query(request, seconds)}
        )
        clock = asyncio.get_running_loop().time
        deadline = clock() + seconds + WATCH_GRACE_SECONDS
        is_list = request.send_initial_events
        tail = b""
        async with response:
            while True:
                until = min(deadline, clock() + LIST_SILENCE_SECONDS) if is_list else deadline
                chunk = await _read(response, until)
                if not chunk:
                    return  # a line without an end was cut: the resumed watch brings it whole
                lines, tail = split_lines(tail, chunk)
                for line in lines:
                    event = decode_event(line, kind, self._proxy_name)
                    is_list = is_list and not isinstance(event, Bookmark | Expired)
                    yield event

    async def create_event(
        self,
        reason: str,
        message: str,
        regarding: Regarding,
        *,
        type: str = "Normal",
        action: str = "StartKubeProxy",
    ) -> None:
        """Tell the cluster what happened. That it cannot be told is no reason to stop: a log."""
        # Events about what is in no namespace live in this one.
        namespace = regarding.namespace or "default"
        now = datetime.now(UTC)
        event = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {
                "name": f"{regarding.name}.{int(now.timestamp() * 1e6):x}",
                "namespace": namespace,
            },
            "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "reportingController": "kube-proxy",
            "reportingInstance": self._node,
            "action": action,
            "reason": reason,
            "regarding": {"apiVersion": "v1", **regarding._asdict()},
            "note": message,
            "type": type,
        }
        path = f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"
        try:
            response = await self._request("POST", path, {}, msgspec.json.encode(event))
            response.release()
        except (RefusedError, UnreachableError, SourceError) as error:
            log.warning("could not create the event %s: %s", reason, error)

    async def annotate_node(self, annotations: Mapping[str, str]) -> str | None:
        """Put annotations on our Node; return why that cannot be.

        By way of its status: who may patch that alone may not change its taints.
        """
        patch = msgspec.json.encode({"metadata": {"annotations": dict(annotations)}})
        path = f"/api/v1/nodes/{self._node}/status"
        try:
            response = await self._request("PATCH", path, {}, patch, kind=MERGE_PATCH)
            response.release()
        except (RefusedError, UnreachableError, SourceError) as error:
            return str(error)
        return None

    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: bytes | None = None,
        *,
        kind: str = "application/json",
    ) -> aiohttp.ClientResponse:
        """Return the answer's beginning; whoever gets it releases it."""
        clock = asyncio.get_running_loop().time
        if "continue" not in query:  # a list is one request, however many pages it has
            await asyncio.sleep(self._throttle.delay(clock()))
        started_at = clock()
        code = "<error>"
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                response = await self._send(method, path, query, body, kind)
                code = str(response.status)
                if response.status >= 400:
                    raise RefusedError(await self._refusal(response))
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UnreachableError(_words(error)) from error
        finally:
            self._observe(method, _host(self.url), code, clock() - started_at)
        return response

    async def _send(
        self, method: str, path: str, query: Mapping[str, str], body: bytes | None, kind: str
    ) -> aiohttp.ClientResponse:
        headers = await self._access.headers()
        if body is not None:
            headers["Content-Type"] = kind
        return await self._session.request(
            method,
            self.url + path,
            params=query,
            data=body,
            headers=headers,
            ssl=self._access.ssl_context() if self.url.startswith("https") else True,
            proxy=self._access.proxy,
            server_hostname=self._access.server_hostname,
        )

    async def _refusal(self, response: aiohttp.ClientResponse) -> Refused:
        async with response:
            body = await response.read()
        if response.status == 401:
            self._access.distrust()
        return decode_refusal(response.status, body, _seconds(response.headers.get("Retry-After")))


def split_lines(tail: bytes, chunk: bytes) -> tuple[list[bytes], bytes]:
    """Return the lines that are complete now, and the beginning of the next one."""
    *lines, tail = (tail + chunk if tail else chunk).split(b"\n")
    if len(tail) > MAX_LINE:
        raise UnreachableError(f"a line of more than {MAX_LINE} bytes")
    return [line for line in lines if line], tail


async def _read(response: aiohttp.ClientResponse, deadline: float) -> bytes:
    """Return the next bytes; none at the end, however it came, and at the deadline."""
    try:
        async with asyncio.timeout_at(deadline):
            return await response.content.readany()
    except (aiohttp.ClientError, OSError):  # TimeoutError is an OSError
        return b""


# --- requests -----------------------------------------------------------------------------------


def _resources(node: str, proxy_name: str) -> dict[Kind, Resource]:
    """Return what to ask for. The selection is the server's: most of it never reaches us."""
    return {
        "Service": Resource(
            "/api/v1/services",
            {
                "labelSelector": selector_of_services(proxy_name),
                "fieldSelector": "spec.clusterIP!=None",
            },
        ),
        "EndpointSlice": Resource(
            "/apis/discovery.k8s.io/v1/endpointslices",
            {"labelSelector": "!service.kubernetes.io/headless"},
        ),
        "Node": Resource("/api/v1/nodes", {"fieldSelector": f"metadata.name={node}"}),
        "ServiceCIDR": Resource("/apis/networking.k8s.io/v1/servicecidrs", {}),
    }


def _watch_query(request: Watch, seconds: int) -> dict[str, str]:
    query = {"watch": "1", "allowWatchBookmarks": "true", "timeoutSeconds": str(seconds)}
    if request.version:
        query["resourceVersion"] = request.version
    if request.send_initial_events:
        query |= {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
    return query


def _guarded_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """Return a socket that notices within half a minute that the other side is gone.

    A watch that has nothing to say looks the same as one whose server lost its power.
    """
    family, kind, proto, *_ = address
    guarded = socket.socket(family, kind, proto)
    guarded.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    guarded.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    guarded.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    guarded.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
    return guarded


def _seconds(retry_after: str | None) -> float:
    """Return a Retry-After; its other form, a date, says nothing against our own clock."""
    return float(retry_after) if retry_after and retry_after.isdecimal() else 0.0


def _host(url: str) -> str:
    return url.partition("://")[2].partition("/")[0]


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or "there was no answer in time"


def _nobody_observes(method: str, host: str, code: str, seconds: float) -> None:
    pass
