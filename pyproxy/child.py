"""How a process of ours starts another: the same code, wherever it is started from."""

import os
import sys
from pathlib import Path

import pyproxy


def command(module: str, *words: str) -> list[str]:
    """Return what runs a module of ours, and none that lies in the current folder."""
    return [sys.executable, "-P", "-m", module, *words]


def environment() -> dict[str, str]:
    """Return this process's environment, in which ``command`` finds this code uninstalled, too."""
    path = [str(Path(pyproxy.__file__).parent.parent)]
    if given := os.environ.get("PYTHONPATH"):  # an empty part would be the current folder
        path.append(given)
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}
