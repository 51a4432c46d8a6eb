"""The page's tables, claims and runs, as its template and its scripts take them."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tafs.report import formats, stats
from tafs.report.claims import NOT_REPRODUCED, NOT_TESTED, REPRODUCED, UNDECIDED, Verdict
from tafs.report.page.systems import Systems
from tafs.report.results import Report, Result
from tafs.report.tables import Cell, Column, Line, Number, Score, Table, samplers_of
from tafs.rewards.metrics import METRICS
from tafs.runtime import receipts
from tafs.runtime.run_dir import STAGES

ALL = "*"  # the table of all systems; no experiment has this name
POINTS = 150  # of a learning curve; longer ones are means of neighbouring iterations
VERDICTS = (REPRODUCED, NOT_REPRODUCED, UNDECIDED, NOT_TESTED)


def number(value: float | None) -> float | None:
    """The value with five significant digits; None if it is not finite."""
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None


def interval(estimate: stats.Estimate) -> list[float | None]:
    """[value, low, high]."""
    return [number(estimate.value), number(estimate.low), number(estimate.high)]


class Axis:
    """Maps values to percent of a drawing's width."""

    def __init__(self, values: Iterable[float]) -> None:
        known = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(known), max(known)
        margin = 0.06 * (high - low) or 1.0
        self.low, self.width = low - margin, high - low + 2 * margin

    def __call__(self, value: float) -> float:
        """Between 0 and 100; infinite values lie at the edges."""
        return round(float(np.clip((value - self.low) / self.width, 0, 1)) * 100, 2)


# -- tables ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShownTable:
    """A table of the leaderboard: what the template prints, and a record for the scripts."""

    name: str
    title: str
    kind: str
    caption: str
    header: str
    columns: Sequence[Mapping[str, Any]]
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str]
    files: Mapping[str, str]  # LaTeX and CSV, to copy

    @property
    def record(self) -> dict[str, Any]:
        return {"title": self.title, "kind": self.kind, "files": dict(self.files)}


def title_of(name: str) -> str:
    """A table's name as a title: "table2" -> "Table 2"."""
    return re.sub(r"(?<=[a-z])(?=\d)", " ", name.replace("_", " ")).capitalize()


def table(
    report: Report, built: Table, lines: Sequence[Line], systems: Systems, root: Path
) -> ShownTable:
    """A table of the report."""
    kind = next(t.spec.kind for t in report.tables if t.spec.name == built.name)
    names = [line.row.spec.label for line in lines]
    files = {
        suffix: (root / "tables" / f"{built.name}.{suffix}").read_text("utf-8")
        for suffix in ("tex", "csv")
    }
    notes = [formats.BRACKETS, *formats.notes_of(built, lines)]
    rows = [{c.name: cell for c, cell in zip(built.columns, x.cells, strict=True)} for x in lines]
    return ShownTable(
        name=built.name,
        title=title_of(built.name),
        kind=kind,
        caption=built.caption,
        header=built.header,
        columns=[_column(column) for column in built.columns],
        rows=_rows(names, lines, built.columns, rows, systems),
        notes=notes,
        files=files,
    )


def everything(tables: Sequence[tuple[Table, Sequence[Line]]], systems: Systems) -> ShownTable:
    """Every system at every number of steps that some table shows, each once."""
    columns: dict[str, Column] = {}
    found: dict[tuple[Any, ...], tuple[Line, dict[str, Cell]]] = {}
    for built, lines in tables:
        scores = {i: c for i, c in enumerate(built.columns) if isinstance(c, Score)}
        columns |= {column.name: column for column in scores.values()}
        for line in lines if scores else ():
            spec, of = line.row.spec, line.row.system.spec
            after = of.iterations if spec.iteration is None else spec.iteration
            setting = (spec.runs, *samplers_of(line.row), spec.nfe, after)
            cells = found.setdefault(setting, (line, {}))[1]
            # Bold says what is best in one table.
            cells |= {c.name: replace(line.cells[i], best=False) for i, c in scores.items()}
    # In the order of METRICS, whichever tables have them.
    ordered = [columns[name] for name in METRICS if name in columns]
    lines = [line for line, _ in found.values()]
    names = [systems.name(line.row.system) for line in lines]
    return ShownTable(
        name=ALL,
        title="All systems",
        kind="scores",
        caption="Every system at every number of steps that a table shows.",
        header="System",
        columns=[_column(column) for column in ordered],
        rows=_rows(names, lines, ordered, [cells for _, cells in found.values()], systems),
        notes=["Numbers are comparable on the same prompts only."],
        files={},
    )


def _column(column: Column) -> dict[str, Any]:
    metric = METRICS[column.metric] if isinstance(column, Score) else None
    return {
        "name": column.name,
        "title": column.title,
        "drawn": not isinstance(column, Number),
        "arrow": "" if metric is None else "↑" if metric.higher_is_better else "↓",
        "unit": metric.unit if metric else "",
    }


