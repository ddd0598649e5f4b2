"""Answers the health check node ports of all Services, as the plans of all families have them."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from pyproxy.health import Health
from pyproxy.http import ServiceHealthServers
from pyproxy.lane import Lane
from pyproxy.model import Family, ObjectName


class HealthPorts:
    """The responders of each lane, on the addresses where its family serves node ports."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        addresses: Mapping[Family, Sequence[str]],
        health: Health,
        unix: Callable[[], float],
        on_failure: Callable[[ObjectName, str], None],
    ) -> None:
        self._responders = {
            lane: ServiceHealthServers(addresses[lane.family], health, unix, on_failure)
            for lane in lanes
        }

    async def keep(self, synced: asyncio.Event) -> None:
        """After each successful sync, answer for the Services that have such a port."""
        try:
            while True:
                await synced.wait()
                synced.clear()
                for lane, responders in self._responders.items():
                    await responders.update(lane.health_ports())
        finally:
            for responders in self._responders.values():
                await responders.aclose()
