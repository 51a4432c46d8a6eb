"""Tables as data: rows select runs, columns say what is printed. Files in, files out.

Each table is written as CSV and Parquet (every number with its interval and counts, for machines),
Markdown, LaTeX (booktabs) and HTML, and its provenance as JSON: the runs, files and settings that
each cell came from. Equal input gives equal bytes.
"""

from __future__ import annotations

import csv
import hashlib
import html
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tafs import config, journal, rundir, stats
from tafs.stats import Array

PUBLISHED = Path(__file__).parent / "paper"  # the paper's tables


@dataclass(frozen=True)
class Metric:
    """How a metric is reported; more is better for all of them."""

    title: str
    digits: int
    published: str  # its column in the paper's tables
    factor: float = 1.0  # reported value per unit of the score
    macro: bool = False  # the mean of the tasks' means, not of all images


METRICS = {
    "geneval": Metric("GenEval", 2, "geneval", factor=100, macro=True),
    "pickscore": Metric("PickScore", 2, "pickscore"),
    "clip": Metric("CLIP", 2, "clip"),
    "hpsv2": Metric("HPSv2.1", 3, "hpsv2_1"),
    "imagereward": Metric("ImageReward", 3, "imagereward"),
    "unifiedreward": Metric("UnifiedReward", 3, "unifiedreward"),
}


# --- What runs left on disk ---------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """A run's scores: `values[sampler, nfe, metric, iteration]` is [prompts, images].

    NaN where a value is missing; images that a setting did not draw are not there.
    """

    file: Path
    prompts: tuple[int, ...]
    tags: tuple[str, ...]  # of each prompt
    images: tuple[int, ...]
    values: Mapping[tuple[str, int, str, int], Array]

    @property
    def final(self) -> int:
        """The iteration of the final model; 0 of a base model."""
        return max(iteration for *_, iteration in self.values)

    def settings(self) -> list[tuple[str, int]]:
        """The (sampler, nfe) that the final model was evaluated with."""
        keys = self.values
        return sorted({(s, nfe) for s, nfe, _, iteration in keys if iteration == self.final})

    def metrics(self) -> list[str]:
        """Those of METRICS that were scored, in their order."""
        found = {metric for _, _, metric, _ in self.values}
        return [metric for metric in METRICS if metric in found]


def read_scores(file: Path) -> Scores:
    """scores.parquet as dense arrays.

    Raises:
        ValueError: it is missing, unreadable or holds an image twice; names the file.
    """
    if not file.is_file():
        raise ValueError(f"{file}: not found; `python -m tafs.evaluate` writes it")
    columns = ["prompt", "tag", "image", "iteration", "sampler", "nfe", "metric", "value"]
    try:
        table = pd.read_parquet(file, columns=columns)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: not a table of scores ({reason})") from None
    if table.empty:
        raise ValueError(f"{file}: holds no scores")
    axes = ["sampler", "nfe", "metric", "iteration", "prompt", "image"]
    codes, names = zip(*(pd.factorize(table[name], sort=True) for name in axes), strict=True)
    shape = tuple(len(found) for found in names)
    place = np.ravel_multi_index(codes, shape)
    count = np.bincount(place, minlength=math.prod(shape)).reshape(shape)
    if count.max() > 1:
        at = np.unravel_index(int(count.argmax()), shape)
        twice = " ".join(f"{axis} {names[i][at[i]]}" for i, axis in enumerate(axes))
        raise ValueError(f"{file}: holds two values of {twice}")
    dense = np.full(shape, np.nan)
    dense.flat[place] = table["value"].to_numpy(dtype=float)
    # Any row of a prompt tells its tag.
    rows = np.unique(codes[4], return_index=True)[1]
    return Scores(
        file=file,
        prompts=tuple(int(prompt) for prompt in names[4]),
        tags=tuple(str(tag) for tag in table["tag"].iloc[rows]),
        images=tuple(int(image) for image in names[5]),
        values={
            (str(names[0][i]), int(names[1][j]), str(names[2][k]), int(names[3][m])): dense[
                i, j, k, m
            ][:, count[i, j, k, m].any(0)]
            for i, j, k, m in np.argwhere(count.any((4, 5)))
        },
    )


def read_step_scores(file: Path) -> pd.DataFrame:
    """step_scores.parquet: prompt, step, metric, value.

    Raises:
        ValueError: it is missing or unreadable; names the file.
    """
    if not file.is_file():
        raise ValueError(f"{file}: not found; `python -m tafs.correlate` writes it")
    try:
        table = pd.read_parquet(file, columns=["prompt", "step", "metric", "value"])
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: not a table of step scores ({reason})") from None
    if table.empty:
        raise ValueError(f"{file}: holds no scores")
    return table


class Result:
    """One run's folder, read when asked for."""

    def __init__(self, folder: Path | str) -> None:
        self.run = rundir.RunDir(Path(folder))

    @cached_property
    def info(self) -> dict[str, Any]:
        """run.json.

        Raises:
            ValueError: it is missing, broken or incomplete; names the file.
        """
        try:
            info = self.run.description
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
        for key in ("name", "method", "title", "backbone", "seed", "scale", "sampler"):
            if key not in info:
                raise ValueError(f"{self.run.folder / 'run.json'}: has no {key!r}")
        return info

    @property
    def variant(self) -> str:
        """The key in config.yaml's methods: a method's file with hyperparameters of its own."""
        return str(self.info.get("variant", self.info["method"]))

    @property
    def origin(self) -> dict[str, Any]:
        """The journal's fingerprint and provenance; {} of a run that is not trained.

        Raises:
            ValueError: see `iterations`.
        """
        if not self.iterations:
            return {}
        start = journal.read(self.run.journal)[0]
        return {key: start[key] for key in ("fingerprint", "provenance") if key in start}

    @cached_property
    def scores(self) -> Scores:
        return read_scores(self.run.scores)

    @cached_property
    def step_scores(self) -> pd.DataFrame:
        return read_step_scores(self.run.step_scores)

    @cached_property
    def iterations(self) -> list[dict[str, Any]]:
        """The journal's iterations; [] of a run that is not trained.

        Raises:
            ValueError: a trained run has none; names the file.
        """
        if not self.run.trained:
            return []
        if not self.run.journal.is_file():
            raise ValueError(f"{self.run.journal}: not found; `python -m tafs.train` writes it")
        found = journal.iterations(self.run.journal)
        if not found:
            raise ValueError(f"{self.run.journal}: holds no iteration")
        return found

    def seconds(self) -> list[float]:
        """Each iteration's time."""
        try:
            return [float(record["seconds"]["total"]) for record in self.iterations]
        except (KeyError, TypeError):
            raise ValueError(f"{self.run.journal}: an iteration has no seconds.total") from None


