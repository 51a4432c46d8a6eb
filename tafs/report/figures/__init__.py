"""The figures, as PNG (200 dpi) and PDF. Equal input gives equal bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tafs.report.figures import plots
from tafs.report.figures.image_grid import image_grid
from tafs.report.figures.learning_curves import learning_curves
from tafs.report.results import LoadedTable

DRAW: Mapping[str, Callable[[LoadedTable, Path, str], list[Path]]] = {
    "steps": plots.steps,
    "pareto": plots.pareto,
    "compute": plots.compute,
    "curves": learning_curves,
    "images": image_grid,
    "hacking": plots.hacking,
    "profiles": plots.profiles,
}


def draw(table: LoadedTable, out_dir: Path) -> list[Path]:
    """Draw every figure of a table.

    Raises:
        ValueError: an input is missing or broken; names it.
    """
    return [
        file
        for kind, name in table.spec.figures.items()
        for file in DRAW[kind](table, out_dir, name)
    ]
