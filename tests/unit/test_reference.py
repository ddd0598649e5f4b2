import re
import tomllib
from pathlib import Path

import pytest

from docs.make_reference import FOLDER, PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_reference_says_what_the_code_does(name):
    assert (FOLDER / name).read_text() == PAGES[name](), "python -m docs.make_reference renews it"


def test_what_architecture_calls_core_is_what_the_build_keeps_from_waiting():
    page = Path("ARCHITECTURE.md").read_text()
    _, core = page.split("| **core** | |\n")
    rows = core.split("\n\n")[0].splitlines()
    named = {name for row in rows for name in re.findall(r"`(\w+)/?`", row.split("|")[1])}
    contracts = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (c for c in contracts["contracts"] if c["name"] == "The core does no I/O")
    kept = {module.split(".")[1] for module in contract["source_modules"]}
    assert named == kept
