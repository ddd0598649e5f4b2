import asyncio
import base64
import json
import os
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pyproxy.kube import access as kube_access
from pyproxy.kube.access import Access, SourceError, library, open_access
from pyproxy.kube.api import RefusedError, connect
from pyproxy.kube.events import Bookmark, Refused
from pyproxy.kube.watch import Watch
from tests.fakes.apiserver import FakeApiServer

TLS = Path(__file__).parent.parent / "data" / "tls"
WATCH = Watch("", send_initial_events=True)


def kubeconfig(folder, *, cluster=None, user=None, current="one", **others):
    """Write a kubeconfig of one context; its path."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": current,
        "contexts": [{"name": "one", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": cluster or {"server": "http://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": user or {}}],
        **others,
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def no_cluster(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)


# --- what is configured -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "master", "url"),
    [
        pytest.param("http://10.0.0.1:8080/", "", "http://10.0.0.1:8080", id="of the kubeconfig"),
        pytest.param("https://a", "http://10.0.0.2", "http://10.0.0.2", id="--master counts more"),
        pytest.param("http://a", "10.0.0.2:8080", "http://10.0.0.2:8080", id="without a scheme"),
    ],
)
async def test_where_the_server_is(tmp_path, server, master, url):
    access = await open_access(kubeconfig(tmp_path, cluster={"server": server}), master)
    assert access.url == url


async def test_a_master_alone_is_asked_without_credentials():
    access = await open_access("", "http://127.0.0.1:8080")
    assert (access.url, await access.headers()) == ("http://127.0.0.1:8080", {})


async def test_the_current_context_chooses_cluster_and_user(tmp_path):
    path = kubeconfig(
        tmp_path,
        current="two",
        contexts=[
            {"name": "one", "context": {"cluster": "c", "user": "u"}},
            {"name": "two", "context": {"cluster": "d", "user": "v"}},
        ],
        clusters=[
            {"name": "c", "cluster": {"server": "http://c"}},
            {"name": "d", "cluster": {"server": "http://d"}},
        ],
        users=[{"name": "u", "user": {"token": "1"}}, {"name": "v", "user": {"token": "2"}}],
    )
    access = await open_access(path, "")
    assert (access.url, await access.headers()) == ("http://d", {"Authorization": "Bearer 2"})


async def test_a_context_without_a_user_is_nobody(tmp_path):
    cluster = {"server": "https://127.0.0.1:1", "certificate-authority": str(TLS / "ca.crt")}
    contexts = [{"name": "one", "context": {"cluster": "c"}}]
    path = kubeconfig(tmp_path, cluster=cluster, contexts=contexts)
    assert await (await open_access(path, "")).headers() == {}


async def test_name_and_password_are_sent(tmp_path):
    path = kubeconfig(tmp_path, user={"username": "u", "password": "p"})
    words = base64.b64encode(b"u:p").decode()
    assert await (await open_access(path, "")).headers() == {"Authorization": f"Basic {words}"}


async def test_settings_of_the_cluster_are_kept(tmp_path):
    cluster = {"server": "http://a", "tls-server-name": "api.test", "proxy-url": "http://p:3128"}
    access = await open_access(kubeconfig(tmp_path, cluster=cluster), "")
    assert (access.server_hostname, access.proxy) == ("api.test", "http://p:3128")


async def test_the_token_file_is_beside_the_kubeconfig_and_may_change(tmp_path):
    (tmp_path / "token").write_text("old\n")
    access = await open_access(kubeconfig(tmp_path, user={"tokenFile": "token"}), "")
    assert await access.headers() == {"Authorization": "Bearer old"}
    (tmp_path / "token").write_text("new\n")
    assert await access.headers() == {"Authorization": "Bearer old"}
    access.distrust()
    assert await access.headers() == {"Authorization": "Bearer new"}


async def test_credentials_are_read_anew_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(kube_access, "RELOAD_SECONDS", 0.0)
    (tmp_path / "token").write_text("old")
    access = await open_access(kubeconfig(tmp_path, user={"tokenFile": "token"}), "")
    (tmp_path / "token").write_text("new")
    assert await access.headers() == {"Authorization": "Bearer new"}


async def test_a_plugin_gives_the_token(tmp_path):
    credential = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": "from-plugin"},
    }
    program = {
        "apiVersion": credential["apiVersion"],
        "command": "echo",
        "args": [json.dumps(credential)],
    }
    access = await open_access(kubeconfig(tmp_path, user={"exec": program}), "")
    assert await access.headers() == {"Authorization": "Bearer from-plugin"}


async def test_a_pod_uses_its_service_account(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    (tmp_path / "token").write_text("old\n")
    (tmp_path / "ca.crt").write_bytes((TLS / "ca.crt").read_bytes())
    access = await open_access("", "", service_account=tmp_path)
    assert access.url == "https://[fd00::1]:443"
    assert await access.headers() == {"Authorization": "Bearer old"}
    (tmp_path / "token").write_text("new\n")
    access.distrust()
    assert await access.headers() == {"Authorization": "Bearer new"}


# --- what is wrong ------------------------------------------------------------------------------


async def refusal(path, master="", **options):
    with pytest.raises(SourceError) as caught:
        await open_access(path, master, **options)
    return str(caught.value)


@pytest.mark.usefixtures("no_cluster")
async def test_neither_a_kubeconfig_nor_a_pod():
    assert await refusal("") == (
        "no kubeconfig is given and this is not a pod: "
        "set --kubeconfig, --master or clientConnection.kubeconfig"
    )


async def test_a_pod_without_its_token(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    assert await refusal("", service_account=tmp_path) == (
        f"service account {tmp_path}: Service token file does not exist."
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(
            "a: b: c",
            "not YAML: line 1, column 5: mapping values are not allowed here",
            id="not YAML",
        ),
        pytest.param("a: \x07", "not YAML: unacceptable character", id="not even text"),
        pytest.param("", "it has no clusters, contexts and users", id="empty"),
        pytest.param("[]", "it has no clusters, contexts and users", id="a list"),
        pytest.param("{}", "current-context is missing", id="no context chosen"),
        pytest.param("current-context: x", 'there is no context "x"', id="no such context"),
        pytest.param(
            "{current-context: x, contexts: [{name: x, context: {cluster: c}}]}",
            'there is no cluster "c"',
            id="no such cluster",
        ),
        pytest.param(
            "{current-context: x, contexts: [{name: x, context: {cluster: c, user: u}}],"
            " clusters: [{name: c, cluster: {server: http://a}}]}",
            'there is no user "u"',
            id="no such user",
        ),
        pytest.param(
            "{current-context: x, contexts: [{name: x, context: {cluster: c}}],"
            " clusters: [{name: c, cluster: text}]}",
            'cluster "c" says nothing',
            id="a cluster of the wrong shape",
        ),
        pytest.param(
            "{current-context: x, contexts: [{name: x, context: {cluster: c}}],"
            " clusters: [{name: c, cluster: {}}]}",
            'cluster "c" has no server',
            id="a cluster without a server",
        ),
    ],
)
async def test_a_kubeconfig_that_says_nothing_useful(tmp_path, text, words):
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    found = await refusal(str(path))
    assert found.startswith(f"kubeconfig {path}: {words}")
    assert "\n" not in found


async def test_a_kubeconfig_that_is_not_there():
    assert await refusal("/nowhere/kubeconfig") == (
        "kubeconfig /nowhere/kubeconfig: there is no such file"
    )


async def test_a_kubeconfig_that_is_a_folder(tmp_path):
    assert await refusal(str(tmp_path)) == (
        f"kubeconfig {tmp_path}: cannot be read: {tmp_path}: Is a directory"
    )


async def test_a_token_file_that_is_not_there(tmp_path):
    path = kubeconfig(tmp_path, user={"tokenFile": "/nowhere/token"})
    assert await refusal(path) == f"kubeconfig {path}: /nowhere/token: No such file or directory"


async def test_an_authority_that_is_not_there(tmp_path):
    cluster = {"server": "https://a", "certificate-authority": "/nowhere/ca.crt"}
    path = kubeconfig(tmp_path, cluster=cluster)
    assert await refusal(path) == f"kubeconfig {path}: File does not exists: /nowhere/ca.crt"


async def test_an_authority_that_is_none(tmp_path):
    (tmp_path / "ca.crt").write_text("nothing")
    cluster = {"server": "https://a", "certificate-authority": "ca.crt"}
    found = await refusal(kubeconfig(tmp_path, cluster=cluster))
    assert found.startswith(f"certificate authority {tmp_path / 'ca.crt'}: ")


async def test_a_client_certificate_without_its_key(tmp_path):
    user = {"client-certificate": str(TLS / "client.crt"), "client-key": str(TLS / "server.key")}
    found = await refusal(kubeconfig(tmp_path, cluster={"server": "https://a"}, user=user))
    assert found.startswith(
        f"client certificate {TLS / 'client.crt'} with key {TLS / 'server.key'}: "
    )


async def test_a_plugin_that_fails(tmp_path):
    program = {"apiVersion": "client.authentication.k8s.io/v1", "command": "false"}
    path = kubeconfig(tmp_path, user={"exec": program})
    assert await refusal(path) == f"kubeconfig {path}: exec: process returned 1"


async def test_credentials_that_never_come(monkeypatch):
    monkeypatch.setattr(kube_access, "RELOAD_LIMIT_SECONDS", 0.0)
    access = Access(library().configuration(), asyncio.Event().wait)
    with pytest.raises(SourceError, match="no credentials within 0 s: is the plugin hanging"):
        await access.headers()


# --- TLS ----------------------------------------------------------------------------------------


@pytest.fixture
async def tls_server():
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=TLS / "ca.crt")
    context.load_cert_chain(TLS / "server.crt", TLS / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED
    async with FakeApiServer(ssl_context=context) as running:
        yield running


def in_base64(file):
    return base64.b64encode((TLS / file).read_bytes()).decode()


@pytest.mark.parametrize(
    ("cluster", "user"),
    [
        pytest.param(
            {"certificate-authority": str(TLS / "ca.crt")},
            {
                "client-certificate": str(TLS / "client.crt"),
                "client-key": str(TLS / "client.key"),
            },
            id="files",
        ),
        pytest.param(
            {"certificate-authority-data": in_base64("ca.crt"), "tls-server-name": "api.test"},
            {
                "client-certificate-data": in_base64("client.crt"),
                "client-key-data": in_base64("client.key"),
            },
            id="data, and another name",
        ),
        pytest.param(
            {"insecure-skip-tls-verify": True},
            {
                "client-certificate": str(TLS / "client.crt"),
                "client-key": str(TLS / "client.key"),
            },
            id="whoever the server is",
        ),
    ],
)
async def test_server_and_client_prove_who_they_are(tls_server, tmp_path, cluster, user):
    path = kubeconfig(tmp_path, cluster={"server": tls_server.url, **cluster}, user=user)
    async with await connect(path, node="here") as api:
        assert await anext(api.events("Node", WATCH)) == Bookmark("1", is_complete=True)


async def test_a_replaced_certificate_is_used_for_the_next_connection(tmp_path):
    for name in ("client.crt", "client.key"):
        (tmp_path / name).write_bytes((TLS / name).read_bytes())
    user = {"client-certificate": "client.crt", "client-key": "client.key"}
    access = await open_access(kubeconfig(tmp_path, cluster={"server": "https://a"}, user=user), "")
    before = access.ssl_context()
    assert access.ssl_context() is before
    os.utime(tmp_path / "client.crt", (1, 1))
    assert access.ssl_context() is not before


async def test_credentials_that_are_refused_are_read_anew(tmp_path):
    (tmp_path / "token").write_text("old")
    async with FakeApiServer() as server:
        path = kubeconfig(tmp_path, cluster={"server": server.url}, user={"tokenFile": "token"})
        async with await connect(path, node="here") as api:
            (tmp_path / "token").write_text("new")
            server.failures = [(401, {}, "")]
            with pytest.raises(RefusedError) as caught:
                await anext(api.events("Node", WATCH))
            assert caught.value.refused == Refused(401)
            await anext(api.events("Node", WATCH))
    assert [a.headers["Authorization"] for a in server.asked] == ["Bearer old", "Bearer new"]


# --- the library --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "has_models"),
    [
        pytest.param("", False, id="alone"),
        pytest.param("import kubernetes_asyncio", True, id="somebody has loaded it all already"),
        pytest.param(
            "from pyproxy.kube import access; access._bare_package = None.__getattribute__",
            True,
            id="the light way fails",
        ),
    ],
)
def test_the_library_is_loaded_without_its_models_if_that_works(before, has_models):
    program = f"""
import sys
{before}
from pyproxy.kube.access import library
found = library()
found.configuration().host = "http://a"
assert found.kube_config.KubeConfigLoader and found.incluster_config.InClusterConfigLoader
print("kubernetes_asyncio.client.models" in sys.modules)
import kubernetes_asyncio
assert kubernetes_asyncio.client.CoreV1Api
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)  # noqa: TID251 - no loop here
    assert (run.stdout.strip(), run.stderr) == (str(has_models), "")
