"""Asks the API server for this node's object, once, and looks at how it answers."""

import asyncio
import os
import ssl
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Final
from urllib.parse import urlsplit

import aiohttp
import msgspec
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
        body = await response.read()
    found = msgspec.json.decode(body, type=NodeObject) if response.status == 200 else NodeObject()
    return Server(
        access.url,
        status=response.status,
        skew_seconds=skew(response.headers, now()),
        certificate_seconds=await until_expiry(access, now()),
        pod_cidrs=found.spec.pod_cidrs,
    )


def skew(headers: CIMultiDictProxy[str], now: float) -> float | None:
    try:
        return parsedate_to_datetime(headers["Date"]).timestamp() - now
    except (KeyError, ValueError):
        return None


async def until_expiry(access: Access, now: float) -> float | None:
    """Return how long the server's certificate is still valid; None where that is not seen.

    It takes a connection of its own: aiohttp has let go of a short answer's when it is read.
    """
    url = urlsplit(access.url)
    if url.scheme != "https" or access.proxy:
        return None
    name = access.server_hostname or url.hostname
    tls = access.ssl_context()
    _reader, writer = await asyncio.open_connection(
        url.hostname, url.port or 443, ssl=tls, server_hostname=name
    )
    certificate = writer.get_extra_info("peercert")
    writer.close()
    expiry = certificate.get("notAfter") if certificate else None
    return ssl.cert_time_to_seconds(expiry) - now if expiry else None
