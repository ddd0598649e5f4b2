"""Writes on this node's Node how far its Services are programmed, for others in the cluster to see.

One small patch of one object, when something has changed, and not more often than the operator
allows. A gate for the readiness of each pod would cost a write for every pod, and say no more.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import msgspec

from pyproxy.lane import Lane
from pyproxy.model import Kind

ANNOTATION: Final = "pyproxy.io/programmed"
KINDS: Final[tuple[Kind, ...]] = ("Service", "EndpointSlice")
CALM: Final = 10  # periods until what was refused is tried again

log = logging.getLogger(__name__)

Announce = Callable[[Mapping[str, str]], Awaitable[str | None]]


def text_of(mode: str, lanes: Sequence[Lane]) -> str:
    """Return the value: the mode, and by kind the version up to which all families are written."""
    versions = {kind: min(lane.written(kind) for lane in lanes) for kind in KINDS}
    names = {"Service": "services", "EndpointSlice": "endpointSlices"}
    known = {names[kind]: str(version) for kind, version in versions.items()}
    return msgspec.json.encode({"mode": mode, **known}).decode()


async def keep_announcing(
    current: Callable[[], str],
    announce: Announce,
    period: float,
    random: Callable[[], float],
) -> None:
    """Announce what is current for ever; ``period`` is in seconds.

    ``announce`` returns why it cannot be, which is told when it begins and when it ends, and
    stops nothing. Nodes that start together do not write together: ``random`` is below 1.
    """
    said = trouble = None
    await asyncio.sleep(period * random())
    while True:
        text, pause = current(), period
        if text != said:
            problem = await announce({ANNOTATION: text})
            if problem is None:
                said = text
                if trouble is not None:
                    log.info("the Node tells again what is programmed")
            else:
                pause *= CALM
                if problem != trouble:
                    about = {"problem": problem, "annotation": ANNOTATION}
                    log.warning("the Node cannot tell what is programmed", extra=about)
            trouble = problem
        await asyncio.sleep(pause)
