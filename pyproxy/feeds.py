"""The two places that objects come from: an API server, or files on a machine without one."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

from pyproxy.app import Fatal
from pyproxy.config import Config, is_beside
from pyproxy.config.flags import Options
from pyproxy.feed import Feed
from pyproxy.kube.access import SourceError
from pyproxy.kube.api import KubeApi, Regarding, Throttle, connect
from pyproxy.kube.source import follow
from pyproxy.kube.watch import WatchMachine
from pyproxy.lingering import LingeringFeed
from pyproxy.manifests.source import ManifestError, ManifestSource
from pyproxy.metrics import Metrics
from pyproxy.model import KINDS, Change, ObjectName
from pyproxy.process import SystemClock
from pyproxy.remembered import RememberedFeed

AGAIN_SECONDS = 60.0  # until the same error is logged again

log = logging.getLogger(__name__)


class FeedError(Exception):
    """There is nowhere to read objects from; the text says what must change first."""


async def feed_from(
    options: Options, config: Config, node: str, metrics: Metrics, state_dir: str = ""
) -> Feed:
    """Return what the flags say to follow. Raises ``FeedError``.

    Only who serves the node has a ``state_dir``: what others have seen is not what is programmed.
    """
    feed = await _feed_from(options, config, node, metrics, state_dir)
    return LingeringFeed(feed) if is_beside(config) else feed


async def _feed_from(
    options: Options, config: Config, node: str, metrics: Metrics, state_dir: str
) -> Feed:
    name = config.service_proxy_name
    try:
        if options.manifests:
            path = Path(options.manifests)
            source = ManifestSource(path, node, options.service_cidr, proxy_name=name)
            await asyncio.to_thread(source.check)
            return ManifestFeed(source)
        kubeconfig = config.client_connection.kubeconfig
        throttle = Throttle(config.client_connection.qps, config.client_connection.burst)
        api = await connect(
            kubeconfig,
            options.master,
            node=node,
            proxy_name=name,
            observe=metrics.rest_request,
            throttle=throttle,
        )
    except (SourceError, ManifestError) as error:
        raise FeedError(str(error)) from error
    feed = KubeFeed(api, node)
    if not state_dir:
        return feed
    whose = f"Services of proxy {name}" if name else ""
    origin = " ".join(filter(None, (f"Node {node} of {api.url}", kubeconfig, whose)))
    return RememberedFeed(feed, Path(state_dir), origin, metrics, SystemClock().unix)


class KubeFeed:
    """Follows four kinds of objects at one API server."""

    def __init__(self, api: KubeApi, node: str) -> None:
        self._api = api
        self._node = node
        self._random = Random()
        self._told_at: dict[str, float] = {}

    async def follow(self, on_change: Callable[[Change], None]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for kind in KINDS:
                machine = WatchMachine(kind, random=self._random.random)
                tasks.create_task(
                    follow(machine, self._api, on_change, self._tell), name=f"follow {kind}"
                )

    async def record(
        self, reason: str, message: str, *, warning: bool, action: str, service: ObjectName | None
    ) -> None:
        regarding = Regarding("Node", self._node, uid=self._node)
        if service is not None:
            regarding = Regarding("Service", service.name, service.namespace)
        kind = "Warning" if warning else "Normal"
        await self._api.create_event(reason, message, regarding, type=kind, action=action)

    async def annotate(self, annotations: Mapping[str, str]) -> str | None:
        return await self._api.annotate_node(annotations)

    async def aclose(self) -> None:
        await self._api.aclose()

    def _tell(self, error: str) -> None:
        """Log an error. One that comes again and again, as in an outage, once in a while."""
        now = asyncio.get_running_loop().time()
        if now - self._told_at.get(error, -AGAIN_SECONDS) < AGAIN_SECONDS:
            return
        self._told_at = {e: at for e, at in self._told_at.items() if now - at < AGAIN_SECONDS}
        self._told_at[error] = now
        log.warning("api", extra={"problem": error})


class ManifestFeed:
    """Follows a folder. Events have nobody to be told to but the log."""

    def __init__(self, source: ManifestSource) -> None:
        self._source = source

    async def follow(self, on_change: Callable[[Change], None]) -> None:
        try:
            await self._source.follow(on_change, self._tell)
        except ManifestError as error:
            raise Fatal(str(error)) from error

    async def record(
        self, reason: str, message: str, *, warning: bool, action: str, service: ObjectName | None
    ) -> None:
        level = logging.WARNING if warning else logging.INFO
        about = str(service) if service is not None else "node"
        log.log(level, reason, extra={"about": about, "problem": message})

    async def annotate(self, annotations: Mapping[str, str]) -> str | None:
        return "there is no API server, whose Nodes have annotations"

    async def aclose(self) -> None:
        pass

    def _tell(self, error: str) -> None:
        log.warning("manifests", extra={"problem": error})
