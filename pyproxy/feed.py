"""Where objects come from, whatever it is, and who stands in between."""

from collections.abc import Callable, Mapping
from typing import Protocol

from pyproxy.model import Change, ObjectName


class Feed(Protocol):
    """An API server, or manifests."""

    async def follow(self, on_change: Callable[[Change], None]) -> None:
        """Tell of all changes, for ever; a ``Replace`` of a kind first."""
        ...

    async def record(
        self, reason: str, message: str, *, warning: bool, action: str, service: ObjectName | None
    ) -> None:
        """Record an Event about this node, or about a Service. Failures are logged."""
        ...

    async def annotate(self, annotations: Mapping[str, str]) -> str | None:
        """Put annotations on this node's Node; return why that cannot be."""
        ...

    async def aclose(self) -> None: ...


class Between:
    """What stands between a ``Feed`` and its hearer, and leaves to it all but what it tells."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    async def record(
        self, reason: str, message: str, *, warning: bool, action: str, service: ObjectName | None
    ) -> None:
        await self._feed.record(reason, message, warning=warning, action=action, service=service)

    async def annotate(self, annotations: Mapping[str, str]) -> str | None:
        return await self._feed.annotate(annotations)

    async def aclose(self) -> None:
        await self._feed.aclose()
