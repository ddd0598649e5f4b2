"""The demo's traffic: pods that answer, and clients that ask, over plain HTTP/1.1."""

import asyncio
import errno
import socket
from functools import partial

from pyproxy.demo.expect import Reply
from pyproxy.model import Address

REQUEST = b"GET / HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n"
WORDS = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "reset",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
}


async def serve(pod: str, listening: socket.socket) -> asyncio.Server:
    """Answer every request with the pod's name and the client's address that it saw."""
    return await asyncio.start_server(partial(_answer, pod), sock=listening)


async def _answer(pod: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        async with asyncio.timeout(5.0):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer(pod, writer.get_extra_info("peername")[0]))
            await writer.drain()
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        pass  # the client is at fault, and it notices
    finally:
        writer.close()


def answer(pod: str, client: str) -> bytes:
    body = f"{pod} saw {client}\n".encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


async def ask(opened: socket.socket, address: Address, timeout_seconds: float = 2.0) -> Reply:
    """Send one request on a fresh socket, which is closed, and say what came back."""
    loop = asyncio.get_running_loop()
    received = bytearray()
    try:
        async with asyncio.timeout(timeout_seconds):
            await loop.sock_connect(opened, (address.ip, address.port))
            await loop.sock_sendall(opened, REQUEST)
            while chunk := await loop.sock_recv(opened, 65536):
                received += chunk
    except TimeoutError:
        return Reply("timed out")
    except OSError as error:
        return Reply(WORDS.get(error.errno or 0, error.strerror or "failed"))
    finally:
        opened.close()
    return reply(bytes(received))


def reply(received: bytes) -> Reply:
    head, _, body = received.partition(b"\r\n\r\n")
    if not received:
        return Reply("closed")
    if not head.startswith(b"HTTP/1.1 200 "):
        return Reply("no HTTP")
    match body.decode("ascii", "replace").split():
        case [pod, "saw", client]:
            return Reply("ok", pod, client)
        case _:
            return Reply("cut short")


async def http_status(opened: socket.socket, address: Address, path: str) -> int | None:
    """Return the status of a GET, None where nobody answers in HTTP."""
    request = f"GET {path} HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n"
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(2.0):
            await loop.sock_connect(opened, (address.ip, address.port))
            await loop.sock_sendall(opened, request.encode())
            first = await loop.sock_recv(opened, 4096)
    except OSError:  # which a TimeoutError is
        return None
    finally:
        opened.close()
    words = first.split(None, 2)
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else None
