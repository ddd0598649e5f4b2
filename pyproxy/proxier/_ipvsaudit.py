"""Looks from time to time whether virtual servers are as we left them, in small slices."""

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple, Protocol

from pyproxy.model import Address, Frontend
from pyproxy.proxier import Env
from pyproxy.rules.ipvs import Server

SLICE = 50  # virtual servers whose destinations are compared at once
PAUSE_SECONDS = 0.2
TOLD = 5  # differences that are named

log = logging.getLogger(__name__)


class Audited(Protocol):
    """What is looked at: each method returns what differs, in words, and may raise ``OSError``."""

    @property
    def server_count(self) -> int: ...
    async def differing_servers(self) -> list[str]: ...
    async def differing_destinations(self, after: int, count: int) -> list[str]: ...


class Weights(NamedTuple):
    """The destinations of a virtual server, as they should be and as they are."""

    server: Frontend
    known: Mapping[Address, int]
    found: Mapping[Address, int]


async def audit(env: Env, target: Audited) -> None:
    """Have everything written anew when virtual servers are not as we left them, for ever."""
    while True:
        await asyncio.sleep(env.config.ipvs.sync_period_seconds)
        with suppress(OSError):  # the next sync will say so
            differences = await target.differing_servers()
            for first in range(0, target.server_count, SLICE):
                differences += await target.differing_destinations(first, SLICE)
                await asyncio.sleep(PAUSE_SECONDS)
            if differences:
                more = [f"and {len(differences) - TOLD} more"] if len(differences) > TOLD else []
                what = "; ".join([*differences[:TOLD], *more])
                log.warning("virtual servers differ", extra={"what": what})
                env.drifted("ip_vs", len(differences), "somebody")
                env.resync()


def server_differences(
    known: Mapping[Frontend, Server], found: Mapping[Frontend, Server]
) -> list[str]:
    """Say of each virtual server that is not as it should be what is wrong with it."""
    told = [
        f"{server} is gone" if server not in found else f"{server} {unlike(wanted, found[server])}"
        for server, wanted in known.items()
        if found.get(server) != wanted
    ]
    return told + [f"{server} was added" for server in found if server not in known]


def unlike(wanted: Server, found: Server) -> str:
    if wanted.scheduler != found.scheduler:
        return f"has scheduler {found.scheduler}, not {wanted.scheduler}"
    return f"has affinity {found.affinity_seconds}, not {wanted.affinity_seconds}"


def destination_differences(weights: Weights) -> list[str]:
    server, known, found = weights
    return [
        f"{server} -> {address} {weight_unlike(known.get(address), found.get(address))}"
        for address in sorted(known.keys() | found.keys())
        if known.get(address) != found.get(address)
    ]


def weight_unlike(wanted: int | None, found: int | None) -> str:
    if found is None:
        return "is gone"
    return "was added" if wanted is None else f"has weight {found}, not {wanted}"
