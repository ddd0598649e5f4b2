"""The tables of one family and flavour, as they are written and as they are looked at.

Rules are written and read by the programs, all at once. What is asked of single chains, and the
few changes that all others hang on, have an interface of their own: in flavour legacy a library
does them without a program.
"""

import asyncio
import contextlib
import logging
import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, TypeVar

from pyproxy.model import Family
from pyproxy.proxier import _iptc
from pyproxy.proxier._restorer import Failure, Restorer
from pyproxy.rules.iptables_base import CANARY
from pyproxy.rules.iptables_text import from_bytes, parsed, target_of, to_bytes

Flavour = Literal["nft", "legacy"]
LOCK_SECONDS = "5"
# Flavour legacy copies all rules out and in, and touches new memory for it, page by page.
LARGE_PAGES: Mapping[str, str] = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
TIMEOUT_SECONDS = 300.0
FEW_LINES = 2000  # to carry out: more take longer than to start the program
ABSENT = 1  # exit code: there is no such chain

LINE_NUMBER = re.compile(r"line:? (\d+)")
PACKETS = re.compile(r" -c (\d+) \d+ ")
OWN_CHAINS: Mapping[str, tuple[str, ...]] = {  # the kernel's, that we have jumps in
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "nat": ("PREROUTING", "OUTPUT", "POSTROUTING"),
}
T = TypeVar("T")

log = logging.getLogger(__name__)


class IptablesError(Exception):
    """A program failed. ``line`` is the number of the input's line it names, from 0; or None."""

    def __init__(self, program: str, message: str, line: int | None = None) -> None:
        super().__init__(f"{program}: {message}")
        self.line = line


class Programs(NamedTuple):
    """The programs of one family and flavour."""

    family: Family
    flavour: Flavour
    plain: str
    save: str
    restore: str
    random_fully: bool


class Answer(NamedTuple):
    code: int
    output: str
    error: str


class Iptables:
    """The tables of one family and flavour, through its programs."""

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        self._restorer = Restorer(self._restoring)

    async def aclose(self) -> None:
        """Let go of what stays between changes."""
        await self._restorer.aclose()

    async def save(self, *, with_counters: bool = False) -> str:
        """Return all that is there. Raises ``IptablesError``."""
        answer = await run([self.programs.save, *(["--counters"] if with_counters else ())])
        if answer.code:
            raise IptablesError(self.programs.save, first_line(answer.error))
        return answer.output

    async def restore(self, lines: Sequence[str]) -> None:
        """Carry out lines of input: all of a table, or nothing of it. Raises ``IptablesError``."""
        failure = await (self._restored(lines) if self._may_stay(lines) else self._once(lines))
        if failure is not None:
            found = LINE_NUMBER.search(failure.error)
            line = int(found[1]) - 1 - failure.line if found else None
            raise IptablesError(self.programs.restore, first_line(failure.error), line)

    @property
    def _restoring(self) -> list[str]:
        return [self.programs.restore, "--noflush", "-w", LOCK_SECONDS]

    def _may_stay(self, lines: Sequence[str]) -> bool:
        """Say whether the program is worth to be kept.

        Flavour legacy holds a copy of the table, which it would keep.
        """
        return self.programs.flavour == "nft" and len(lines) <= FEW_LINES

    async def _restored(self, lines: Sequence[str]) -> Failure | None:
        name = self.programs.restore
        try:
            if await self._restorer.is_there():
                return await self._restorer.carry_out(lines, TIMEOUT_SECONDS)
        except TimeoutError as error:
            raise IptablesError(name, f"no end after {TIMEOUT_SECONDS:.0f} s") from error
        except OSError as error:
            raise IptablesError(name, error.strerror or str(error)) from error
        return await self._once(lines)

    async def _once(self, lines: Sequence[str]) -> Failure | None:
        environment = {**LARGE_PAGES, **os.environ}
        answer = await run(self._restoring, "\n".join(lines) + "\n", environment)
        return Failure(answer.code, answer.error, 0) if answer.code else None

    async def arrange(self, lines: Sequence[str]) -> None:
        """Carry out the few lines that all others hang on. Raises ``IptablesError``."""
        await self.restore(lines)

    async def chains(self, table: str) -> Mapping[str, int]:
        """Return how many rules each chain of a table has. Raises ``IptablesError``."""
        if self.programs.flavour == "legacy" and table not in _iptc.existing(self.programs.family):
            return {}
        answer = await run([self.programs.save, "-t", table])
        if answer.code:
            raise IptablesError(self.programs.save, first_line(answer.error))
        return {chain: len(rules) for (_, chain), rules in parsed(answer.output).items()}

    async def packets(self, table: str) -> Mapping[str, int]:
        """Return how many packets the kernel's own chains have sent to each other chain.

        Raises ``IptablesError``.
        """
        counts: Counter[str] = Counter()
        for chain in OWN_CHAINS[table]:
            argv = [self.programs.plain, "-w", LOCK_SECONDS, "-t", table, "-v", "-S", chain]
            answer = await run(argv)
            if answer.code:
                raise IptablesError(self.programs.plain, first_line(answer.error))
            for line in answer.output.splitlines():
                if found := PACKETS.search(line):
                    counts[target_of(line)] += int(found[1])
        return counts

    async def has_canary(self) -> bool:
        """Say whether nobody has removed our chains. It counts as there if that cannot be told."""
        argv = [self.programs.plain, "-w", LOCK_SECONDS, "-t", "mangle", "-S", CANARY]
        try:
            return (await run(argv)).code != ABSENT
        except IptablesError:
            return True


