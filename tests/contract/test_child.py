"""What a process of ours starts is the same code, whatever lies around."""

import subprocess
from pathlib import Path

import pytest

import pyproxy
from pyproxy import __version__, child

SOURCES = Path(pyproxy.__file__).parent


@pytest.mark.parametrize("python_path", [None, "/nowhere"])
def test_a_folder_of_our_name_in_the_current_one_is_not_run(tmp_path, monkeypatch, python_path):
    (tmp_path / "pyproxy").mkdir()
    for name in ("__init__", "__main__"):
        (tmp_path / "pyproxy" / f"{name}.py").write_text("print('of somebody else')")
    monkeypatch.chdir(tmp_path)
    if python_path is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", python_path)
    words = child.command("pyproxy", "--version")
    output = subprocess.check_output(words, env=child.environment(), text=True)
    assert output == f"pyproxy {__version__}\n"


def test_nothing_else_starts_python():
    found = {path.name for path in SOURCES.rglob("*.py") if "sys.executable" in path.read_text()}
    assert found == {"child.py"}
