"""Where the API server is and how to prove who we are, from a kubeconfig or a service account.

kubernetes-asyncio reads kubeconfigs, runs credential plugins and knows a pod's service account.
Importing it as documented also loads some 890 modules of models and APIs that nothing here uses:
1.3 s and 65 MB, against 0.07 s and 2 MB for the parts below (see ``_import_without_models``).
"""

import asyncio
import importlib.util
import os
import ssl
import sys
from collections.abc import Awaitable, Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple, Protocol

import yaml

RELOAD_SECONDS: Final = 60.0  # the kubelet renews a token long before it expires
RELOAD_LIMIT_SECONDS: Final = 30.0  # a credential plugin is a program, and may hang

SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")

# What the library raises on its way through a file of the wrong shape.
_SHAPE_ERRORS: Final = (TypeError, KeyError, AttributeError, AssertionError, RuntimeError)


class SourceError(Exception):
    """The API server cannot be asked; the text says what must change first."""


class Configuration(Protocol):
    """What kubernetes-asyncio makes of a kubeconfig or a service account, as far as we look."""

    host: str
    api_key: dict[str, str]
    ssl_ca_cert: str | None
    cert_file: str | None
    key_file: str | None
    verify_ssl: bool
    tls_server_name: str | None
    proxy: str | None


class Library(NamedTuple):
    """The parts of kubernetes-asyncio that are used."""

    configuration: Callable[[], Configuration]
    kube_config: Any
    incluster_config: Any
    error: type[Exception]


class Access:
    """A server and the credentials for it, which may be other ones a minute later."""

    def __init__(
        self, configuration: Configuration, load: Callable[[], Awaitable[None]], *, url: str = ""
    ) -> None:
        """``load`` fills ``configuration``; ``url`` counts more than what it says."""
        self._configuration = configuration
        self._load = load
        self._url = url
        self._loaded_at: float | None = None
        self._ssl_context: ssl.SSLContext | None = None
        self._ssl_files: object = None

    @property
    def url(self) -> str:
        url = self._url or self._configuration.host
        if "://" not in url:
            has_tls = self._configuration.ssl_ca_cert or self._configuration.cert_file
            url = f"{'https' if has_tls else 'http'}://{url}"
        return url.rstrip("/")

    @property
    def proxy(self) -> str | None:
        return self._configuration.proxy or None

    @property
    def server_hostname(self) -> str | None:
        return self._configuration.tls_server_name or None

    async def headers(self) -> dict[str, str]:
        """Return the headers that say who we are; read anew when they may have changed."""
        now = asyncio.get_running_loop().time()
        if self._loaded_at is None or now - self._loaded_at >= RELOAD_SECONDS:
            await self._reload()
            self._loaded_at = now
        # A token file that ends in a newline is common, and no header may hold one.
        token = self._configuration.api_key.get("BearerToken", "").strip()
        return {"Authorization": token} if token else {}

    async def _reload(self) -> None:
        try:
            async with asyncio.timeout(RELOAD_LIMIT_SECONDS):
                await self._load()
        except TimeoutError:
            limit = f"{RELOAD_LIMIT_SECONDS:.0f} s"
            raise SourceError(f"no credentials within {limit}: is the plugin hanging?") from None

    def distrust(self) -> None:
        """Read the credentials before the next request: the server did not accept these."""
        self._loaded_at = None

    def ssl_context(self) -> ssl.SSLContext:
        """Return the TLS settings, made anew when a certificate's file has been replaced."""
        files = _state_of_files(
            self._configuration.ssl_ca_cert,
            self._configuration.cert_file,
            self._configuration.key_file,
        )
        if self._ssl_context is None or files != self._ssl_files:
            self._ssl_context = _ssl_context(self._configuration)
            self._ssl_files = files
        return self._ssl_context


async def open_access(
    kubeconfig: str, master: str, *, service_account: Path = SERVICE_ACCOUNT
) -> Access:
    """Return the way to the API server, credentials loaded once. Raises ``SourceError``."""
    if kubeconfig:
        access = _from_kubeconfig(kubeconfig, master)
    elif master:
        access = Access(library().configuration(), _nothing_to_load, url=master)
    else:
        access = _from_service_account(service_account)
    await access.headers()
    if access.url.startswith("https"):
        access.ssl_context()
    return access


def _from_kubeconfig(path: str, master: str) -> Access:
    """kube-proxy's own kubeconfig names a token file that the kubelet rewrites: see ``headers``."""
    kubeconfig = _read_kubeconfig(path)
    kube_config, error = library().kube_config, library().error
    configuration = library().configuration()
    try:
        node = kube_config.ConfigNode(path, kubeconfig, path)
        loader = kube_config.KubeConfigLoader(node, config_base_path=None)
    except (error, *_SHAPE_ERRORS) as problem:
        raise SourceError(f"kubeconfig {path}: {_words(problem)}") from problem

    async def load() -> None:
        try:
            await loader.load_and_set(configuration)
        except (error, OSError, ValueError, *_SHAPE_ERRORS) as problem:
            raise SourceError(f"kubeconfig {path}: {_words(problem)}") from problem

    return Access(configuration, load, url=master)


