"""A picture of the figures, where matplotlib is installed."""

import sys
from collections.abc import Mapping
from pathlib import Path


def draw(results: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw how long one change takes, by size and by rate."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no chart: matplotlib is missing (pip install 'pyproxy[bench]')", file=sys.stderr)
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
