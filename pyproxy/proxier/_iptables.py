"""The programs of iptables, in the flavour that this host uses.

There are two, which fill different tables of the kernel: ``legacy`` and ``nft``. Rules in the
one that nobody else uses would be traversed beside the others, in an order that nobody expects.
"""

import asyncio
import contextlib
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from pyproxy.model import FAMILIES, Family
from pyproxy.proxier._restorer import Failure, Restorer
from pyproxy.rules.iptables_base import CANARY

Flavour = Literal["nft", "legacy"]
FLAVOURS: tuple[Flavour, ...] = ("nft", "legacy")
PROGRAMS: Mapping[Family, str] = {4: "iptables", 6: "ip6tables"}
HINTS = (":KUBE-IPTABLES-HINT ", ":KUBE-KUBELET-CANARY ")  # kubelet leaves these in table mangle
LOCK_SECONDS = "5"
TIMEOUT_SECONDS = 300.0
FEW_LINES = 2000  # to carry out: more take longer than to start the program
RANDOM_FULLY = (1, 6, 2)
ABSENT = 1  # exit code: there is no such chain

LINE_NUMBER = re.compile(r"line:? (\d+)")
VERSION = re.compile(r"v(\d+)\.(\d+)\.(\d+)(?: \((\w+)\))?")

log = logging.getLogger(__name__)


class IptablesError(Exception):
    """A program failed. ``line`` is the number of the input's line it names, from 0; or None."""

    def __init__(self, program: str, message: str, line: int | None = None) -> None:
        super().__init__(f"{program}: {message}")
        self.line = line


class Programs(NamedTuple):
    """The programs of one family and flavour."""

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
    """The tables of one family, through its programs."""

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        self._restorer = Restorer(self._restoring)

    async def aclose(self) -> None:
        """Let go of what stays between changes."""
        await self._restorer.aclose()

    async def save(self) -> str:
        """Return all that is there. Raises ``IptablesError``."""
        answer = await run([self.programs.save])
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
        answer = await run(self._restoring, "\n".join(lines) + "\n")
        return Failure(answer.code, answer.error, 0) if answer.code else None

    async def has_canary(self) -> bool:
        """Say whether nobody has removed our chains. It counts as there if that cannot be told."""
        argv = [self.programs.plain, "-w", LOCK_SECONDS, "-t", "mangle", "-S", CANARY]
        try:
            return (await run(argv)).code != ABSENT
        except IptablesError:
            return True


async def run(argv: Sequence[str], text: str = "") -> Answer:
    """Run a program to its end. Its input is a file in memory: it may read it or not."""
    pipe = asyncio.subprocess.PIPE
    with os.fdopen(os.memfd_create("input"), "w+b") as stdin:
        stdin.write(text.encode())
        stdin.seek(0)
        try:
            child = await asyncio.create_subprocess_exec(
                *argv, stdin=stdin, stdout=pipe, stderr=pipe
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
    return Answer(child.returncode, output.decode(), errors.decode(errors="replace"))


def first_line(text: str) -> str:
    """Return what matters of what a program complains about."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith(("#", "Try ", "Error occurred"))]
    return " ".join(useful[:2]) or "it failed and did not say why"


# --- flavours -------------------------------------------------------------------------------------


@lru_cache
def programs_of(family: Family) -> dict[Flavour, Programs]:
    """Return the programs there are in PATH, by flavour."""
    name = PROGRAMS[family]
    found: dict[Flavour, Programs] = {}
    version, plain_flavour = version_of(name)
    for flavour in FLAVOURS:
        own = f"{name}-{flavour}"
        if plain_flavour == flavour and complete(name):
            found[flavour] = programs(flavour, name, version)
        elif complete(own):
            found[flavour] = programs(flavour, own, version_of(own)[0])
    return found


def programs(flavour: Flavour, name: str, version: tuple[int, ...]) -> Programs:
    return Programs(flavour, name, f"{name}-save", f"{name}-restore", version >= RANDOM_FULLY)


def complete(name: str) -> bool:
    return all(shutil.which(f"{name}{word}") for word in ("", "-save", "-restore"))


@lru_cache
def version_of(name: str) -> tuple[tuple[int, ...], Flavour | None]:
    """Return a program's version and flavour; before there were two, it was legacy."""
    code, text = answer_of(name, "--version")
    found = VERSION.search(text)
    if code or found is None:
        return (), None
    numbers = tuple(int(number) for number in found.groups()[:3])
    return numbers, "nft" if found[4] == "nf_tables" else "legacy"


def answer_of(*argv: str) -> tuple[int, str]:
    """Run a program that answers at once, before anything else runs."""
    try:
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        return -1, error.strerror or str(error)
    output, _ = child.communicate()
    return child.returncode, output


@lru_cache
def chosen_flavour() -> Flavour | None:
    """Return the flavour that this host uses; None without programs.

    That is kubelet's where it left a hint, or else the one with more rules, or else that of the
    ``iptables`` in PATH.
    """
    available: dict[Flavour, list[Programs]] = {}
    for family in FAMILIES:
        for flavour, found in programs_of(family).items():
            available.setdefault(flavour, []).append(found)
    saved = {
        flavour: "".join(answer_of(found.save)[1] for found in programs)
        for flavour, programs in available.items()
    }
    plain = next((f for n in PROGRAMS.values() if (f := version_of(n)[1]) is not None), None)
    return preferred(saved, plain)


def preferred(saved: Mapping[Flavour, str], plain: Flavour | None) -> Flavour | None:
    """Choose a flavour by what ``iptables-save`` of each prints."""
    counts = {flavour: text.count("\n-A ") for flavour, text in saved.items()}
    if len(saved) > 1 and all(counts.values()):
        rules = ", ".join(f"{count} {flavour}" for flavour, count in sorted(counts.items()))
        log.warning("this host has iptables rules of both flavours", extra={"rules": rules})
    hinted = [f for f, text in saved.items() if any(hint in text for hint in HINTS)]
    if len(hinted) == 1:
        return hinted[0]
    return max(saved, key=lambda f: (counts[f], f == plain), default=None)
