"""Writes docs/configuration.md and docs/metrics.md from the code that they describe.

python -m docs.make_reference
"""

from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct, structs

from pyproxy.config import Config, setting
from pyproxy.config.file import dump
from pyproxy.config.flags_kinds import Flag
from pyproxy.config.flags_table import GROUPS
from pyproxy.metrics import COUNTERS, GAUGES, HISTOGRAMS, READINGS, Row

FOLDER = Path(__file__).parent
CONFIGURATION = """\
# Configuration

Settings come from flags, or from a file that `--config` names: kube-proxy's
`KubeProxyConfiguration`, `kubeproxy.config.k8s.io/v1alpha1`. With a file, flags for the same
settings are ignored, as in kube-proxy; `--hostname-override` and those of logging win over it.
`pyproxy --write-config-to FILE` writes the file that says what the flags say. When the file
changes, pyproxy ends with exit code 1, for whoever started it to start it again.

This page is made from the code: `python -m docs.make_reference`.

## Flags
"""
FILE = """
## The file

Every field with its default. A duration is text such as `30s`. Fields with a * are
pyproxy's own; kube-proxy warns of them.

| field | default |
|---|---|
"""
METRICS = """\
# Metrics

`/metrics` on `--metrics-bind-address`. Names that begin with `kubeproxy_` and `rest_client_` are
kube-proxy's; they keep its labels and meaning. A row that names modes exists in these only.

This page is made from the code: `python -m docs.make_reference`.
"""
FLAG_HEAD = "| flag | field of the file | meaning |\n|---|---|---|\n"
OWN = (
    "cloudAnnotations",
    "programmedAnnotationPeriod",
    "serviceMetrics",
    "serviceProxyName",
    "conntrack.endForbiddenFlows",
    "ipvs.bindAddresses",
    "ipvs.drainTimeout",
    "userspace.",
)


def configuration() -> str:
    parts = [CONFIGURATION]
    for group in GROUPS:
        parts.append(f"\n### {group.title}\n\n{FLAG_HEAD}")
        parts += [flag_row(flag) for flag in group.flags]
    parts.append(FILE)
    for path, value in leaves(dump(Config())):
        mark = "*" if path.startswith(OWN) else ""
        parts.append(f"| `{path}`{mark} | `{text_of(value)}` |\n")
    return "".join(parts)


def flag_row(flag: Flag) -> str:
    value = flag.placeholder or flag.kind.placeholder
    word = f"--{flag.name} {value}".strip()
    meaning = flag.help + (f" Deprecated: {flag.instead} replaces it." if flag.instead else "")
    field = f"`{path_in_file(flag.setting)}`" if flag.setting else ""
    return f"| `{cell(word)}` | {field} | {cell(meaning)} |\n"


def path_in_file(path: str) -> str:
    """Return the file's words for a dotted path into the settings."""
    words = []
    within: object = Config()
    for name in path.split("."):
        assert isinstance(within, Struct), "a leaf has no fields"
        words.append(next(f.encode_name for f in structs.fields(within) if f.name == name))
        within = setting(within, name)
    return ".".join(words)


def leaves(content: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(content, dict) and content:
        for name, value in content.items():
            yield from leaves(value, f"{path}.{name}" if path else name)
    else:
        yield path, content


def text_of(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case "" | None:
            return '""'
        case _:
            return str(value)


def metrics() -> str:
    kinds = {
        "Counters": (*COUNTERS, *READINGS),
        "Gauges": GAUGES,
        "Histograms": HISTOGRAMS,
    }
    parts = [METRICS]
    for title, rows in kinds.items():
        parts.append(f"\n## {title}\n\n| name | labels | modes | meaning |\n|---|---|---|---|\n")
        parts += [metric_row(row) for row in sorted(rows)]
    return "".join(parts)


def metric_row(row: Row) -> str:
    return f"| `{row.name}` | {', '.join(row.labels)} | {', '.join(row.modes)} | {row.help} |\n"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES = {"configuration.md": configuration, "metrics.md": metrics}

if __name__ == "__main__":
    for name, made in PAGES.items():
        (FOLDER / name).write_text(made())