def _rows(
    names: Sequence[str],
    lines: Sequence[Line],
    columns: Sequence[Column],
    cells: Sequence[Mapping[str, Cell]],
    systems: Systems,
) -> list[dict[str, Any]]:
    """The rows of a table; all cells of a column share an axis."""
    seeds = [
        {c.name: _seed_means(line, c.metric) for c in columns if isinstance(c, Score)}
        for line in lines
    ]
    axes = {
        c.name: Axis(
            x
            for own, dots in zip(cells, seeds, strict=True)
            for cell in [own.get(c.name)]
            if cell and cell.estimate
            for x in (cell.estimate[:3] + tuple(dots.get(c.name, ())))
        )
        for c in columns
    }
    several = {
        kind: len({getattr(line.row.system.spec, kind) for line in lines if _trained(line)}) > 1
        for kind in ("backbone", "task")
    }
    rows = []
    for name, line, own, dots in zip(names, lines, cells, seeds, strict=True):
        spec, system = line.row.spec, line.row.system
        parts = [
            *([spec.backbone] if several["backbone"] and _trained(line) else []),
            *([system.spec.task] if several["task"] and _trained(line) else []),
            *([] if _trained(line) else ["untrained"]),
            *([] if spec.iteration is None else [f"{spec.iteration} iterations"]),
            ", ".join(dict.fromkeys(samplers_of(line.row))),
        ]
        shown = (part.replace("_", " ") for part in parts)
        said = re.split(r" · | \+ ", name)
        rows.append(
            {
                "name": name,
                "system": systems.key(system),
                "colour": systems.looks[systems.key(system)].colour,
                "task": system.spec.task,
                "model": spec.backbone,
                "nfe": spec.nfe,
                "detail": " · ".join(part for part in shown if part not in said),
                "seeds": len(system.results),
                "rule": spec.rule,
                "cells": [
                    _cell(own.get(c.name), axes[c.name], dots.get(c.name, ())) for c in columns
                ],
            }
        )
    return rows


def _trained(line: Line) -> bool:
    return line.row.system.spec.trained


def _seed_means(line: Line, metric: str) -> list[float]:
    """The mean of each seed on the shown scale."""
    system, factor = line.row.system, METRICS[metric].factor
    if metric not in system.scores.metrics():
        return []
    values = factor * line.row.values(metric)
    macro = METRICS[metric].macro
    return [stats.mean(seed[None], system.scores.tags, macro=macro) for seed in values]


def _cell(cell: Cell | None, axis: Axis, dots: Sequence[float]) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "value": None,
        "text": "–",
        "best": False,
        "published": None,
        "interval": "",
        "at": None,
        "dots": (),
    }
    if cell is None or cell.value is None:
        return shown
    shown |= {
        "value": number(cell.value),
        "text": f"{cell.value:.{cell.digits}f}",
        "best": cell.best,
        "published": cell.published,
    }
    found = cell.estimate
    if found and math.isfinite(found.low):
        low, high = (f"{x:.{cell.digits}f}" for x in (found.low, found.high))
        shown["interval"] = f"[{low}, {high}]"
        shown["at"] = {"low": axis(found.low), "high": axis(found.high), "mean": axis(cell.value)}
        shown["dots"] = [axis(x) for x in dots if math.isfinite(x)] if len(dots) > 1 else []
    return shown


def headline(tables: Sequence[ShownTable]) -> ShownTable | None:
    """The table of gains, which is all metrics in one number; else the first one of scores."""
    for kind in ("gains", "scores"):
        for table in tables:
            if table.kind == kind:
                return table
    return None


def metrics(report: Report) -> list[dict[str, Any]]:
    """The metrics of all tables, in the order of METRICS."""
    known = {metric for table in report.tables for metric in table.metrics}
    return [
        {
            "name": m.name,
            "title": m.title,
            "unit": m.unit,
            "digits": m.digits,
            "up": m.higher_is_better,
            "factor": m.factor,
        }
        for m in METRICS.values()
        if m.name in known
    ]


# -- claims ----------------------------------------------------------------------------------------


