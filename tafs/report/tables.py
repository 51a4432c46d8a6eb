"""Tables as data: rows are systems, columns say what is printed, and `fill` computes the cells."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tafs.experiment.specs import BEST, RowSpec
from tafs.models.sampling import SAMPLERS
from tafs.report import stats
from tafs.report.results import LoadedTable, System, check_paired, shown_mean
from tafs.rewards.metrics import METRICS

PUBLISHED = Path(__file__).parent / "paper"  # the paper's tables


@dataclass(frozen=True)
class Row:
    """A system at one number of steps."""

    spec: RowSpec
    system: System
    first: bool = True  # of its system: a paper's table without steps prints one row for it

    def values(self, metric: str) -> stats.Array:
        """The row's scores, [seeds, prompts, images]; see `System.values`."""
        return self.system.values(self.spec.sampler, self.spec.nfe, metric, self.spec.iteration)

    def quality(self, metric: str) -> stats.Array:
        """The row's scores, with the sign for which higher is better; see `System.quality`."""
        return self.system.quality(self.spec.sampler, self.spec.nfe, metric, self.spec.iteration)


@dataclass(frozen=True)
class Number:
    """A column of plain numbers."""

    name: str  # in the CSV and in the paper's table
    title: str
    latex: str
    digits: int
    read: Callable[[Row], float | None]


@dataclass(frozen=True)
class Score:
    """A column of a metric's means, with intervals."""

    metric: str  # of METRICS

    @property
    def name(self) -> str:
        return self.metric

    @property
    def title(self) -> str:
        return METRICS[self.metric].title


@dataclass(frozen=True)
class Statistic:
    """A column of other estimates, with intervals."""

    name: str
    title: str
    digits: int
    estimate: Callable[[Row], stats.Estimate]
    published: str = ""  # its column in the paper's table


Column = Number | Score | Statistic


@dataclass(frozen=True)
class Table:
    name: str
    caption: str
    rows: Sequence[Row]
    columns: Sequence[Column]
    header: str = "Method"  # of the column of labels
    notes: Sequence[str] = ()  # printed before those on the statistics
    beside: Sequence[System] = ()  # not printed, but used to compute what is printed
    details: Mapping[str, Any] = field(default_factory=dict)  # further entries of the provenance


@dataclass(frozen=True)
class Cell:
    """A printed value; numbers without statistics have only `value`."""

    value: float | None
    digits: int
    published: str | None = None  # as the paper prints it
    estimate: stats.Estimate | None = None
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A row with its cells."""

    row: Row
    cells: Sequence[Cell]


def rows_of(table: LoadedTable) -> list[Row]:
    """The rows of a loaded table, in order."""
    seen: set[tuple[str, ...]] = set()
    rows = []
    for spec, system in table.systems.items():
        rows.append(Row(spec, system, first=spec.runs not in seen))
        seen.add(spec.runs)
    return rows


def samplers_of(row: Row) -> list[str]:
    """The sampler of each of a row's runs, a key of `sampling.SAMPLERS` or PIPELINE."""
    spec = row.spec
    if spec.sampler != BEST:
        return [spec.sampler for _ in row.system.results]
    return [
        result.samplers[
            spec.nfe, result.spec.iterations if spec.iteration is None else spec.iteration
        ]
        for result in row.system.results
    ]


def samplers_note(rows: Sequence[Row]) -> str:
    """Which rows were sampled how; "" if none was sampled by a choice or in common."""
    found: dict[str, list[str]] = {}
    for row in rows:
        counts = Counter(samplers_of(row))
        for sampler, count in counts.items():
            if sampler in SAMPLERS:
                label = f"{row.spec.label} at {row.spec.nfe}"
                part = "" if len(counts) == 1 else f" ({count} of {counts.total()} runs)"
                found.setdefault(sampler, []).append(label + part)
    if not found:
        return ""
    if len(found) == 1:
        return f"All images: {SAMPLERS[next(iter(found))].title}."
    listed = "; ".join(
        f"{SAMPLERS[sampler].title}: {', '.join(found[sampler])}"
        for sampler in SAMPLERS
        if sampler in found
    )
    count = max(len(row.system.results[0].evaluation.samplers) for row in rows)
    return f"Sampler and grid, the best of {count} on training prompts. {listed}."


