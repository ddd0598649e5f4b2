"""``pytest tests/scenarios --rewrite`` writes what is into the files, to be read as a change."""


def pytest_addoption(parser):
    parser.addoption("--rewrite", action="store_true", help="rewrite the then part of scenarios")
