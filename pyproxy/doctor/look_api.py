"""Asks the API server for this node's object, once, and looks at how it answers."""

import asyncio
import os
import ssl
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Final

import aiohttp
import msgspec
from aiohttp.connector import Connection
from multidict import CIMultiDictProxy

from pyproxy.doctor.facts import Server
from pyproxy.kube.access import Access, SourceError, open_access

SECONDS: Final = 10.0


class Spec(msgspec.Struct, frozen=True):
    pod_cidrs: tuple[str, ...] = msgspec.field(default=(), name="podCIDRs")


class NodeObject(msgspec.Struct, frozen=True):
    spec: Spec = Spec()


async def server(kubeconfig: str, master: str, node: str, now: Callable[[], float]) -> Server:
    """Raises ``SourceError`` where it is not known which server to ask."""
    try:
        access = await open_access(kubeconfig, master)
    except SourceError as error:
        if not (kubeconfig or master or os.environ.get("KUBERNETES_SERVICE_HOST")):
            raise
        return Server(kubeconfig or master, str(error))
    try:
        async with asyncio.timeout(SECONDS), aiohttp.ClientSession(trust_env=True) as session:
            return await asked(session, access, f"{access.url}/api/v1/nodes/{node}", now)
    except TimeoutError:
        return Server(access.url, f"no answer in {SECONDS:.0f} s")
    except (aiohttp.ClientError, SourceError, OSError, msgspec.DecodeError) as error:
        return Server(access.url, " ".join(str(error).split()) or type(error).__name__)


async def asked(
    session: aiohttp.ClientSession, access: Access, url: str, now: Callable[[], float]
) -> Server:
    tls = access.ssl_context() if url.startswith("https") else False
    async with session.get(
        url, headers=await access.headers(), ssl=tls, proxy=access.proxy,
        server_hostname=access.server_hostname,
    ) as response:  # fmt: skip
        left = until_expiry(response.connection, now())
        body = await response.read()
    found = msgspec.json.decode(body, type=NodeObject) if response.status == 200 else NodeObject()
    return Server(
        access.url,
        status=response.status,
        skew_seconds=skew(response.headers, now()),
        certificate_seconds=left,
        pod_cidrs=found.spec.pod_cidrs,
    )


def skew(headers: CIMultiDictProxy[str], now: float) -> float | None:
    try:
        return parsedate_to_datetime(headers["Date"]).timestamp() - now
    except (KeyError, ValueError):
        return None


def until_expiry(connection: Connection | None, now: float) -> float | None:
    """Return how long the server's certificate is still valid, where there is one."""
    transport = connection.transport if connection is not None else None
    certificate = transport.get_extra_info("peercert") if transport is not None else None
    expiry = certificate.get("notAfter") if certificate else None
    return ssl.cert_time_to_seconds(expiry) - now if expiry else None