def _iteration_time(row: Row) -> float | None:
    """Median over iterations and seeds, in seconds."""
    times = [time for result in row.system.results for time in result.seconds()]
    return float(np.median(times)) if times else None


def _compute(row: Row) -> float | None:
    """Training compute in forward passes per image; see `Method.forward_equivalents`."""
    iterations = _iterations(row)
    return None if iterations is None else row.system.spec.forward_equivalents * iterations


def _iterations(row: Row) -> float | None:
    if not row.system.spec.trained:
        return None
    at = row.spec.iteration
    return float(row.system.spec.iterations if at is None else at)


NFE_OLD = Number(
    "nfe_old", "NFE_old", r"$\mathrm{NFE}_{\mathrm{old}}$", 0, lambda row: row.system.spec.nfe_old
)
NFE_THETA = Number(
    "nfe_theta", "NFE_θ", r"$\mathrm{NFE}_{\theta}$", 0, lambda row: row.system.spec.nfe_theta
)
ITERATIONS = Number("iterations", "Iterations", "Iterations", 0, _iterations)
COMPUTE = Number("compute", "Evaluations", "Evaluations", 0, _compute)
TIME = Number("iteration_time_s", "Time (s)", "Time (s)", 2, _iteration_time)


def fill(table: Table, published: bool = False) -> list[Line]:
    """The table's cells. The best of a column is marked where `stats.supported_winner` finds one.

    Args:
        published: whether to put the paper's values beside them.

    Raises:
        ValueError: a file or a value of a run is missing; names it.
    """
    paper = _published(table.name) if published else []
    columns: list[list[Cell]] = []
    for column in table.columns:
        if isinstance(column, Number):
            name = column.name
            cells = [Cell(column.read(row), column.digits) for row in table.rows]
        elif isinstance(column, Score):
            name = METRICS[column.metric].published
            cells = _score_cells(column.metric, table.rows)
        else:
            name = column.published
            cells = [_estimated(column.estimate(row), column.digits) for row in table.rows]
        columns.append(
            [
                replace(cell, published=_beside(paper, row).get(name) or None)
                for cell, row in zip(cells, table.rows, strict=True)
            ]
        )
    return [Line(row, [cells[i] for cells in columns]) for i, row in enumerate(table.rows)]


def _estimated(estimate: stats.Estimate, digits: int, best: bool = False) -> Cell:
    value = estimate.value if math.isfinite(estimate.value) else None
    return Cell(value, digits, None, estimate, best)


def _score_cells(name: str, rows: Sequence[Row]) -> list[Cell]:
    metric = METRICS[name]
    first = rows[0].system.scores
    arrays, sources = [], []
    for row in rows:
        arrays.append(metric.factor * row.values(name))
        check_paired(row.system.scores, first)
        sources.append(tuple(result.run.folder for result in row.system.results))
    best = None
    # With one seed, the effect of another seed is unknown.
    if all(len(row.system.results) > 1 for row in rows if row.system.spec.trained):
        best = stats.supported_winner(
            arrays,
            first.tags,
            sources=sources,
            higher_is_better=metric.higher_is_better,
            macro=metric.macro,
        )
    return [
        _estimated(shown_mean(name, array, first.tags), metric.digits, i == best)
        for i, array in enumerate(arrays)
    ]


def _published(name: str) -> list[dict[str, str]]:
    """Rows of the paper's table; [] for a table that the paper does not have."""
    published = PUBLISHED / f"{name}.csv"
    if not published.is_file():
        return []
    with published.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _beside(paper: Sequence[dict[str, str]], row: Row) -> dict[str, str]:
    """The paper's row with this label, and with this number of steps where the paper gives it."""
    for other in paper:
        # In table1.csv a column of groups comes before the names.
        name = other.get("method") or next(iter(other.values()))
        steps = other.get("nfe")
        fits = steps == str(row.spec.nfe) if steps else row.first
        printed, ours = (x.replace(" ", "").casefold() for x in (name, row.spec.label))
        if fits and printed == ours:
            return other
    return {}
