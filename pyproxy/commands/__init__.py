"""The commands that look and do not serve. A command is a module here, named as the file is.

Files that begin with ``_`` are shared parts; ``_ask`` is how a command gets its answer.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Protocol


class Command(Protocol):
    """What a module in this folder defines."""

    def main(self, words: Sequence[str]) -> int:
        """Run the command; return the exit code. Raises ``CommandError`` and ``SettingsError``."""
        ...


class CommandError(Exception):
    """A command cannot be carried out; each argument is one line for a terminal."""


def names() -> tuple[str, ...]:
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def load(name: str) -> Command:
    """Import a command; it is one of ``names``."""
    command: Command = importlib.import_module(f"{__name__}.{name}")
    return command
