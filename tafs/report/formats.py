"""Tables as files, with the provenance of every cell.

Each table is written as CSV and Parquet (every number with its interval and counts), as Markdown,
LaTeX (booktabs) and HTML, and its provenance as JSON: the runs, files and settings behind each
cell. Equal input gives equal bytes.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler
from pandas.io.formats.style_render import CSSDict

from tafs.common.files import sha256
from tafs.report import latex, stats
from tafs.report.tables import Cell, Column, Line, Number, Score, Table, samplers_of
from tafs.rewards.metrics import METRICS

COUNTS = ("n_seeds", "n_images", "n_missing", "resampled")
ESTIMATE = ("low", "high", *COUNTS)  # fields of an estimate in the CSV
BRACKETS = "Brackets hold 95 % intervals."


def write(
    table: Table, lines: Sequence[Line], out_dir: Path, published: bool = False
) -> list[Path]:
    """Write tables/NAME.csv, .md, .tex, .html, .parquet and provenance/NAME.json.

    Args:
        lines: the table's, of `fill`.
        published: whether they hold the paper's values.
    """
    found = texts(table, lines, published)
    files = {
        out_dir / "provenance" / f"{table.name}.json"
        if ending == "json"
        else out_dir / "tables" / f"{table.name}.{ending}": text
        for ending, text in found.items()
    }
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", newline="\n")
    csv_text = found["csv"]
    parquet = out_dir / "tables" / f"{table.name}.parquet"
    labels = [row["row"] for row in csv.DictReader(io.StringIO(csv_text))]  # one may be "NaN" or 5
    frame = pd.read_csv(io.StringIO(csv_text)).assign(row=labels)
    frame.to_parquet(parquet, index=False)
    return [*files, parquet]


def texts(table: Table, lines: Sequence[Line], published: bool = False) -> dict[str, str]:
    """Return a filled table as csv, md, tex and html, and its provenance as json."""
    systems = [*table.beside, *(line.row.system for line in lines)]
    results = [result for system in systems for result in system.results]
    random = sorted(set[str]().union(*(result.random_weights for result in results)))
    if random:
        note = f"Randomly initialised: {', '.join(random)}. These numbers are not results."
        caption = f"RANDOM WEIGHTS: {table.caption}"
        table = replace(table, caption=caption, notes=[note, *table.notes])
    return {
        "csv": _csv(table, lines, published, random),
        "md": _markdown(table, lines),
        "tex": _latex(table, lines),
        "html": _html(table, lines),
        "json": _provenance(table, lines),
    }


def _csv(table: Table, lines: Sequence[Line], published: bool, random: Sequence[str]) -> str:
    header = ["row", "variant", "backbone", "sampler", "nfe"]
    for column in table.columns:
        extra = [*ESTIMATE, "best"] if not isinstance(column, Number) else []
        extra += ["published"] if published else []
        header += [column.name, *(f"{column.name}_{field}" for field in extra)]
    header += ["random_weights"] if random else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for line in lines:
        row = line.row.spec
        # A spreadsheet would take the label for a formula.
        label = f"'{row.label}" if row.label.startswith(("=", "+", "-", "@")) else row.label
        fields: list[Any] = [label, row.variant, row.backbone, row.sampler, row.nfe]
        for cell in line.cells:
            fields.append(_exact(cell.value))
            if cell.estimate:
                fields += [_exact(getattr(cell.estimate, field)) for field in ESTIMATE]
                fields.append(int(cell.best))
            if published:
                fields.append(cell.published or "")
        fields += [" ".join(random)] if random else []
        writer.writerow(fields)
    return out.getvalue()


def _exact(value: Any) -> Any:
    """A number as its shortest text of ten digits; None and NaN are empty."""
    if not isinstance(value, float):
        return value
    return f"{value:.10g}" if math.isfinite(value) else ""


def _markdown(table: Table, lines: Sequence[Line]) -> str:
    titles = (_title(column, markdown) for column in table.columns)
    header = [markdown(table.header), "Steps", *titles, "Seeds"]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for line in lines:
        cells = [_cell(cell, "**{}**", "{}") for cell in line.cells]
        label = markdown(line.row.spec.label)
        rows.append([label, str(line.row.spec.nfe), *cells, _seeds(line)])
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = [f"- {markdown(note)}" for note in [BRACKETS, *notes_of(table, lines)]]
    return "\n\n".join([markdown_line(table.caption), body, "\n".join(notes)]) + "\n"


def _cell(cell: Cell, bold: str, small: str) -> str:
    """A value, its interval and the published value; `bold` and `small` are format strings."""
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


def _seeds(line: Line) -> str:
    return str(len(line.row.system.results))


def _styled(
    table: Table,
    lines: Sequence[Line],
    title: Callable[[Column], str],
    plain: Callable[[str], str],
    cell: Callable[[Cell], str],
) -> Styler:
    """The table with pandas' Styler, its cells rendered."""
    titles = [plain(table.header), "Steps", *map(title, table.columns), "Seeds"]
    rows = [
        [plain(row.label), str(row.nfe), *map(cell, line.cells), _seeds(line)]
        for line in lines
        for row in [line.row.spec]
    ]
    return Styler(pd.DataFrame(rows, columns=titles), uuid="t", cell_ids=False).hide(axis="index")


