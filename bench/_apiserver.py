"""The least API server a proxy needs: lists as streams, then whatever is told to it."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import asynccontextmanager

HEAD = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\n"
STREAM = HEAD % b"200 OK" + b"Transfer-Encoding: chunked\r\n\r\n"
BOOKMARK = (
    b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"%d",'
    b'"annotations":{"k8s.io/initial-events-end":"true"}}}}\n'
)
PIECE = 1 << 20

Lists = Mapping[str, Callable[[], Iterable[bytes]]]  # by path: the lines of a watch from nothing


class ApiServer:
    """Answers all watches; an Event that it is sent is thrown away."""

    def __init__(self, lists: Lists) -> None:
        self.url = ""
        self._lists = lists
        self._watches: dict[str, set[asyncio.StreamWriter]] = {path: set() for path in lists}

    @asynccontextmanager
    async def serve(self):
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            for writer in set().union(*self._watches.values()):
                writer.transport.abort()
            server.close()

    def tell(self, path: str, lines: bytes) -> None:
        """Send lines to all who watch."""
        for writer in self._watches[path]:
            writer.write(chunk(lines))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                await self._answer(request, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            for writers in self._watches.values():
                writers.discard(writer)
            writer.close()

    async def _answer(
        self, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        method, target, _ = request.decode().split(" ", 2)
        path, _, query = target.partition("?")
        if method == "POST":
            await reader.readexactly(content_length(request))
            writer.write(HEAD % b"201 Created" + b"Content-Length: 2\r\n\r\n{}")
            return
        if path not in self._lists or "watch=" not in query:
            writer.write(HEAD % b"404 Not Found" + b"Content-Length: 2\r\n\r\n{}")
            return
        writer.write(STREAM)
        if "sendInitialEvents" in query:
            await self._send_all(path, writer)
        self._watches[path].add(writer)

    async def _send_all(self, path: str, writer: asyncio.StreamWriter) -> None:
        piece = bytearray()
        for line in self._lists[path]():
            piece += line
            if len(piece) > PIECE:
                writer.write(chunk(bytes(piece)))
                await writer.drain()
                piece.clear()
        writer.write(chunk(bytes(piece) + BOOKMARK % 1))
        await writer.drain()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def content_length(request: bytes) -> int:
    for line in request.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    return 0
