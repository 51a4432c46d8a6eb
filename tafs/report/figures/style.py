"""style."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tafs.report.results import (
    System,
)

DPI = 200


# Okabe & Ito's colours, which colour-blind readers tell apart; a method looks the same everywhere,
# but for the line, which tells the models apart on which it was trained.
LOOKS = {
    "base": ("#4d4d4d", "o"),
    "tafs_grpo": ("#d55e00", "D"),
    "flow_grpo": ("#0072b2", "s"),
    "mix_grpo": ("#009e73", "^"),
    "dance_grpo": ("#cc79a7", "v"),
    "rg_lcd": ("#e69f00", "P"),
    "reward_instruct": ("#56b4e9", "X"),
}


OTHERS = (
    ("#882255", "p"),
    ("#999933", "h"),
    ("#332288", "<"),
    ("#44aa99", ">"),
    ("#661100", "*"),
    ("#117733", "8"),
    ("#aa4499", "d"),
    ("#ddcc77", "H"),
    ("#88ccee", "p"),
    ("#6699cc", "s"),
)


LINES = ("-", "--", "-.", ":")


STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 8,
    "text.parse_math": False,  # a prompt or a title may hold dollar signs
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "pdf.fonttype": 42,  # TrueType, embedded
    "savefig.dpi": DPI,
}


def _line(look: Look) -> dict[str, Any]:
    """matplotlib's properties of a line with markers, which are hollow on a broken line."""
    fill = {} if look.line == "-" else {"markerfacecolor": "white"}
    return {"color": look.colour, "marker": look.marker, "linestyle": look.line, **fill}


class Look(NamedTuple):
    """How a system is drawn."""

    colour: str
    marker: str
    line: str


def _looks(systems: Sequence[System]) -> list[Look]:
    """A look a system: the method's own, or the next free one; a line a trained model."""
    trained = list(dict.fromkeys(s.info["backbone"] for s in systems if s.trained))
    free = iter(OTHERS * len(systems))
    taken: dict[tuple[str, ...], tuple[str, str]] = {}
    looks = []
    for system in systems:
        info = system.info
        key: tuple[str, ...] = (system.results[0].variant, str(info.get("task")))
        if not system.trained and info["backbone"] not in trained:
            key = (str(info["backbone"]),)
        if key not in taken:
            own = LOOKS.get(str(info["method"]))
            taken[key] = own if own and own not in taken.values() else next(free)
        place = trained.index(info["backbone"]) if info["backbone"] in trained else 0
        looks.append(Look(*taken[key], LINES[place % len(LINES)]))
    return looks


def _legend(figure: Figure, *panels: Axes, columns: int = 5) -> None:
    """One legend for all panels, above them."""
    entries: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if max(map(len, entries), default=0) > 20:
        columns = min(columns, 3)  # more long labels than that are wider than the panels
    rows = -(-len(entries) // columns)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside upper center",
        ncols=-(-len(entries) // rows),
        handlelength=2.4,
        columnspacing=1.4,
    )


@contextmanager
def _style() -> Iterator[None]:
    """Our style on matplotlib's own defaults, whatever a user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        parameters: Any = matplotlib.rcParams  # its type knows every single key
        parameters.update(STYLE)
        yield


def _save(figure: Figure, out_dir: Path | str, name: str, systems: Sequence[System]) -> list[Path]:
    """Without dates and versions, so that equal figures are equal files."""
    if any(result.random_weights for system in systems for result in system.results):
        width, height = figure.get_size_inches()
        figure.text(
            0.5,
            0.5,
            "RANDOM WEIGHTS",
            ha="center",
            va="center",
            rotation=np.degrees(np.arctan2(height, width)),
            fontsize=7 * min(width, 2 * height),
            color="#cc3311",
            alpha=0.3,
        )
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.png", folder / f"{name}.pdf"]
    figure.savefig(files[0], metadata={"Software": None})
    figure.savefig(files[1], metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return files
