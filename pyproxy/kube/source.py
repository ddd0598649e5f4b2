"""Keep asking the API server what the watch machine wants to know, and hand it the answers."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Final

from pyproxy.kube.access import SourceError
from pyproxy.kube.api import KubeApi, RefusedError, UnreachableError
from pyproxy.kube.events import (
    Closed,
    Event,
    Failed,
    Outcome,
    Page,
    Refused,
    Unreachable,
    Unreadable,
)
from pyproxy.kube.watch import Request, Watch, WatchMachine
from pyproxy.model import Change

PASS_SECONDS: Final = 0.01  # one pass on the event loop: a list may take a second


async def follow(
    machine: WatchMachine,
    api: KubeApi,
    on_change: Callable[[Change], None],
    on_error: Callable[[str], None],
) -> None:
    """Keep asking for as long as the task lives; what goes wrong is told and tried again."""
    while True:
        outcome = await _ask(machine, api, on_change, on_error)
        await asyncio.sleep(machine.ended(outcome))


async def _ask(
    machine: WatchMachine,
    api: KubeApi,
    on_change: Callable[[Change], None],
    on_error: Callable[[str], None],
) -> Outcome:
    request = machine.next_request()
    clock = asyncio.get_running_loop().time
    started_at = clock()
    try:
        await _take_in(machine, api, request, on_change, on_error)
    except RefusedError as error:
        if not _is_expected(error.refused, request):
            on_error(f"{machine.kind}: {api.url} refused: {error}")
        return error.refused
    except (UnreachableError, SourceError) as error:
        on_error(f"{machine.kind}: cannot ask {api.url}: {error}")
        return Unreachable(str(error))
    return Closed(clock() - started_at)


async def _take_in(
    machine: WatchMachine,
    api: KubeApi,
    request: Request,
    on_change: Callable[[Change], None],
    on_error: Callable[[str], None],
) -> None:
    clock = asyncio.get_running_loop().time
    resumed_at = clock()
    async with aclosing(api.events(machine.kind, request)) as events:
        async for event in events:
            for error in _errors(event):
                on_error(error)
            change = machine.receive(event)
            if change is not None:
                on_change(change)
            if machine.is_useless:
                return
            if clock() - resumed_at > PASS_SECONDS:
                await asyncio.sleep(0)
                resumed_at = clock()


def _errors(event: Event) -> tuple[str, ...]:
    match event:
        case Unreadable(error=error):
            return (error,)
        case Page(errors=errors):
            return errors
        case Failed(code=code, message=message):
            return (f"the API server ended a watch: {code} {message}",)
        case _:
            return ()


def _is_expected(refused: Refused, request: Request) -> bool:
    """Say whether the machine has another way that the operator need not know of."""
    if isinstance(request, Watch) and request.send_initial_events:
        return refused.status in (400, 422)
    return refused.status == 410
