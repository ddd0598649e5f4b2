"""The tables of flavour legacy through libiptc, in this process: python-iptables.

It knows no other flavour, takes no lock, opens a table into being that was not there, takes half
a millisecond for a rule and long to import. So it is for looking, and for the few rules that all
others hang on. Everything here blocks, and but for ``load`` it is for a thread.
"""

import contextlib
import fcntl
import os
import shlex
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from pyproxy.model import Family

NAMES: Mapping[Family, Path] = {
    4: Path("/proc/net/ip_tables_names"),
    6: Path("/proc/net/ip6_tables_names"),
}
LOCK = "/run/xtables.lock"
LOCK_SECONDS = 5.0
PAUSE_SECONDS = 0.05
SETTERS = {
    "-s": "src",
    "-d": "dst",
    "-p": "protocol",
    "-i": "in_interface",
    "-o": "out_interface",
}

loaded: list[Any] = []
one_at_a_time = threading.Lock()  # what libxtables knows of a family is global
nobody = threading.Event()  # to wait for what never happens


class LibraryError(Exception):
    """The library did not do it; what it was asked to change is unchanged."""


def load() -> None:
    """Import python-iptables if it and libiptc are there.

    It looks for libiptc with ldconfig, gcc and ld: a quarter of a second of a processor. And it
    loads ip_tables into the kernel, where nothing else may want it. Not for a thread: imported
    beside a running loop, it has stopped the whole process.
    """
    if not loaded:
        with contextlib.suppress(ImportError, OSError, AttributeError):  # the last: no such library
            loaded.append(import_module("iptc"))


def library() -> Any:  # noqa: ANN401 - the library has no types
    """Return python-iptables; None where it has not been loaded."""
    return loaded[0] if loaded else None


def existing(family: Family) -> tuple[str, ...]:
    """Return the tables there are. Others come into being when they are opened."""
    try:
        return tuple(NAMES[family].read_text().split())
    except OSError:
        return ()


def chains(family: Family, table: str) -> dict[str, int]:
    """Return how many rules each chain of a table has. Raises ``LibraryError``."""
    if table not in existing(family):
        return {}
    with opened(family, table) as found:
        return {chain.name: sum(1 for _ in entries(found, chain.name)) for chain in found.chains}


def packets(family: Family, table: str) -> dict[str, int]:
    """Return how many packets the kernel's own chains have sent to each other chain.

    Raises ``LibraryError``.
    """
    counts: dict[str, int] = {}
    if table not in existing(family):
        return counts
    with opened(family, table) as found:
        for chain in found.chains:
            if found.builtin_chain(chain):
                for entry in entries(found, chain.name):
                    to = found.get_target(entry).decode()
                    counts[to] = counts.get(to, 0) + entry.counters.pcnt
    return {to: count for to, count in counts.items() if to}


def carry_out(family: Family, lines: Sequence[str]) -> None:
    """Carry out input of ``iptables-restore --noflush`` about one table, in one commit.

    Raises ``LibraryError``: nothing has changed then.
    """
    first, *changes, _commit = lines
    with locked(), opened(family, first.removeprefix("*")) as table:
        for line in changes:
            make(table, line, family)
        table.commit()


# --- inside ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(family: Family, name: str) -> Iterator[Any]:
    """Give a table as it is now, for changes that are not made before ``commit``."""
    iptc = library()
    assert iptc is not None, "somebody has asked whether it is there"
    with one_at_a_time:
        try:
            table = (iptc.Table if family == 4 else iptc.Table6)(name, autocommit=False)
            table.refresh()
            try:
                yield table
            finally:
                table.close()
        except (iptc.IPTCError, iptc.XTablesError, ValueError, KeyError, TypeError) as error:
            raise LibraryError(f"table {name}: {error}") from error


def entries(table: Any, chain: str) -> Iterator[Any]:  # noqa: ANN401
    entry = table.first_rule(chain)
    while entry:
        yield entry
        entry = table.next_rule(entry)


def make(table: Any, line: str, family: Family) -> None:  # noqa: ANN401
    """Make one change: ``:chain`` (which empties it), ``-I``, ``-A``, ``-D`` or ``-X``."""
    if line.startswith(":"):
        name = line[1:].split(" ", 1)[0]
        if table.is_chain(name):
            table.flush_entries(name)
        else:
            table.create_chain(name)
        return
    iptc = library()
    word, name, *rest = line.split(" ", 2)
    chain = iptc.Chain(table, name)
    match word:
        case "-I":
            chain.insert_rule(rule(table, rest[0], family))
        case "-A":
            chain.append_rule(rule(table, rest[0], family))
        case "-D":
            chain.delete_rule(rule(table, rest[0], family))
        case "-X":
            chain.delete()
        case _:
            raise ValueError(f"not understood: {line}")


@lru_cache
def rule_class(family: Family) -> Any:  # noqa: ANN401
    """Return the library's class for a rule of one table.

    To tell a chain from a target, its own opens all tables: raw and security would come into
    being, and one that was closed ends the process.
    """
    iptc = library()
    return type("RuleOfTable", (iptc.Rule if family == 4 else iptc.Rule6,), {"tables": ()})


def rule(table: Any, text: str, family: Family) -> Any:  # noqa: ANN401
    """Return the library's rule for a text as ``iptables-save`` prints it. Raises ``ValueError``.

    An exclamation mark is before the option that it inverts; the library wants it in the value.
    """
    made = rule_class(family)()
    made.tables = (table,)
    part: Any = None  # the match or target that options are for
    words = shlex.split(text)
    while words:
        word = words.pop(0)
        inverted = word == "!"
        if inverted:
            word = words.pop(0)
        values = []
        while words and not words[0].startswith("-") and words[0] != "!":
            values.append(words.pop(0))
        mark = ["!"] if inverted else []
        if word in SETTERS:
            setattr(made, SETTERS[word], "".join(mark + values))
        elif word == "-m":
            part = made.create_match(*values)
        elif word in ("-j", "-g"):
            part = made.create_target(*values, goto=word == "-g")
        elif word.startswith("--") and part is not None:
            part.set_parameter(word[2:], mark + values)
        else:
            raise ValueError(f"not understood: {word} in {text}")
    return made


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Hold the lock that the programs take. Raises ``LibraryError`` after five seconds."""
    try:
        descriptor = os.open(os.environ.get("XTABLES_LOCKFILE", LOCK), os.O_CREAT, 0o600)
    except OSError as error:
        raise LibraryError(f"{LOCK}: {error.strerror}") from error
    try:
        for _ in range(round(LOCK_SECONDS / PAUSE_SECONDS)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                nobody.wait(PAUSE_SECONDS)
            else:
                break
        else:
            raise LibraryError(f"{LOCK}: somebody else has held it for {LOCK_SECONDS:.0f} s")
        yield
    finally:
        os.close(descriptor)