def claims(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The claims with their verdicts, and how many have each."""
    counts = Counter(verdict for _, verdict, _ in verdicts)
    return {
        "counts": {verdict: counts[verdict] for verdict in VERDICTS},
        "tested": [_claim(one) for one in verdicts if one.verdict != NOT_TESTED],
        "untested": [one.claim for one in verdicts if one.verdict == NOT_TESTED],
    }


def _claim(verdict: Verdict) -> dict[str, Any]:
    claim, found, comparisons = verdict
    axes = {
        metric: Axis(
            x
            for c in comparisons
            if c.metric == metric
            for x in (c.estimate.value, c.estimate.low, c.estimate.high, *c.supporting)
        )
        for metric in {c.metric for c in comparisons}
    }
    return {
        "id": claim.id,
        "claim": claim.claim,
        "source": claim.source,
        "verdict": found,
        "seeds": min((c.estimate.n_seeds for c in comparisons), default=0),
        "comparisons": [
            {
                "what": c.what,
                "text": f"{c.estimate.value:+.3g}",
                "interval": f"[{c.estimate.low:+.3g}, {c.estimate.high:+.3g}]",
                "sign": c.sign,
                "negligible": c.is_negligible,
                "needed": c.needed if c.sign == 0 else "",
                "at": {
                    "low": axis(c.estimate.low),
                    "high": axis(c.estimate.high),
                    "mean": axis(c.estimate.value),
                    "from": axis(c.supporting[0]),
                    "to": axis(c.supporting[1]),
                }
                if math.isfinite(c.estimate.low)
                else None,
            }
            for c in comparisons
            for axis in [axes[c.metric]]
        ],
    }


# -- runs ------------------------------------------------------------------------------------------


def facts(report: Report) -> dict[str, Any]:
    """What was run, where, when and by which code."""
    results = {r.spec.name: r for table in report.tables for r in table.results}
    trained = [result for result in results.values() if result.spec.trained]
    origins = [result.origin.get("provenance", {}) for result in trained]
    times = [record["time"] for r in trained for record in (r.iterations[0], r.iterations[-1])]
    commits = Counter(
        str(origin["git_commit"])[:12] + (" (changed)" if origin.get("git_changed") else "")
        for origin in origins
        if origin.get("git_commit")
    )
    machines = Counter(
        ", ".join([origin["machine"], *gpu, f"Python {origin.get('python', '?')}"])
        for origin in origins
        for gpu in [[origin["gpu"]] if origin.get("gpu") else []]
        if origin.get("machine")
    )
    assets = next(iter(results.values())).spec.assets
    return {
        "runs": len(results),
        "trained": len(trained),
        "methods": len({result.spec.method for result in trained}),
        "seeds": sorted(
            {len(s.results) for t in report.tables for s in t.distinct if s.spec.trained}
        ),
        "models": sorted({result.spec.backbone for result in results.values()}),
        "duration": duration(sum(sum(result.seconds()) for result in trained)),
        "device": "GPU" if any(origin.get("gpu") for origin in origins) else "CPU",
        "assets": assets.assets,
        "machines": list(machines),
        "commits": list(commits),
        "versions": next((o["versions"] for o in origins if "versions" in o), {}),
        "when": period(min(times), max(times)) if times else "",
    }


def moment(seconds: float) -> str:
    """A time in UTC, to the minute."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def period(start: float, end: float) -> str:
    first, last = moment(start), moment(end)
    day, _, time = last.partition(" ")
    return f"{first} to {time if first.startswith(day) else last} UTC"


def duration(seconds: float) -> str:
    """In the largest unit of which there are two or more."""
    units = (("hours", 3600), ("minutes", 60), ("seconds", 1))
    name, unit = next((u for u in units if seconds >= 2 * u[1]), units[-1])
    return f"{seconds / unit:.1f} {name}"


def runs(report: Report, systems: Systems) -> list[dict[str, Any]]:
    """Every run: its settings, provenance, files and learning curves."""
    return [_run(result, key) for result, key in systems.results]


def _run(result: Result, key: str) -> dict[str, Any]:
    spec = result.spec
    written = {}
    for stage in STAGES:
        receipt = receipts.read(result.run.folder, stage)
        for name, file in receipt.files.items() if receipt else ():
            written[name] = [file.bytes, file.sha256]
    times = [float(record["time"]) for record in result.iterations]
    return {
        "name": spec.name,
        "system": key,
        "seed": spec.seed,
        "spec": spec.model_dump(mode="json"),
        "evaluation": result.evaluation.model_dump(mode="json"),
        "origin": result.origin,
        "files": written,
        "samplers": [[nfe, at, name] for (nfe, at), name in sorted(result.samplers.items())],
        "started": moment(times[0]) if times else "",
        "seconds": number(sum(result.seconds())),
        "curves": _curves(result.iterations, spec.nfe_theta or 1),
    }


def _curves(
    iterations: Sequence[Mapping[str, Any]], trained_steps: int
) -> dict[str, list[float | None]]:
    """Every number that the journal has of each iteration, at most POINTS of them.

    A reward is that of the last scored image. The KL divergence is the mean of the last
    `trained_steps` iterations that measure it, each of which measures another step.
    """
    columns: dict[str, list[float]] = {}
    for place, record in enumerate(iterations):
        flat = {k: v for k, v in record.items() if k not in ("time", "kind")}
        rewards, seconds = flat.pop("rewards", {}), flat.pop("seconds", {})
        flat |= {f"reward {name}": steps[-1] for name, steps in rewards.items() if steps}
        flat |= {f"seconds {phase}": value for phase, value in seconds.items()}
        for name, value in flat.items():
            if isinstance(value, int | float) or value is None:
                column = columns.setdefault(name, [math.nan] * len(iterations))
                column[place] = math.nan if value is None else float(value)
    latest: deque[float] = deque(maxlen=trained_steps)
    divergences = columns.get("kl", [])
    for place, divergence in enumerate(divergences):
        if math.isfinite(divergence):
            latest.append(divergence)
            divergences[place] = statistics.fmean(latest)
    width = -(-len(iterations) // POINTS) or 1
    return {
        name: [_mean(values[i : i + width]) for i in range(0, len(values), width)]
        for name, values in columns.items()
    }


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return number(sum(known) / len(known)) if known else None