def _read_kubeconfig(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"kubeconfig {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise SourceError(f"kubeconfig {path}: cannot be read: {_words(problem)}") from problem
    except yaml.YAMLError as problem:
        raise SourceError(f"kubeconfig {path}: not YAML: {_yaml_words(problem)}") from problem
    if not isinstance(content, dict):
        raise SourceError(f"kubeconfig {path}: it has no clusters, contexts and users")
    if not content.get("current-context"):
        raise SourceError(f"kubeconfig {path}: current-context is missing")
    context = _entry(path, content, "context", content["current-context"])
    cluster = _entry(path, content, "cluster", context.get("cluster"))
    if not isinstance(cluster.get("server"), str):
        raise SourceError(f'kubeconfig {path}: cluster "{context.get("cluster")}" has no server')
    if context.get("user"):
        _entry(path, content, "user", context["user"])
    else:
        # Nobody in particular is allowed, but the loader wants a user for https.
        context["user"] = "nobody"
        content["users"] = [*(content.get("users") or []), {"name": "nobody", "user": {}}]
    return content


def _entry(path: str, content: dict[str, Any], kind: str, name: object) -> dict[str, Any]:
    for entry in content.get(f"{kind}s") or []:
        if isinstance(entry, dict) and entry.get("name") == name:
            found = entry.get(kind)
            if not isinstance(found, dict):
                raise SourceError(f'kubeconfig {path}: {kind} "{name}" says nothing')
            return found
    raise SourceError(f'kubeconfig {path}: there is no {kind} "{name}"')


def _from_service_account(folder: Path) -> Access:
    configuration = library().configuration()
    loader = library().incluster_config.InClusterConfigLoader(
        str(folder / "token"), str(folder / "ca.crt"), try_refresh_token=False
    )
    if not os.environ.get("KUBERNETES_SERVICE_HOST"):
        raise SourceError(
            "no kubeconfig is given and this is not a pod: "
            "set --kubeconfig, --master or clientConnection.kubeconfig"
        )

    async def load() -> None:
        try:
            loader.load_and_set(configuration)
        except (library().error, OSError, ValueError) as problem:
            raise SourceError(f"service account {folder}: {_words(problem)}") from problem

    return Access(configuration, load)


async def _nothing_to_load() -> None:
    pass


# --- TLS ----------------------------------------------------------------------------------------


def _state_of_files(*paths: str | None) -> tuple[object, ...]:
    states = []
    for path in paths:
        try:
            states.append((path, os.stat(path).st_mtime_ns if path else 0))
        except OSError:
            states.append((path, 0))
    return tuple(states)


def _ssl_context(configuration: Configuration) -> ssl.SSLContext:
    authority = configuration.ssl_ca_cert
    try:
        context = ssl.create_default_context(cafile=authority)
    except OSError as problem:
        raise SourceError(f"certificate authority {authority}: {_words(problem)}") from problem
    # Python 3.13 began to ask for extensions that many clusters' own authorities leave out.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if configuration.cert_file:
        try:
            context.load_cert_chain(configuration.cert_file, configuration.key_file)
        except OSError as problem:
            files = f"{configuration.cert_file} with key {configuration.key_file}"
            raise SourceError(f"client certificate {files}: {_words(problem)}") from problem
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


# --- errors, in words ---------------------------------------------------------------------------


def _words(problem: Exception) -> str:
    """Return an exception as one line, without what Python adds to it."""
    text = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
    if isinstance(problem, OSError) and isinstance(problem.filename, str):
        text = f"{problem.filename}: {text}"
    return " ".join(text.split()) or type(problem).__name__


def _yaml_words(problem: yaml.YAMLError) -> str:
    if not isinstance(problem, yaml.MarkedYAMLError) or problem.problem_mark is None:
        return " ".join(str(problem).split())
    mark = problem.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem.problem}"


# --- the library --------------------------------------------------------------------------------

_PACKAGE: Final = "kubernetes_asyncio"


@cache
def library() -> Library:
    """Import what is needed of kubernetes-asyncio, and all of it where that fails."""
    if _PACKAGE not in sys.modules:
        try:
            return _import_without_models()
        except (ImportError, AttributeError):
            _unload()
    return _import_parts()


def _import_without_models() -> Library:
    """Import the parts while the packages around them exist as bare names.

    The ``__init__`` of the package and of its ``client`` import every API and model. Modules that
    carry their names and paths, and have run nothing, are all that the parts need. They go again
    afterwards, so that nobody else meets a package that is half there.
    """
    packages = (_PACKAGE, f"{_PACKAGE}.client")
    try:
        for name in packages:
            sys.modules[name] = _bare_package(name)
        client = sys.modules[f"{_PACKAGE}.client"]
        configuration = import_module(f"{_PACKAGE}.client.configuration")
        vars(client).update(Configuration=configuration.Configuration, ApiClient=object)
        return _import_parts()
    finally:
        for name in packages:
            sys.modules.pop(name, None)


def _bare_package(name: str) -> ModuleType:
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(name)
    return importlib.util.module_from_spec(spec)


def _import_parts() -> Library:
    return Library(
        configuration=import_module(f"{_PACKAGE}.client").Configuration,
        kube_config=import_module(f"{_PACKAGE}.config.kube_config"),
        incluster_config=import_module(f"{_PACKAGE}.config.incluster_config"),
        error=import_module(f"{_PACKAGE}.config.config_exception").ConfigException,
    )


def _unload() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == _PACKAGE]:
        del sys.modules[name]
