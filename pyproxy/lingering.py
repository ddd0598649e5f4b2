"""Serves a Service a little longer that is not ours any more: another proxy has to begin first."""

import asyncio
from collections.abc import Callable
from typing import Final

from pyproxy.feed import Between, Feed
from pyproxy.model import ApiObject, Change, ObjectName, Remove, Replace, Service, Upsert

# kube-proxy writes once in a second, and has to write.
LINGER_SECONDS: Final = 3.0


class LingeringFeed(Between):
    """A feed that tells late of Services that are gone, or that another proxy is to serve.

    A watch does not say which of the two it is. Their endpoints are told of at once.
    """

    def __init__(self, feed: Feed, seconds: float = LINGER_SECONDS) -> None:
        super().__init__(feed)
        self._seconds = seconds
        self._services: dict[ObjectName, Service] = {}  # that were told of
        self._leaving: dict[ObjectName, asyncio.TimerHandle] = {}
        self._on_change: Callable[[Change], None] = _nobody_hears

    async def follow(self, on_change: Callable[[Change], None]) -> None:
        self._on_change = on_change
        try:
            await self._feed.follow(self._take_in)
        finally:
            for timer in self._leaving.values():
                timer.cancel()

    def _take_in(self, change: Change) -> None:
        match change:
            case Upsert(obj=Service() as service):
                self._stay(service)
            case Remove(kind="Service", name=name) if name in self._services:
                self._leave(name)
                return
            case Replace(kind="Service", objects=objects, as_of=as_of):
                change = Replace("Service", self._with_those_that_leave(objects), as_of)
            case _:
                pass
        self._on_change(change)

    def _with_those_that_leave(self, objects: tuple[ApiObject, ...]) -> tuple[ApiObject, ...]:
        present = [obj for obj in objects if isinstance(obj, Service)]
        for name in self._services.keys() - {service.name for service in present}:
            self._leave(name)
        for service in present:
            self._stay(service)
        return (*objects, *(self._services[name] for name in self._leaving))

    def _stay(self, service: Service) -> None:
        self._services[service.name] = service
        if (timer := self._leaving.pop(service.name, None)) is not None:
            timer.cancel()

    def _leave(self, name: ObjectName) -> None:
        if name not in self._leaving:
            loop = asyncio.get_running_loop()
            self._leaving[name] = loop.call_later(self._seconds, self._go, name)

    def _go(self, name: ObjectName) -> None:
        del self._leaving[name], self._services[name]
        self._on_change(Remove("Service", name))


def _nobody_hears(change: Change) -> None:
    pass