@dataclass(frozen=True)
class System:
    """Runs that differ in their training seed alone."""

    label: str
    results: tuple[Result, ...]  # sorted by seed

    @property
    def info(self) -> dict[str, Any]:
        return self.results[0].info

    @property
    def trained(self) -> bool:
        return self.results[0].run.trained

    @property
    def sampler(self) -> str:
        """The runs' own sampler for few steps."""
        return str(self.info["sampler"])

    def values(self, sampler: str, nfe: int, metric: str, iteration: int | None = None) -> Array:
        """[seeds, prompts, images] of the models after an iteration; None: the final ones.

        Raises:
            ValueError: a run was not scored so, or with other prompts; names its file.
        """
        arrays = []
        for result in self.results:
            scores = result.scores
            at = scores.final if iteration is None else iteration
            if (sampler, nfe, metric, at) not in scores.values:
                found = ", ".join(f"{s} {n}" for s, n in scores.settings())
                after = "" if iteration is None else f" after iteration {iteration}"
                raise ValueError(
                    f"{scores.file}: no {metric} for sampler {sampler} at nfe {nfe}{after} "
                    f"(has: {found})"
                )
            check_paired(scores, self.results[0].scores)
            arrays.append(scores.values[sampler, nfe, metric, at])
        return np.stack(arrays)


def check_paired(scores: Scores, other: Scores) -> None:
    """Raises ValueError, naming both files, unless both scored the same prompts and images."""
    for axis in ("prompts", "tags", "images"):
        if getattr(scores, axis) != getattr(other, axis):
            raise ValueError(f"{scores.file}: its {axis} are not those of {other.file}")