HTML_STYLE: list[CSSDict] = [
    {"selector": "", "props": "border-collapse:collapse;font:14px sans-serif;margin:2em"},
    {"selector": "caption", "props": "text-align:left;margin-bottom:.6em"},
    {"selector": "th, td", "props": "padding:.3em .8em;text-align:right;white-space:nowrap"},
    {"selector": "th:first-child, td:first-child", "props": "text-align:left"},
    {"selector": "thead th", "props": "border-bottom:1px solid"},
    {"selector": "small", "props": "color:#666"},
]


def _html(table: Table, lines: Sequence[Line]) -> str:
    """One page without scripts or other files."""
    styled = _styled(
        table,
        lines,
        lambda column: _title(column, html.escape),
        html.escape,
        lambda cell: _cell(cell, "<b>{}</b>", "<small>{}</small>"),
    )
    notes = [BRACKETS, *notes_of(table, lines)]
    items = "".join(f"<br>{html.escape(note)}" for note in notes)
    styled.set_caption(f"{html.escape(table.caption)}<small>{items}</small>")
    ruled = [
        {"selector": f"tbody tr:nth-child({i}) td", "props": "border-top:1px solid #bbb"}
        for i, line in enumerate(lines, start=1)
        if line.row.spec.rule
    ]
    styled.set_table_styles([*HTML_STYLE, *ruled])
    page = str(styled.to_html(doctype_html=True, encoding="utf-8"))
    return page.replace("<head>", f"<head>\n<title>{html.escape(table.name)}</title>", 1)


def _latex(table: Table, lines: Sequence[Line]) -> str:
    """A table* for booktabs; intervals are given as half their width."""

    styled = _styled(table, lines, _latex_title, latex.escape, _latex_cell)
    notes = [r"$\pm$: half the width of the 95\,\% interval."]
    if any(cell.published is not None for line in lines for cell in line.cells):
        notes.append("In parentheses: the published value.")
    notes += map(latex.escape, notes_of(table, lines))
    # Styler prints these as commands before the tabular.
    styled.set_table_styles(
        [
            {"selector": "footnotesize", "props": ":;"},
            {"selector": "setlength", "props": r":{\tabcolsep}{3.5pt};"},
        ]
    )
    text = styled.to_latex(
        environment="table*",
        position="t",
        position_float="centering",
        hrules=True,
        column_format="l" + "r" * (len(table.columns) + 2),
        caption=f"{latex.escape(table.caption)} {' '.join(notes)}",
        label=f"tab:{table.name}",
    )
    return latex.header(text) + _with_rules(text, lines)


def _with_rules(text: str, lines: Sequence[Line]) -> str:
    """Add a \\midrule above the rows that have one; the header has its own."""
    printed = text.splitlines()
    first = printed.index(r"\midrule") + 1
    for place in reversed([i for i, line in enumerate(lines) if i and line.row.spec.rule]):
        printed.insert(first + place, r"\midrule")
    return "\n".join(printed) + "\n"


def _latex_cell(cell: Cell) -> str:
    number = "--" if cell.value is None else f"{cell.value:.{cell.digits}f}".replace("-", "$-$")
    text = rf"\textbf{{{number}}}" if cell.best else number
    if cell.estimate and math.isfinite(cell.estimate.low):
        half = (cell.estimate.high - cell.estimate.low) / 2
        text += rf"{{\tiny\,$\pm$\,{half:.{cell.digits}f}}}"
    if cell.published is not None:
        text += rf" {{\tiny({cell.published})}}"
    return text


