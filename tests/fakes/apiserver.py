"""An API server in this process that can cut, delay, repeat, forget and refuse."""

import asyncio
import json
from collections.abc import Mapping
from typing import NamedTuple

from aiohttp import web

from tests.fakes.history import History

RESOURCES = {
    "/api/v1/services": "services",
    "/apis/discovery.k8s.io/v1/endpointslices": "endpointslices",
    "/api/v1/nodes": "nodes",
    "/apis/networking.k8s.io/v1/servicecidrs": "servicecidrs",
}


class Asked(NamedTuple):
    resource: str
    query: Mapping[str, str]
    headers: Mapping[str, str]

    @property
    def is_watch(self):
        return "watch" in self.query


class FakeApiServer:
    """Serves on loopback for as long as its context lasts."""

    def __init__(self, *, ssl_context=None):
        self.streams = "yes"  # or "refuses", or "ignores"
        self.absent = set()  # resources it does not know
        self.failures = []  # answers for the next requests: status, headers, text
        self.repeats = 0  # how many versions a resumed watch goes back
        self.page_limit = 10_000  # a page never has more objects, whatever is asked
        self.chunk_bytes = 1 << 20
        self.asked = []
        self.events = []  # what was created
        self.patches = []  # of which Node, and what
        self._histories = {resource: History() for resource in RESOURCES.values()}
        self._pages = {}
        self._news = asyncio.Event()
        self._transports = set()
        self._ssl_context = ssl_context

    async def __aenter__(self):
        app = web.Application(client_max_size=64 << 20)
        for path, resource in RESOURCES.items():
            app.router.add_get(path, self._handler(resource))
        app.router.add_post("/apis/events.k8s.io/v1/namespaces/{namespace}/events", self._create)
        app.router.add_patch("/api/v1/nodes/{name}/status", self._patch)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._ssl_context)
        await site.start()
        port = self._runner.addresses[0][1]
        self.url = f"{'https' if self._ssl_context else 'http'}://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_):
        self.cut()
        await self._runner.cleanup()

    # --- the cluster ------------------------------------------------------------------------

    def put(self, resource, name, **fields):
        metadata = {"name": name, "namespace": "default", **fields.pop("metadata", {})}
        self._histories[resource].put(name, {"metadata": metadata, **fields})
        self._tell()

    def delete(self, resource, name):
        self._histories[resource].delete(name)
        self._tell()

    @property
    def open_watches(self):
        return len(self._transports)

    # --- trouble ----------------------------------------------------------------------------

    def forget(self):
        """Compact the history: open watches end with an error, tokens of pages expire."""
        for history in self._histories.values():
            history.forget()
        self._pages.clear()
        self._tell()

    def cut(self):
        """Reset every connection, in the middle of whatever it carries."""
        for transport in self._transports:
            transport.abort()
        self._transports.clear()

    def _tell(self):
        self._news.set()
        self._news = asyncio.Event()

    # --- answers ----------------------------------------------------------------------------

    def _handler(self, resource):
        async def answer(request):
            self.asked.append(Asked(resource, dict(request.query), dict(request.headers)))
            if self.failures:
                status, headers, text = self.failures.pop(0)
                return web.Response(status=status, headers=headers, text=text)
            if resource in self.absent:
                return refusal(404, "NotFound")
            if "watch" in request.query:
                return await self._watch(request, resource)
            return self._list(request.query, self._histories[resource])

        return answer

    def _list(self, query, history):
        token = query.get("continue", "")
        if token and token not in self._pages:
            return refusal(410, "Expired")
        version, left = self._pages[token] if token else (history.version, history.present())
        limit = min(self.page_limit, int(query.get("limit", 0)) or len(left))
        metadata = {"resourceVersion": str(version)}
        if left[limit:]:
            metadata["continue"] = f"page-{len(self._pages)}"
            self._pages[metadata["continue"]] = (version, left[limit:])
        return web.json_response(
            {"metadata": metadata, "items": [versioned(past) for past in left[:limit]]}
        )

    async def _watch(self, request, resource):
        history = self._histories[resource]
        is_list = "sendInitialEvents" in request.query
        if is_list and self.streams == "refuses":
            return refusal(422, "Invalid")
        response = web.StreamResponse()
        await response.prepare(request)
        self._transports.add(request.transport)
        cursor = int(request.query.get("resourceVersion", 0))
        if not cursor:
            cursor = history.version
            await self._write(response, *map(line, history.present()))
            if is_list and self.streams == "yes":
                await self._write(response, bookmark(cursor, complete=True))
        else:
            cursor -= self.repeats
        while (pasts := history.since(cursor)) is not None:
            news = self._news
            cursor = history.version
            await self._write(response, *map(line, pasts))
            await news.wait()
        await self._write(response, event("ERROR", {"code": 410, "reason": "Expired"}))
        return response

    async def _write(self, response, *lines):
        data = b"".join(lines)
        for start in range(0, len(data), self.chunk_bytes):
            await response.write(data[start : start + self.chunk_bytes])

    async def send(self, data):
        """Write these very bytes on every open connection, as a chunk of the answer."""
        for transport in self._transports:
            transport.write(b"%x\r\n%s\r\n" % (len(data), data))

    async def _create(self, request):
        if self.failures:
            status, headers, text = self.failures.pop(0)
            return web.Response(status=status, headers=headers, text=text)
        self.events.append((request.match_info["namespace"], await request.json()))
        return web.json_response({}, status=201)

    async def _patch(self, request):
        if self.failures:
            status, headers, text = self.failures.pop(0)
            return web.Response(status=status, headers=headers, text=text)
        assert request.content_type == "application/merge-patch+json"
        self.patches.append((request.match_info["name"], await request.json()))
        return web.json_response({})


def versioned(past):
    metadata = {**past.obj["metadata"], "resourceVersion": str(past.version)}
    return {**past.obj, "metadata": metadata}


def line(past):
    return event(past.what, versioned(past))


def event(what, obj):
    return json.dumps({"type": what, "object": obj}).encode() + b"\n"


def bookmark(version, *, complete=False):
    annotations = {"k8s.io/initial-events-end": "true"} if complete else None
    return event(
        "BOOKMARK", {"metadata": {"resourceVersion": str(version), "annotations": annotations}}
    )


def refusal(status, reason):
    body = {"kind": "Status", "code": status, "reason": reason, "message": f"it is {reason}"}
    return web.json_response(body, status=status)