class LegacyIptables(Iptables):
    """Those of flavour legacy, where a library can look and make small changes in this process.

    Until it is loaded, and where it fails, the programs do it.
    """

    async def arrange(self, lines: Sequence[str]) -> None:
        by_program, family = super().arrange, self.programs.family
        start = 0
        for end in (number for number, line in enumerate(lines, 1) if line == "COMMIT"):
            table, start = lines[start:end], end
            await self._by_library(
                partial(_iptc.carry_out, family, table), partial(by_program, table)
            )

    async def chains(self, table: str) -> Mapping[str, int]:
        ask = partial(_iptc.chains, self.programs.family, table)
        return await self._by_library(ask, partial(super().chains, table))

    async def packets(self, table: str) -> Mapping[str, int]:
        ask = partial(_iptc.packets, self.programs.family, table)
        return await self._by_library(ask, partial(super().packets, table))

    async def has_canary(self) -> bool:
        if _iptc.library() is None:
            return await super().has_canary()
        try:
            return CANARY in await self.chains("mangle")
        except IptablesError:
            return True

    async def _by_library(self, ask: Callable[[], T], otherwise: Callable[[], Awaitable[T]]) -> T:
        if _iptc.library() is None:
            return await otherwise()
        try:
            return await asyncio.to_thread(ask)
        except _iptc.LibraryError as error:
            log.warning("libiptc failed, a program does it", extra={"error": str(error)})
            return await otherwise()


async def run(argv: Sequence[str], text: str = "", env: Mapping[str, str] | None = None) -> Answer:
    """Run a program to its end. Its input is a file in memory: it may read it or not.

    Raises ``IptablesError`` if it cannot be started or does not end.
    """
    pipe = asyncio.subprocess.PIPE
    try:
        with os.fdopen(os.memfd_create("input"), "w+b") as stdin:
            stdin.write(to_bytes(text))
            stdin.seek(0)
            child = await asyncio.create_subprocess_exec(
                *argv, stdin=stdin, stdout=pipe, stderr=pipe, env=env
            )
    except OSError as error:
        raise IptablesError(argv[0], error.strerror or str(error)) from error
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            output, errors = await child.communicate()
    except TimeoutError as error:
        raise IptablesError(argv[0], f"no end after {TIMEOUT_SECONDS:.0f} s") from error
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    assert child.returncode is not None, "it has ended"
    return Answer(child.returncode, from_bytes(output), errors.decode(errors="replace"))


def first_line(text: str) -> str:
    """Return what matters of what a program complains about."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith(("#", "Try ", "Error occurred"))]
    return " ".join(useful[:2]) or "it failed and did not say why"
