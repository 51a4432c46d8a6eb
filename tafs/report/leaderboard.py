"""The finished tables of a scale, as rows to print, to sort or to pass on."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tafs.common.files import check_readable
from tafs.common.yaml_files import ConfigError, suggestion
from tafs.rewards.metrics import METRICS

GAINS, SCORES = "gains", "scores"  # kinds of tables
OVERALL = "iqm_all"  # of a table of gains: all metrics in one number
FIELDS = ("value", "low", "high", "n_seeds", "n_images", "best")
DIGITS = 3  # of columns that are not metrics


@dataclass(frozen=True)
class Board:
    """A table of ROOT/tables, with the columns that have intervals."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]

    @property
    def methods(self) -> int:
        return len({row["variant"] for row in self.rows})

    def ranked(self, column: str) -> Board:
        """The best row of a column first; rows without a value are left out."""
        known = [row for row in self.rows if row["metrics"][column]["value"] is not None]
        best_first = higher_is_better(column)
        known.sort(key=lambda row: row["metrics"][column]["value"], reverse=best_first)
        return Board(self.name, self.columns, tuple(known))


def higher_is_better(column: str) -> bool:
    """The direction of a column: a metric's own; all other estimates are gains."""
    return METRICS[column].higher_is_better if column in METRICS else True


def shown(column: str, numbers: Mapping[str, Any]) -> tuple[str, str]:
    """(value, interval) of a cell as text; `*` marks a value that is surely the best."""
    digits = METRICS[column].digits if column in METRICS else DIGITS
    value, low, high = (numbers[name] for name in FIELDS[:3])
    if value is None:
        return "-", ""
    interval = "" if low is None else f"[{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f}{'*' if numbers['best'] else ''}", interval


def headline(root: Path, kinds: Mapping[str, str], name: str | None = None) -> Board:
    """A finished table: by default the gains, else the one that compares the most methods.

    Args:
        root: the folder of a scale's results.
        kinds: the kind of each experiment of config.yaml, in their order.
        name: of another table.

    Raises:
        FileNotFoundError: there are no finished tables; names the command that builds them.
        ConfigError: there is no such table.
        ValueError: a file is not a table of this version; names it.
    """
    found = _read(root)
    if name is not None:
        if name not in found:
            raise ConfigError(f"--table: {root} has no {name!r}{suggestion(name, list(found))}")
        return found[name]
    return _first(found, kinds) or next(iter(found.values()))


def ranking(
    root: Path, kinds: Mapping[str, str], name: str | None = None, column: str | None = None
) -> tuple[Board, str]:
    """(a table sorted by a column, the column); the arguments and errors are those of `headline`.

    Args:
        column: a metric, or another column with intervals; by default all metrics' gains, else the
            table's first one. Without `name`, the table is the first choice of those that have it.
    """
    board = headline(root, kinds, name)
    if column is None:
        column = OVERALL if OVERALL in board.columns else board.columns[0]
    elif column not in board.columns:
        others = {} if name else _read(root)
        fitting = {key: one for key, one in others.items() if column in one.columns}
        if not fitting:
            known = {c for one in (others.values() if others else [board]) for c in one.columns}
            raise ConfigError(f"--metric: unknown metric {column!r}{suggestion(column, [*known])}")
        board = _first(fitting, kinds) or next(iter(fitting.values()))
    return board.ranked(column), column


def _first(found: Mapping[str, Board], kinds: Mapping[str, str]) -> Board | None:
    """The gains, or of the scores the table with the most methods; None without either."""
    for kind in (GAINS, SCORES):
        if own := [found[key] for key in kinds if key in found and kinds[key] == kind]:
            return max(own, key=lambda board: board.methods)
    return None


def _read(root: Path) -> dict[str, Board]:
    files = sorted((root / "tables").glob("*.csv"))
    if not files:
        raise FileNotFoundError(
            f"{root / 'tables'}: holds no finished tables; `tafs run --scale {root.name}` builds "
            "them"
        )
    found = {file.stem: _board(file) for file in files}
    return {name: board for name, board in found.items() if board.columns}


def _board(file: Path) -> Board:
    check_readable(file)
    with file.open(newline="", encoding="utf-8") as opened:
        reader = csv.DictReader(opened)
        head = list(reader.fieldnames or ())
        columns = tuple(name for name in head if f"{name}_low" in head)
        try:
            rows = tuple(_row(line, columns) for line in reader)
        except (KeyError, ValueError, TypeError):
            raise ValueError(
                f"{file}: is not a table of this version; build the report again"
            ) from None
    return Board(file.stem, columns, rows)


def _row(line: Mapping[str, str], columns: tuple[str, ...]) -> dict[str, Any]:
    names = ("row", "variant", "backbone", "sampler")
    numbers = {
        column: {
            field: _number(line[column if field == "value" else f"{column}_{field}"])
            for field in FIELDS
        }
        for column in columns
    }
    return {**{name: line[name] for name in names}, "nfe": int(line["nfe"]), "metrics": numbers}


def _number(text: str) -> float | int | None:
    if not text:
        return None
    value = float(text)
    return None if not math.isfinite(value) else int(text) if text.isdigit() else value
