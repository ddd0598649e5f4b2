"""Pictures of the figures, where matplotlib is installed."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

Results = Mapping[str, Mapping[str, float]]


def draw(results: Results, path: Path) -> None:
    """Draw how long one change takes, by size and by rate."""
    pyplot = plotter()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, figures in results.items():
        bars = {k: v for k, v in figures.items() if "change p" in k}
        axes.plot(bars.values(), bars.keys(), "o", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("ms, from the event to the kernel")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(title="Services x endpoints")
    figure.savefig(path, dpi=120)


def draw_ratios(results: Results, ratios: Sequence[str], path: Path) -> None:
    """Draw these ratios, by test; one is a line."""
    pyplot = plotter()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name in ratios:
        points = {test: found[name] for test, found in results.items() if name in found}
        axes.plot(points.values(), points.keys(), "o", label=name)
    axes.axvline(1.0, color="gray")
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    axes.set_xlabel("rate, as a ratio")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plotter() -> ModuleType | None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no chart: matplotlib is missing (pip install 'pyproxy[bench]')", file=sys.stderr)
        return None
    return pyplot