def read_results(folders: Iterable[Path | str]) -> list[Result]:
    """The runs' folders, each once.

    Raises:
        ValueError: there is none.
    """
    results = [Result(folder) for folder in dict.fromkeys(Path(f) for f in folders)]
    if not results:
        raise ValueError("no runs were given")
    return results


def select(results: Iterable[Result], where: Mapping[str, Any], label: str = "") -> System:
    """The runs whose run.json holds these values; "a.b" is key b of object a.

    Raises:
        ValueError: there is none, or two with the same seed.
    """
    seeds: dict[int, Result] = {}
    for result in results:
        if all(_lookup(result, key) == value for key, value in where.items()):
            other = seeds.setdefault(int(result.info["seed"]), result)
            if other is not result:
                raise ValueError(
                    f"{result.run.folder}: the same system and seed as {other.run.folder}"
                )
    if not seeds:
        wanted = ", ".join(f"{key} {value}" for key, value in where.items())
        raise ValueError(f"no run with {wanted} among the given ones")
    chosen = tuple(seeds[seed] for seed in sorted(seeds))
    return System(label or str(chosen[0].info["title"]), chosen)


def _lookup(result: Result, key: str) -> Any:
    value: Any = result.variant if key == "variant" else result.info
    for part in key.split(".") if key != "variant" else ():
        value = value.get(part) if isinstance(value, dict) else None
    return value


def systems(results: Sequence[Result]) -> list[System]:
    """Every system among the runs: base models first, then in the order of the runs."""
    keys = ("variant", "task", "backbone")
    found: dict[tuple[str, ...], System] = {}
    for result in sorted(results, key=lambda r: r.run.trained):
        where = {key: _lookup(result, key) for key in keys}
        if tuple(where.values()) not in found:
            found[tuple(where.values())] = select(results, where)
    backbones = {backbone for _, _, backbone in found}
    named = []
    for (variant, task, backbone), system in found.items():
        label = system.label
        namesakes = [w for w, s in found.items() if s.label == label and w[2] == backbone]
        if len({other for other, _, _ in namesakes}) > 1:
            label = f"{label} ({variant})"
        elif len(namesakes) > 1:
            label = f"{label} ({task})"
        if system.trained and len(backbones) > 1:
            label = f"{label} + {backbone}"
        named.append(System(label, system.results))
    return named


# --- A table ------------------------------------------------------------------------------------


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
    """Training compute in network evaluations per image of an iteration; see `Method.cost`."""
    iterations = system.info["iterations"] if row.iteration is None else row.iteration
    return float(system.info["cost"] * iterations) if system.trained else None


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


# --- Formats ------------------------------------------------------------------------------------


def write(
    table: Table, results: Sequence[Result], out_dir: Path | str, published: bool = False
) -> list[Path]:
    """Fill a table; write tables/NAME.csv, .md, .tex, .html, .parquet and provenance/NAME.json.

    Raises:
        ValueError: see `fill`.
    """
    lines = fill(table, results, published)
    texts = {
        "csv": _csv(table, lines, published),
        "md": _markdown(table, lines),
        "tex": _latex(table, lines),
        "html": _html(table, lines),
    }
    beside = [select(results, row.where) for row in table.beside]
    provenance = _provenance(table, lines, beside)
    folder = Path(out_dir) / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for ending, text in texts.items():
        file = folder / f"{table.name}.{ending}"
        file.write_text(text, encoding="utf-8", newline="\n")
        files.append(file)
    files.append(folder / f"{table.name}.parquet")
    pd.read_csv(io.StringIO(texts["csv"])).to_parquet(files[-1], index=False)
    files.append(Path(out_dir) / "provenance" / f"{table.name}.json")
    files[-1].parent.mkdir(exist_ok=True)
    files[-1].write_text(provenance, encoding="utf-8", newline="\n")
    return files


def _csv(table: Table, lines: Sequence[Line], published: bool) -> str:
    header = ["row", "variant", "backbone", "sampler", "nfe"]
    for column in table.columns:
        name = column.name
        header.append(name)
        if not isinstance(column, Number):
            extra = ("low", "high", "n_seeds", "n_images", "n_missing", "resampled", "best")
            header += [f"{name}_{field}" for field in extra]
        if published:
            header.append(f"{name}_published")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for line in lines:
        first = line.system.results[0]
        fields: list[Any] = [line.system.label, first.variant, first.info["backbone"]]
        fields += [line.sampler, line.row.nfe]
        for cell in line.cells:
            fields.append(_exact(cell.value))
            if cell.estimate:
                e = cell.estimate
                fields += [_exact(e.low), _exact(e.high), e.n_seeds, e.n_images, e.n_missing]
                fields += [e.resampled, int(cell.best)]
            if published:
                fields.append(cell.published or "")
        writer.writerow(fields)
    return out.getvalue()


