"""The figures, as PNG (200 dpi) and PDF. Equal input gives equal bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.figure import Figure

from tafs.report.figures import image_grid, learning_curves, plots, style
from tafs.report.results import LoadedTable

DRAW: Mapping[str, Callable[[LoadedTable], Figure]] = {
    "steps": plots.steps,
    "pareto": plots.pareto,
    "compute": plots.compute,
    "curves": learning_curves.draw,
    "images": image_grid.draw,
    "hacking": plots.hacking,
    "profiles": plots.profiles,
}


def draw(table: LoadedTable, out_dir: Path) -> list[Path]:
    """Draw every figure of a table.

    Raises:
        ValueError: an input is missing or broken; names it.
    """
    files = []
    with style.style():
        for kind, name in table.spec.figures.items():
            files += style.save(DRAW[kind](table), out_dir, name, table.results)
    return files
