"""How ``pyproxy doctor`` sees an API server, in each state that one can be in."""

import ssl
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from aiohttp import web

from pyproxy.doctor.look_api import server, skew, until_expiry
from pyproxy.kube.access import SourceError

TLS = Path(__file__).parent.parent / "data" / "tls"
DATE = "Thu, 01 Jan 2026 12:00:30 GMT"
NOW = 1767268800.0  # half a minute before


def now():
    return NOW


@asynccontextmanager
async def serving(status=200):
    async def answer(request):
        node = {"spec": {"podCIDRs": ["10.244.1.0/24"]}, "status": {}}
        found = request.match_info["name"] == "node-a"
        body = node if found else {"kind": "Status", "code": 404}
        return web.json_response(body, status=status if found else 404, headers={"Date": DATE})

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "server.crt", TLS / "server.key")
    app = web.Application()
    app.router.add_get("/api/v1/nodes/{name}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    try:
        yield f"https://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def kubeconfig(folder, url, *, authority=True):
    cluster = {
        "server": url,
        **({"certificate-authority": str(TLS / "ca.crt")} if authority else {}),
    }
    content = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "it", "user": "me"}}],
        "clusters": [{"name": "it", "cluster": cluster}],
        "users": [{"name": "me", "user": {"token": "s3cr3t"}}],
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(content))
    return str(path)


async def test_a_server_that_knows_the_node(tmp_path):
    async with serving() as url:
        found = await server(kubeconfig(tmp_path, url), "", "node-a", now)
    assert (found.url, found.problem, found.status) == (url, "", 200)
    assert (found.pod_cidrs, found.skew_seconds) == (("10.244.1.0/24",), 30.0)
    assert found.certificate_seconds > 86400


@pytest.mark.parametrize(("node", "status"), [("node-b", 404), ("node-a", 403)])
async def test_a_server_that_refuses(tmp_path, node, status):
    async with serving(status) as url:
        found = await server(kubeconfig(tmp_path, url), "", node, now)
    assert (found.status, found.pod_cidrs, found.problem) == (status, (), "")


async def test_a_certificate_that_nobody_vouches_for(tmp_path):
    async with serving() as url:
        found = await server(kubeconfig(tmp_path, url, authority=False), "", "node-a", now)
    assert "CERTIFICATE_VERIFY_FAILED" in found.problem


async def test_nobody_there(tmp_path):
    async with serving() as url:
        path = kubeconfig(tmp_path, url)
    found = await server(path, "", "node-a", now)
    assert (found.url, found.status) == (url, 0)
    assert found.problem


async def test_a_kubeconfig_that_is_not_there(tmp_path):
    found = await server(str(tmp_path / "none"), "", "node-a", now)
    assert "there is no such file" in found.problem


async def test_nothing_says_which_server(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(SourceError):
        await server("", "", "node-a", now)


def test_no_date_no_skew():
    assert skew({}, NOW) is None
    assert skew({"Date": "yesterday"}, NOW) is None


async def test_no_tls_no_expiry():
    assert await until_expiry(SimpleNamespace(url="http://192.0.2.1", proxy=None), NOW) is None
