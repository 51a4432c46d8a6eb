"""Tables as files, and where every cell came from.

Each table is written as CSV and Parquet (every number with its interval and counts, for machines),
Markdown, LaTeX (booktabs) and HTML, and its provenance as JSON: the runs, files and settings that
each cell came from. Equal input gives equal bytes.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from tafs.common.files import sha256
from tafs.report import stats
from tafs.report.results import Result, System, select
from tafs.report.tables import Cell, Column, Line, Number, Score, Table, fill


def write(
    table: Table, results: Sequence[Result], out_dir: Path | str, published: bool = False
) -> list[Path]:
    """Fill a table; write tables/NAME.csv, .md, .tex, .html, .parquet and provenance/NAME.json.

    Raises:
        ValueError: see `fill`.
    """
    lines = fill(table, results, published)
    shown = [result for line in lines for result in line.system.results]
    random = sorted(set[str]().union(*(result.random_weights for result in shown)))
    if random:
        note = f"Randomly initialised: {', '.join(random)}. These numbers are no results."
        caption = f"RANDOM WEIGHTS: {table.caption}"
        table = replace(table, caption=caption, notes=[note, *table.notes])
    texts = {
        "csv": _csv(table, lines, published, random),
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


def _csv(table: Table, lines: Sequence[Line], published: bool, random: Sequence[str]) -> str:
    header = ["row", "variant", "backbone", "sampler", "nfe"]
    for column in table.columns:
        name = column.name
        header.append(name)
        if not isinstance(column, Number):
            extra = ("low", "high", "n_seeds", "n_images", "n_missing", "resampled", "best")
            header += [f"{name}_{field}" for field in extra]
        if published:
            header.append(f"{name}_published")
    header += ["random_weights"] if random else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for line in lines:
        first = line.system.results[0]
        fields: list[Any] = [_no_formula(line.system.label), first.variant, first.info["backbone"]]
        fields += [line.sampler, line.row.nfe]
        for cell in line.cells:
            fields.append(_exact(cell.value))
            if cell.estimate:
                e = cell.estimate
                fields += [_exact(e.low), _exact(e.high), e.n_seeds, e.n_images, e.n_missing]
                fields += [e.resampled, int(cell.best)]
            if published:
                fields.append(cell.published or "")
        fields += [" ".join(random)] if random else []
        writer.writerow(fields)
    return out.getvalue()


def _no_formula(text: str) -> str:
    """A spreadsheet would calculate what begins like a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _exact(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.10g}"


def _markdown(table: Table, lines: Sequence[Line]) -> str:
    titles = (_title(column) for column in table.columns)
    header = [escape(table.header, MARKDOWN), "Steps", *titles, "Seeds"]
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
    titles = (_title(column, latex=True) for column in table.columns)
    header = [escape(table.header, LATEX), "Steps", *titles, "Seeds"]
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
        single = any(line.system.trained and len(line.system.results) < 2 for line in lines)
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


def _provenance(table: Table, lines: Sequence[Line], beside: Sequence[System]) -> str:
    """What every cell came from: the runs, their files' digests, code and settings."""
    runs = {
        str(result.info["name"]): {
            "method": result.info["method"],
            "seed": result.info["seed"],
            "scale": result.info["scale"],
            "sha256": {
                file.name: sha256(file)
                for file in (result.run.adapter, result.run.scores, result.run.trajectory_rewards)
                if file.is_file()
            },
            "metrics": result.run.evaluation.get("weights", {}),
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
