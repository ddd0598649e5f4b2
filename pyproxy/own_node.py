"""What the API server says of this node, and whether it is enough to begin with."""

import asyncio
import logging
from typing import Literal

from pyproxy.model import ApiObject, Change, Node, Remove, Replace, Upsert

IPS_SECONDS = 30.0  # how long the first sync waits for the Node's addresses
POD_CIDRS_SECONDS = 300.0  # and for its pod CIDRs, where they tell pods from others

log = logging.getLogger(__name__)


class NodeError(Exception):
    """The process cannot go on with what the Node says, or does not say."""


class OwnNode:
    """Our Node, as it was last seen: one that is deleted is remembered as it was."""

    def __init__(self, name: str, *, needs_pod_cidrs: bool) -> None:
        self._name = name
        self._needs_pod_cidrs = needs_pod_cidrs
        self._news = asyncio.Event()
        self.node: Node | None = None
        self.in_use = False  # something was built on what it says

    @property
    def ips(self) -> tuple[str, ...]:
        return self.node.ips if self.node is not None else ()

    @property
    def zone(self) -> str:
        return self.node.zone if self.node is not None else ""

    def see(self, change: Change) -> None:
        """Take in a change. Raises ``NodeError`` for one that calls for a restart."""
        objects: tuple[ApiObject, ...] = ()
        match change:
            case Upsert(obj=obj):
                objects = (obj,)
            case Replace(objects=listed):
                objects = listed
            case Remove():
                pass
        for node in objects:
            if isinstance(node, Node) and node.name == self._name:
                before, self.node = self.node, node
                self._news.set()
                self._compare(before, node)

    async def complete(self) -> None:
        """Wait, for so long, until the Node says what a plan needs. Raises ``NodeError``."""
        if not await self._says("ips", IPS_SECONDS):
            log.error("the Node has no addresses: going on without", extra={"node": self._name})
        if not self._needs_pod_cidrs or await self._says("pod_cidrs", POD_CIDRS_SECONDS):
            return
        if self.node is None:
            raise NodeError(
                f"time-out waiting for Node {self._name} to exist: is --hostname-override right?"
            )
        raise NodeError(
            f"time-out waiting for Node {self._name} to get a PodCIDR: detectLocalMode NodeCIDR "
            "needs the cluster to allocate them"
        )

    async def _says(self, field: Literal["ips", "pod_cidrs"], seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                while self.node is None or not getattr(self.node, field):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return False
        return True

    def _compare(self, before: Node | None, node: Node) -> None:
        if before is None or not self.in_use:
            return
        if self._needs_pod_cidrs and before.pod_cidrs != node.pod_cidrs:
            raise NodeError(f"the PodCIDRs of Node {node.name} changed: a restart is needed")
        if before.ips != node.ips:
            log.warning("the Node's addresses changed", extra={"ips": ",".join(node.ips)})
