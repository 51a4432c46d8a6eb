"""The look of all figures: colours, markers, legends, and saving with equal bytes."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from tafs.report import fonts
from tafs.report.results import Result, System

DPI = 200


# Okabe & Ito's colours, which colour-blind readers can distinguish. A method looks the same in all
# figures; the line style shows the model on which it was trained.
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
    ("#cc6677", "p"),
    ("#6699cc", "s"),
    ("#808080", "^"),
    ("#000000", "D"),
)
LINES = ("-", "--", "-.", ":")
COLUMNS = 5  # of a legend, at most
STYLE: dict[str, Any] = {
    "font.family": fonts.BASE,
    "font.size": 8,
    "text.parse_math": False,  # a prompt or a title may contain dollar signs
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


def line(look: Look) -> dict[str, Any]:
    """matplotlib's properties of a line with markers; the markers of a broken line are hollow."""
    fill = {} if look.line == "-" else {"markerfacecolor": "white"}
    return {"color": look.colour, "marker": look.marker, "linestyle": look.line, **fill}


class Look(NamedTuple):
    """How a system is drawn."""

    colour: str
    marker: str
    line: str


def looks(systems: Sequence[System]) -> dict[System, Look]:
    """A look per system: a method's own colour and marker, and a line style per trained model.

    A variant of a method has its look only where the method itself is not among the systems.
    """
    trained = list(dict.fromkeys(s.spec.backbone for s in systems if s.spec.trained))
    free = iter(OTHERS * len(systems))
    taken: dict[tuple[str, ...], tuple[str, str]] = {}
    found = {}
    for system in sorted(systems, key=lambda one: one.spec.variant != one.spec.method):
        spec = system.spec
        key: tuple[str, ...] = (spec.variant, spec.task)
        if not spec.trained and spec.backbone not in trained:
            key = (spec.backbone,)
        if key not in taken:
            own = LOOKS.get(spec.method)
            taken[key] = own if own and own not in taken.values() else next(free)
        place = trained.index(spec.backbone) if spec.backbone in trained else 0
        found[system] = Look(*taken[key], LINES[place % len(LINES)])
    return {system: found[system] for system in systems}


def legend(figure: Figure, *panels: Axes) -> None:
    """One legend for all panels, above them, in as few rows as fit the figure's width."""
    entries: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for rows in range(-(-len(entries) // COLUMNS), len(entries) + 1):
        drawn = figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside upper center",
            ncols=-(-len(entries) // rows),
            handlelength=2.4,
            columnspacing=1.4,
        )
        _choose_fonts(figure)  # they decide the width
        if drawn.get_window_extent(renderer).width <= figure.bbox.width:
            return
        if rows < len(entries):
            drawn.remove()


@contextmanager
def style() -> Iterator[None]:
    """Apply STYLE to matplotlib's defaults, ignoring the user's matplotlibrc."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        parameters: Any = matplotlib.rcParams  # its type lists every key
        parameters.update(STYLE)
        yield


def wrap(text: str, width: int, **options: Any) -> str:
    """The text as it is drawn, in lines of at most `width` characters; wide ones count twice."""
    drawn = fonts.shown(text)
    wide = any(unicodedata.east_asian_width(character) in "WF" for character in drawn)
    return textwrap.fill(drawn, width // (1 + wide), **options)


def _choose_fonts(figure: Figure) -> None:
    """Draw what matplotlib's own font does not have with other fonts, or show it by its number."""
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]
    families = fonts.covering("".join(text.get_text() for text in texts)).families
    for text in texts:
        text.set_text(fonts.shown(text.get_text()))
        if families:
            text.set_fontfamily([fonts.BASE, *families])


def save(figure: Figure, out_dir: Path, name: str, results: Sequence[Result]) -> list[Path]:
    """Write NAME.png and NAME.pdf without dates and versions: equal figures are equal files."""
    finish(figure, any(result.random_weights for result in results))
    out_dir.mkdir(parents=True, exist_ok=True)
    files = [out_dir / f"{name}.png", out_dir / f"{name}.pdf"]
    figure.savefig(files[0], metadata={"Software": None})
    figure.savefig(files[1], metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return files


def finish(figure: Figure, random_weights: bool) -> None:
    """Mark a figure of random weights, and choose fonts that have all of its characters."""
    if random_weights:
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
    _choose_fonts(figure)