def _exact(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.10g}"


def _markdown(table: Table, lines: Sequence[Line]) -> str:
    header = [table.header, "Steps", *(_title(column) for column in table.columns), "Seeds"]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for line in lines:
        cells = [_cell(cell, "**{}**", "{}") for cell in line.cells]
        label = escape(line.system.label, MARKDOWN)
        rows.append([label, str(line.row.nfe), *cells, str(len(line.system.results))])
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = "\n".join(f"- {escape(note, MARKDOWN)}" for note in _notes(table, lines))
    caption = escape(table.caption, MARKDOWN)
    interval = "Brackets hold 95 % intervals."
    return f"{caption}\n\n{body}\n\n- {interval}\n{notes}\n"


def _cell(cell: Cell, bold: str, small: str) -> str:
    """A value, its interval and what is published; `bold` and `small` are formats of a field."""
    if cell.value is None:
        return "–"
    text = f"{cell.value:.{cell.digits}f}"
    text = bold.format(text) if cell.best else text
    if cell.estimate and math.isfinite(cell.estimate.low):
        low, high = (f"{x:.{cell.digits}f}" for x in (cell.estimate.low, cell.estimate.high))
        text += " " + small.format(f"[{low}, {high}]")
    if cell.published is not None:
        text += " " + small.format(f"(paper: {cell.published})")
    return text


STYLE = (
    "body{font:14px sans-serif;margin:2em}caption{text-align:left;margin-bottom:.6em}"
    "table{border-collapse:collapse}th,td{padding:.3em .8em;text-align:right;white-space:nowrap}"
    "th:first-child,td:first-child{text-align:left}thead th{border-bottom:1px solid}"
    "tr.rule td{border-top:1px solid #bbb}small{color:#666}"
)


def _html(table: Table, lines: Sequence[Line]) -> str:
    """One page without scripts or other files."""
    titles = [html.escape(table.header), "Steps"]
    titles += [_title(column, plain=html.escape) for column in table.columns]
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = []
    for line in lines:
        fields = [html.escape(line.system.label), str(line.row.nfe)]
        fields += [_cell(cell, "<b>{}</b>", "<small>{}</small>") for cell in line.cells]
        fields.append(str(len(line.system.results)))
        kind = ' class="rule"' if line.row.rule else ""
        body.append(f"<tr{kind}>{''.join(f'<td>{field}</td>' for field in fields)}</tr>")
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in _notes(table, lines))
    caption = html.escape(table.caption)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{table.name}</title>'
        f"<style>{STYLE}</style><table><caption>{caption}</caption>"
        f"<thead><tr>{head}<th>Seeds</th></tr></thead><tbody>\n"
        + "\n".join(body)
        + f"\n</tbody></table><ul><li>Brackets hold 95 % intervals.</li>{notes}</ul></html>\n"
    )


def _latex(table: Table, lines: Sequence[Line]) -> str:
    """A table* for booktabs; the values' intervals as half their width."""
    header = [table.header, "Steps", *(_title(column, latex=True) for column in table.columns)]
    header.append("Seeds")
    notes = [escape(note, LATEX) for note in _notes(table, lines)]
    beside = any(cell.published is not None for line in lines for cell in line.cells)
    notes.insert(0, r"$\pm$: half the width of the 95\,\% interval.")
    if beside:
        notes.insert(1, "In parentheses: the published value.")
    body: list[str] = []
    for line in lines:
        cells = [_latex_cell(cell) for cell in line.cells]
        label = escape(line.system.label, LATEX)
        if line.row.rule and body:  # the header has one of its own
            body.append(r"\midrule")
        fields = [label, str(line.row.nfe), *cells, str(len(line.system.results))]
        body.append(" & ".join(fields) + r" \\")
    return "\n".join(
        [
            r"\begin{table*}[t]",
            r"\centering\footnotesize",
            r"\setlength{\tabcolsep}{3.5pt}",
            rf"\caption{{{escape(table.caption, LATEX)} {' '.join(notes)}}}",
            rf"\label{{tab:{table.name}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table*}",
            "",
        ]
    )


