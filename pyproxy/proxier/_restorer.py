"""A restore program of iptables that stays between changes.

To start one, and to wait for its end, takes as long as a change of a chain does. While it stays
it has to say what it has done: with ``--verbose`` it prints the comments of its input again, when
it comes to them, and a commit before them is over by then.
"""

import asyncio
import contextlib
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from typing import NamedTuple

from pyproxy.rules.iptables_text import to_bytes

DONE = b"# done\n"
ANSWER_SECONDS = 2.0  # for a program without work to say that it is there


class Failure(NamedTuple):
    """Why a program ended; ``line`` is the first of the input's lines, as it counts them."""

    code: int
    error: str
    line: int


class Restorer:
    """One program; one task at a time may use it. It is started when it is needed."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = (*argv, "--verbose")
        self._child: Process | None = None
        self._given = 0  # lines, since it was started
        self.is_silent = False  # it does not print comments: nobody can tell when it is done

    async def carry_out(self, lines: Sequence[str], seconds: float) -> Failure | None:
        """Give it lines, and wait until they are carried out. A failure ends the program.

        Raises ``OSError`` if it cannot be started, ``TimeoutError`` after so many seconds.
        """
        child, self._child = self._child, None
        if child is None or child.returncode is not None:
            child, self._given = await self._started(), 0
        before, self._given = self._given, self._given + len(lines) + 1
        try:
            async with asyncio.timeout(seconds):
                if await says(child, to_bytes("".join(f"{line}\n" for line in lines))):
                    self._child = child
                    return None
                assert child.stderr is not None, "it is a pipe"
                error = (await child.stderr.read()).decode(errors="replace")
                return Failure(await child.wait(), error, before)
        finally:
            if self._child is None:
                await end(child)

    async def is_there(self) -> bool:
        """Start it unless it runs; say whether it tells what it has done. Raises ``OSError``."""
        if self._child is None and not self.is_silent:
            try:
                self.is_silent = await self.carry_out((), ANSWER_SECONDS) is not None
            except TimeoutError:
                self.is_silent = True
        return not self.is_silent

    async def aclose(self) -> None:
        """Let it end. What it has committed stays."""
        child, self._child = self._child, None
        if child is not None:
            await end(child)

    async def _started(self) -> Process:
        return await asyncio.create_subprocess_exec(
            *self._argv, stdin=PIPE, stdout=PIPE, stderr=PIPE
        )


async def says(child: Process, text: bytes) -> bool:
    """Write text; say whether the program came to its end, and did not end itself."""
    assert child.stdin is not None, "it is a pipe"
    assert child.stdout is not None, "it is a pipe"
    child.stdin.write(text + DONE)
    with contextlib.suppress(ConnectionError):  # it has ended: its output says why
        await child.stdin.drain()
    while line := await child.stdout.readline():
        if line == DONE:
            return True
    return False


async def end(child: Process) -> None:
    assert child.stdin is not None, "it is a pipe"
    child.stdin.close()
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.kill()  # it has nothing to finish: what is committed is in the kernel
        await child.wait()
