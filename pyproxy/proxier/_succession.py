"""Both ends of a process's time: whom it follows, and who follows it.

Each worker process serves its own connections, and gives them to a successor itself. So all that
a killed process leaves behind is found by the next one.
"""

import asyncio
import contextlib
import logging
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from pyproxy.model import Family
from pyproxy.proxier._given import Entrances, Given, GivenFlow
from pyproxy.proxier._handover import Handover, Predecessor, check_private, predecessor

RUN = Path("/run/pyproxy")

log = logging.getLogger(__name__)

T = TypeVar("T")


class Heir(Protocol):
    """Goes on with what others leave."""

    def take_flow(self, given: GivenFlow, number: int, /) -> None:
        """Go on with a flow of the worker of this number."""

    def take_connection(self, given: Given, /) -> None: ...

    def admit(self) -> None:
        """Let clients in: nobody else does."""


class Succession:
    """Waits for a successor, after having followed a predecessor."""

    def __init__(self, handover: Handover) -> None:
        self._predecessors: dict[int, Predecessor] = {}
        self._handover = handover
        self.began = False

    @property
    def is_over(self) -> bool:
        """Say whether a successor serves, or is about to."""
        return self._handover.has_begun

    @property
    def is_near(self) -> bool:
        """Say whether a successor makes ready, or serves: what is in the kernel may be its."""
        return self._handover.is_near or self._handover.has_begun

    @property
    def follows(self) -> bool:
        """Say whether there is somebody who serves until now."""
        return bool(self._predecessors)

    async def inherited(self) -> Entrances:
        """Return what a predecessor accepts by, if there is one."""
        self._predecessors = await asyncio.to_thread(predecessors, self._handover.path)
        for number in list(self._predecessors):
            found = await self._ask(number, Predecessor.entrances)
            if found is not None:
                return found
        return Entrances()

    async def begin(self, heir: Heir) -> None:
        """Go on with what a predecessor has, and wait for a successor."""
        self.began = True
        for number in list(self._predecessors):
            for flow in await self._ask(number, Predecessor.flows) or ():
                heir.take_flow(flow, number)
        heir.admit()
        count = 0
        for number in list(self._predecessors):
            for connection in await self._ask(number, Predecessor.connections) or ():
                heir.take_connection(connection)
                count += 1
        if self._predecessors:
            log.info("took over from a predecessor", extra={"connections": count})
        self._drop_predecessors()
        try:
            self._handover.open()
        except OSError as error:
            reason = f"{self._handover.path}: {error.strerror}"
            log.info("no successor will be able to take over", extra={"reason": reason})
        else:
            await asyncio.to_thread(remove_abandoned, self._handover.path)

    async def wait(self, seconds: float) -> None:
        """Return when a successor has taken over, or after so long."""
        if self._handover.is_open:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._handover.done.wait(), seconds)

    def close(self) -> None:
        self._drop_predecessors()
        self._handover.close()

    async def _ask(self, number: int, question: Callable[[Predecessor], T]) -> T | None:
        """Return a predecessor's answer. One that gives none has nothing more to give."""
        try:
            return await asyncio.to_thread(question, self._predecessors[number])
        except OSError as error:
            fields = {"worker": number, "error": str(error)}
            log.warning("a predecessor does not answer", extra=fields)
            self._predecessors.pop(number).close()
            return None

    def _drop_predecessors(self) -> None:
        for one in self._predecessors.values():
            one.close()
        self._predecessors.clear()


MAIN = 0  # the number of the process that has the plan; workers count from one


def predecessors(path: Path) -> dict[int, Predecessor]:
    """Return who serves now, by number, first the one that has the plan.

    There is nobody to trust in a folder that is not ours alone.
    """
    try:
        check_private(path.parent)
    except FileNotFoundError:
        return {}
    except OSError as error:
        fields = {"folder": str(path.parent), "reason": error.strerror}
        log.warning("no predecessor is looked for", extra=fields)
        return {}
    places = {MAIN: path}
    for place in path.parent.glob(f"{path.stem}.*{path.suffix}"):
        number = place.name.split(".")[-2]
        if number.isdecimal():
            places[int(number)] = place
    found = {number: predecessor(place) for number, place in sorted(places.items())}
    return {number: one for number, one in found.items() if one is not None}


def meeting_place(folder: str, family: Family) -> Path:
    """Return where processes of one network namespace find one another."""
    if folder:
        place = Path(folder)
    elif os.geteuid() == 0:
        place = RUN
    else:
        own = os.environ.get("XDG_RUNTIME_DIR")
        place = Path(own, "pyproxy") if own else Path(f"/tmp/pyproxy-{os.geteuid()}")
    namespace = os.stat("/proc/self/ns/net").st_ino
    return place / f"userspace-ipv{family}-{namespace}.sock"


def remove_abandoned(own: Path) -> None:
    """Remove places of other network namespaces that nobody has open any more.

    Somebody who starts now may take the same place: it is looked at again under a name that
    nobody else gives.
    """
    namespace = own.stem.rpartition("-")[2]
    for place in own.parent.glob("userspace-ipv[46]-*.sock"):
        if f"-{namespace}." not in place.name and is_abandoned(place):
            aside = place.with_name(f"aside.{os.getpid()}")  # short, as paths of sockets must be
            with contextlib.suppress(OSError):
                place.rename(aside)
                if is_abandoned(aside):
                    aside.unlink()
                else:
                    aside.rename(place)


def is_abandoned(place: Path) -> bool:
    """Say whether a socket's process has ended. One that lives hears nothing of the question.

    To connect by another kind of socket fails in any case, and tells why.
    """
    try:
        if not stat.S_ISSOCK(place.lstat().st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other_kind:
            other_kind.connect(str(place))
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False


def worker_place(path: Path, number: int) -> Path:
    """Return where the worker of a number waits for a successor."""
    return path.with_suffix(f".{number}{path.suffix}")