def _latex_cell(cell: Cell) -> str:
    if cell.value is None:
        text = "--"
    else:
        number = f"{cell.value:.{cell.digits}f}"
        text = rf"\textbf{{{number}}}" if cell.best else number
        text = text.replace("-", "$-$")
    if cell.estimate and math.isfinite(cell.estimate.low):
        half = (cell.estimate.high - cell.estimate.low) / 2
        text += rf"{{\tiny\,$\pm$\,{half:.{cell.digits}f}}}"
    if cell.published is not None:
        text += rf" {{\tiny({cell.published})}}"
    return text


def _title(column: Column, latex: bool = False, plain: Callable[[str], str] | None = None) -> str:
    if isinstance(column, Number) and latex:
        return column.latex
    if isinstance(column, Score):
        return rf"{column.title} $\uparrow$" if latex else f"{column.title} ↑"
    return plain(column.title) if plain else escape(column.title, LATEX if latex else MARKDOWN)


def _notes(table: Table, lines: Sequence[Line]) -> list[str]:
    """What a reader must know about the statistics."""
    notes = list(table.notes)
    scored = any(isinstance(column, Score) for column in table.columns)
    if scored:
        scores = lines[0].system.results[0].scores
        notes.append(
            f"Per seed: {len(scores.prompts)} prompts, {len(scores.images)} images of each."
        )
    cells = [cell for line in lines for cell in line.cells if cell.estimate]
    kinds = {cell.estimate.resampled for cell in cells if cell.estimate}
    if "seeds and prompts" in kinds:
        both = "seeds and of prompts within their task; with one seed, of prompts only"
        notes.append(f"Intervals: {stats.RESAMPLES:,} resamples of {both}.")
    elif "prompts" in kinds and scored:
        notes.append(
            f"Intervals: {stats.RESAMPLES:,} resamples of prompts within their task, not of seeds."
        )
    elif "prompts" in kinds:
        notes.append(f"Intervals: {stats.RESAMPLES:,} resamples of prompts.")
    if any(cell.best for cell in cells):
        notes.append(
            "Bold: better than every other row, by paired differences over the same prompts and "
            "start noise, at 5 % after Holm's correction."
        )
    elif scored and cells:
        notes.append("No value is bold: in no column is one row surely better than all others.")
    for i, column in enumerate(table.columns):
        estimates = [e for line in lines if (e := line.cells[i].estimate)]
        missing = sum(e.n_missing for e in estimates)
        total = missing + sum(e.n_images for e in estimates)
        if missing:
            notes.append(
                f"Missing and left out: {missing:,} of {total:,} values of {column.title}."
            )
    return notes


