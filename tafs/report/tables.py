"""Tables as data: rows select runs, columns say what is printed, and `fill` computes the cells."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tafs.report import stats
from tafs.report.results import Result, System, check_paired, select
from tafs.rewards.metrics import METRICS

PUBLISHED = Path(__file__).parent / "paper"  # the paper's tables


@dataclass(frozen=True)
class Row:
    """One system at one number of steps."""

    where: Mapping[str, Any]  # see `select`
    nfe: int
    sampler: str | None = None  # None: the run's own for few steps
    label: str = ""  # "": the runs' title
    iteration: int | None = None  # None: the final model
    published: str | None = None  # its name in the first column of the paper's table
    first: bool = True  # of its system: where the paper's table has no steps, it prints one row
    rule: bool = False  # a line above it


@dataclass(frozen=True)
class Number:
    """A column of plain numbers."""

    name: str  # in the CSV, and in the paper's
    title: str
    latex: str
    digits: int
    read: Callable[[System, Row], float | None]


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
    """A column of other estimates with intervals."""

    name: str
    title: str
    digits: int
    estimate: Callable[[System, Row], stats.Estimate]
    published: str = ""  # its column in the paper's tables


Column = Number | Score | Statistic


@dataclass(frozen=True)
class Table:
    name: str
    caption: str
    rows: Sequence[Row]
    columns: Sequence[Column]
    header: str = "Method"  # of the rows' labels
    notes: Sequence[str] = ()  # what a reader must know beside the statistics
    beside: Sequence[Row] = ()  # not printed, but what is printed is computed from them too


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
    """A row with its values."""

    row: Row
    system: System
    sampler: str
    cells: Sequence[Cell]


def iteration_time(system: System, row: Row) -> float | None:
    """Median over iterations and seeds, in seconds."""
    times = [time for result in system.results for time in result.seconds()]
    return float(np.median(times)) if times else None


def _compute(system: System, row: Row) -> float | None:
    """Training compute in network evaluations per image of an iteration; see `Method.forward_equivalents`."""
    iterations = _iterations(system, row)
    return None if iterations is None else float(system.info["forward_equivalents"] * iterations)


def _iterations(system: System, row: Row) -> float | None:
    if not system.trained:
        return None
    return float(system.info["iterations"] if row.iteration is None else row.iteration)


NFE_OLD = Number(
    "nfe_old", "NFE_old", r"$\mathrm{NFE}_{\mathrm{old}}$", 0, lambda s, _: s.info.get("nfe_old")
)
NFE_THETA = Number(
    "nfe_theta", "NFE_θ", r"$\mathrm{NFE}_{\theta}$", 0, lambda s, _: s.info.get("nfe_theta")
)
ITERATIONS = Number("iterations", "Iterations", "Iterations", 0, _iterations)
COMPUTE = Number("compute", "Evaluations", "Evaluations", 0, _compute)
TIME = Number("iteration_time_s", "Time (s)", "Time (s)", 2, iteration_time)


def fill(table: Table, results: Sequence[Result], published: bool = False) -> list[Line]:
    """The table's values, with the best of a column marked where `stats.supported_winner` is sure.

    Args:
        published: put the paper's values beside them.

    Raises:
        ValueError: a run, a file or a value is missing; names it.
    """
    paper = _published(table.name) if published else []
    chosen = [(row, select(results, row.where, row.label)) for row in table.rows]
    entries = [(row, system, row.sampler or system.sampler) for row, system in chosen]
    columns: list[list[Cell]] = []
    for column in table.columns:
        if isinstance(column, Number):
            name = column.name
            cells = [Cell(column.read(s, row), column.digits) for row, s, _ in entries]
        elif isinstance(column, Score):
            name = METRICS[column.metric].published
            cells = _score_cells(column.metric, entries)
        else:
            name = column.published
            cells = [_estimated(column.estimate(s, row), column.digits) for row, s, _ in entries]
        columns.append(
            [
                replace(cell, published=_beside(paper, row).get(name) or None)
                for cell, (row, _, _) in zip(cells, entries, strict=True)
            ]
        )
    return [
        Line(row, system, sampler, [cells[i] for cells in columns])
        for i, (row, system, sampler) in enumerate(entries)
    ]


def _estimated(estimate: stats.Estimate, digits: int, best: bool = False) -> Cell:
    value = estimate.value if math.isfinite(estimate.value) else None
    return Cell(value, digits, None, estimate, best)


def _score_cells(name: str, entries: Sequence[tuple[Row, System, str]]) -> list[Cell]:
    metric = METRICS[name]
    first = entries[0][1].results[0].scores
    arrays, sources = [], []
    for row, system, sampler in entries:
        arrays.append(metric.factor * system.values(sampler, row.nfe, name, row.iteration))
        check_paired(system.results[0].scores, first)
        sources.append(tuple(result.run.folder for result in system.results))
    best = None
    # What another seed would change is not known of a model trained with one.
    if all(len(system.results) > 1 for _, system, _ in entries if system.trained):
        best = stats.supported_winner(arrays, first.tags, sources=sources, macro=metric.macro)
    return [
        _estimated(
            stats.mean_interval(array, first.tags, macro=metric.macro), metric.digits, i == best
        )
        for i, array in enumerate(arrays)
    ]


def _published(name: str) -> list[dict[str, str]]:
    """Rows of the paper's table; none of a table of our own."""
    published = PUBLISHED / f"{name}.csv"
    if not published.is_file():
        return []
    with published.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _beside(paper: Sequence[dict[str, str]], row: Row) -> dict[str, str]:
    """The paper's row of this name, and of this number of steps where the paper tells it."""
    for other in paper:
        # table1.csv has the rows' group before their name.
        name = other.get("method") or next(iter(other.values()))
        steps = other.get("nfe")
        fits = steps == str(row.nfe) if steps else row.first
        if row.published and fits and _same_name(name, row.published):
            return other
    return {}


def _same_name(a: str, b: str) -> bool:
    return a.replace(" ", "").casefold() == b.replace(" ", "").casefold()