def _title(column: Column, plain: Callable[[str], str]) -> str:
    title = plain(column.title)
    if not isinstance(column, Score):
        return title
    return f"{title} {'↑' if METRICS[column.metric].higher_is_better else '↓'}"


def _latex_title(column: Column) -> str:
    if isinstance(column, Number):
        return column.latex
    title = latex.escape(column.title)
    if not isinstance(column, Score):
        return title
    arrow = "up" if METRICS[column.metric].higher_is_better else "down"
    return rf"{title} $\{arrow}arrow$"


def notes_of(table: Table, lines: Sequence[Line]) -> list[str]:
    """How the numbers were computed."""
    notes = list(table.notes)
    scored = any(isinstance(column, Score) for column in table.columns)
    if scored:
        scores = lines[0].row.system.scores
        images = len(scores.images)
        each = f"{images} images of each" if images > 1 else "one image of each"
        notes.append(f"Per seed: {len(scores.prompts)} prompts, {each}.")
    cells = [cell for line in lines for cell in line.cells if cell.estimate]
    kinds = {cell.estimate.resampled for cell in cells if cell.estimate}
    if "seeds and prompts" in kinds or "prompts" in kinds:
        units = "prompts within their task, not of seeds" if scored else "prompts"
        if "seeds and prompts" in kinds:
            units = "prompts within their task, and a t distribution over seeds where several are"
        notes.append(f"Intervals: {stats.RESAMPLES:,} resamples of {units}.")
    if any(cell.best for cell in cells):
        notes.append(
            "Bold: better than every other row, by paired differences over the same prompts and "
            "start noise, at 5 % each."
        )
    elif scored and cells and len(lines) > 1:
        single = any(
            line.row.system.spec.trained and len(line.row.system.results) < 2 for line in lines
        )
        why = "some models were trained with one seed" if single else "no row is surely the best"
        notes.append(f"No value is bold: {why}.")
    for i, column in enumerate(table.columns):
        estimates = [e for line in lines if (e := line.cells[i].estimate)]
        missing = sum(e.n_missing for e in estimates)
        total = missing + sum(e.n_images for e in estimates)
        if missing:
            notes.append(
                f"Missing and left out: {missing:,} of {total:,} values of {column.title}."
            )
    return notes


def _provenance(table: Table, lines: Sequence[Line]) -> str:
    """Where every cell came from: the runs, the digests of their files, code and settings."""
    systems = [*table.beside, *(line.row.system for line in lines)]
    runs = {
        result.spec.name: {
            "method": result.spec.method,
            "seed": result.spec.seed,
            "scale": result.spec.scale,
            "sha256": {file.name: sha256(file) for file in result.files},
            "prompts": {
                "set": result.spec.prompts,
                "files": result.spec.prompt_files,
                "sha256": result.spec.weights.get(f"prompts.{result.spec.prompts}"),
            },
            "metrics": result.evaluation.weights,
            **result.origin,
        }
        for result in dict.fromkeys(result for system in systems for result in system.results)
    }
    record = {
        "table": table.name,
        "rows": [
            {
                "row": row.label,
                "runs": [result.spec.name for result in line.row.system.results],
                "sampler": row.sampler,
                "samplers": samplers_of(line.row),
                "nfe": row.nfe,
                "iteration": row.iteration,
                "cells": {
                    column.name: {
                        "value": cell.value,
                        **{
                            field: getattr(cell.estimate, field)
                            for field in COUNTS
                            if cell.estimate
                        },
                    }
                    for column, cell in zip(table.columns, line.cells, strict=True)
                },
            }
            for line in lines
            for row in [line.row.spec]
        ],
        "runs": runs,
        "statistics": {"level": stats.LEVEL, "resamples": stats.RESAMPLES},
        **table.details,
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


MARKDOWN = {c: f"\\{c}" for c in "\\`*_|<>[]#~$&"}
# At the start of a line these make a list, a heading or a rule.
_STARTS = re.compile(r"(\d*)([-+=:.)])")


def markdown(text: str) -> str:
    """The text with Markdown's special characters escaped, for the middle of a line or a cell."""
    return "".join(MARKDOWN.get(character, character) for character in text)


def markdown_line(text: str) -> str:
    """The text as a line of Markdown."""
    return (
        _STARTS.sub(r"\1\\\2", markdown(text), count=1) if _STARTS.match(text) else markdown(text)
    )