def _provenance(table: Table, lines: Sequence[Line], beside: Sequence[System]) -> str:
    """What every cell came from: the runs, their files' digests, code and settings."""
    runs = {
        str(result.info["name"]): {
            "method": result.info["method"],
            "seed": result.info["seed"],
            "scale": result.info["scale"],
            "sha256": {
                file.name: hashlib.sha256(file.read_bytes()).hexdigest()
                for file in (result.run.adapter, result.run.scores, result.run.step_scores)
                if file.is_file()
            },
            **result.origin,
        }
        for system in (*beside, *(line.system for line in lines))
        for result in system.results
    }
    record = {
        "table": table.name,
        "rows": [
            {
                "row": line.system.label,
                "runs": [result.info["name"] for result in line.system.results],
                "sampler": line.sampler,
                "nfe": line.row.nfe,
                "iteration": line.row.iteration,
                "cells": {
                    column.name: _cell_record(cell)
                    for column, cell in zip(table.columns, line.cells, strict=True)
                },
            }
            for line in lines
        ],
        "runs": runs,
        "statistics": {"level": stats.LEVEL, "resamples": stats.RESAMPLES},
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def _cell_record(cell: Cell) -> dict[str, Any]:
    estimate = cell.estimate
    counts = (
        {k: getattr(estimate, k) for k in ("n_seeds", "n_images", "n_missing", "resampled")}
        if estimate
        else {}
    )
    return {"value": cell.value, **counts}


MARKDOWN = {c: f"\\{c}" for c in "\\`*_|<>[]"}
LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def escape(text: str, special: Mapping[str, str]) -> str:
    """The text with MARKDOWN's or LATEX's special characters made literal."""
    return "".join(special.get(character, character) for character in text)


# --- An experiment's table -----------------------------------------------------------------------


def comparison(
    spec: Mapping[str, Any],
    run_dirs: Iterable[Path | str],
    out_dir: Path | str,
    *,
    scale: str | None = None,
) -> list[Path]:
    """The table of an experiment, an entry of `config.tables`, of its kind.

    Args:
        run_dirs: the folders of the rows' runs.
        scale: None takes the runs' own; the paper's values stand beside ours only where it is
            "paper".

    Returns:
        The written files.

    Raises:
        ValueError: an input is missing or broken; names it.
    """
    results = read_results(run_dirs)
    if scale is None:
        scale = _common_scale(results)
    table = BUILD[spec["kind"]](spec, results)
    return write(table, results, out_dir, published=scale == "paper")


def _scores_table(spec: Mapping[str, Any], results: Sequence[Result]) -> Table:
    """Counts, times and all metrics."""
    columns: list[Column] = [NFE_OLD, NFE_THETA, TIME, *map(Score, metrics_of(results))]
    return Table(spec["name"], spec["caption"], _rows(spec), columns, header=spec["header"])


def _compute_table(spec: Mapping[str, Any], results: Sequence[Result]) -> Table:
    """All metrics after a share of the training."""
    columns: list[Column] = [ITERATIONS, COMPUTE, *map(Score, metrics_of(results))]
    note = (
        "Evaluations: forward passes of the network per image of an iteration, times iterations; "
        "one with gradients counts three. The number of iterations is the largest that the budget "
        "pays for, and at most that of the whole training."
    )
    return Table(
        spec["name"], spec["caption"], _rows(spec), columns, header=spec["header"], notes=[note]
    )


IN_DOMAIN = ("pickscore", "clip")
OUT_OF_DOMAIN = ("hpsv2", "imagereward", "unifiedreward")


def _gains_table(spec: Mapping[str, Any], results: Sequence[Result]) -> Table:
    """Interquartile gains on the base model, and how often a prompt gets better."""
    rows = _rows(spec)
    bases = {row.where["backbone"]: row for row in rows if row.where["variant"] == config.BASE}
    trained = [row for row in rows if row.where["variant"] != config.BASE]
    rivals = {
        row.where["backbone"]: row for row in trained if row.where["variant"] == spec["reference"]
    }
    for row in trained:
        if row.where["backbone"] not in bases:
            raise ValueError(
                f"{spec['name']}: no base model {row.where['backbone']!r}; set base: true"
            )

    def values(row: Row, metrics: Sequence[str]) -> list[Array]:
        system = select(results, row.where)
        return [system.values(row.sampler or system.sampler, row.nfe, m) for m in metrics]

    def gain(metrics: Sequence[str]) -> Callable[[System, Row], stats.Estimate]:
        def estimate(system: System, row: Row) -> stats.Estimate:
            base = bases[row.where["backbone"]]
            tags = system.results[0].scores.tags
            check_paired(system.results[0].scores, select(results, base.where).results[0].scores)
            return stats.interquartile_effect(values(row, metrics), values(base, metrics), tags)

        return estimate

    def improvement(others: Mapping[str, Row]) -> Callable[[System, Row], stats.Estimate]:
        def estimate(system: System, row: Row) -> stats.Estimate:
            other = others.get(row.where["backbone"])
            if other is None or other is row:  # no rival, or the rival itself
                nan = float("nan")
                return stats.Estimate(nan, nan, nan, 0, 0, 0, "", 1.0)
            tags = system.results[0].scores.tags
            return stats.probability_of_improvement(values(row, known), values(other, known), tags)

        return estimate

    known = metrics_of(results)
    rival = select(results, rivals[next(iter(rivals))].where).label if rivals else ""
    columns: list[Column] = [
        Statistic("iqm_in_domain", "Trained rewards", 2, gain(IN_DOMAIN)),
        Statistic("iqm_out_of_domain", "Other rewards", 2, gain(OUT_OF_DOMAIN)),
        Statistic("iqm_all", "All metrics", 2, gain(known)),
        Statistic("better_than_base", "P(better than base)", 3, improvement(bases)),
    ]
    if rivals:
        title = f"P(better than {rival})"
        columns.append(Statistic("better_than_reference", title, 3, improvement(rivals)))
    names = {
        group: ", ".join(METRICS[m].title for m in metrics)
        for group, metrics in (("Trained rewards", IN_DOMAIN), ("Other rewards", OUT_OF_DOMAIN))
    }
    notes = [
        "Gains on the base model at the same steps, in standard deviations of its prompts: the "
        "interquartile mean over seeds and metrics.",
        *(f"{group}: {metrics}." for group, metrics in names.items()),
        "P: how often a prompt's images are better, over all metrics and pairs of seeds; ties "
        "count half.",
    ]
    beside = list(bases.values())
    return Table(spec["name"], spec["caption"], trained, columns, spec["header"], notes, beside)


def _correlation_table(spec: Mapping[str, Any], results: Sequence[Result]) -> Table:
    """Pearson's r of earlier images' rewards with the final image's, a row a step."""
    rows = []
    for row in _rows(spec):
        scores = select(results, row.where).results[0].step_scores
        last = int(scores["step"].max())
        several = len({r["backbone"] for r in spec["rows"]}) > 1
        for step in range(2, last):
            label = f"R{step} with R{last}" + (f", {row.label}" if several else "")
            rows.append(replace(row, label=label, nfe=step, published=label, sampler="anneal"))

    def correlation(metric: str) -> Callable[[System, Row], stats.Estimate]:
        return lambda system, row: step_correlation(system.results[0], metric, row.nfe)

    known = set(results[0].step_scores["metric"])
    columns = [
        Statistic(f"{m}_r", METRICS[m].title, 2, correlation(m), f"{m}_r")
        for m in METRICS
        if m in known
    ]
    prompts = results[0].step_scores["prompt"].nunique()
    note = (
        f"Pearson's r over {prompts:,} training prompts, one annealed trajectory of each; R2 is "
        "the reward of the image at the second evaluation. GenEval is the graded training reward."
    )
    return Table(spec["name"], spec["caption"], rows, columns, spec["header"], [note])


def step_correlation(result: Result, metric: str, step: int) -> stats.Estimate:
    """Pearson's r of the reward of a step's image with that of the final image.

    Raises:
        ValueError: the run has no such metric or step; names the file.
    """
    scores = result.step_scores
    table = scores[scores["metric"] == metric].pivot(index="prompt", columns="step", values="value")
    if step not in table.columns:
        raise ValueError(f"{result.run.step_scores}: no {metric} of step {step}")
    return stats.correlation(table[step].to_numpy(), table.iloc[:, -1].to_numpy())


BUILD: Mapping[str, Callable[[Mapping[str, Any], Sequence[Result]], Table]] = {
    "scores": _scores_table,
    "compute": _compute_table,
    "gains": _gains_table,
    "correlation": _correlation_table,
}


def _rows(spec: Mapping[str, Any]) -> list[Row]:
    return [
        Row(
            where={key: row[key] for key in ("variant", "task", "backbone")},
            nfe=row["nfe"],
            sampler=row["sampler"],
            label=row["label"],
            iteration=row["iteration"],
            published=row["label"],
            first=_first_of_its_runs(row, spec["rows"]),
            rule=row["rule"],
        )
        for row in spec["rows"]
    ]


def metrics_of(results: Sequence[Result]) -> list[str]:
    """Those of METRICS that any of the runs was scored with, in their order."""
    known = {metric for result in results for metric in result.scores.metrics()}
    return [metric for metric in METRICS if metric in known]


def _first_of_its_runs(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    keys = ("variant", "task", "backbone")
    return next(r for r in rows if all(r[key] == row[key] for key in keys)) is row


def _common_scale(results: Sequence[Result]) -> str:
    first = results[0]
    for result in results:
        if result.info["scale"] != first.info["scale"]:
            raise ValueError(
                f"{result.run.folder}: scale {result.info['scale']!r}, but {first.run.folder} has "
                f"{first.info['scale']!r}"
            )
    return str(first.info["scale"])
