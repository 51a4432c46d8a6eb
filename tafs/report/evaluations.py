"""The results of `tafs evaluate` as boards, one for each protocol: others' numbers never mix."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tafs.common.yaml_files import ConfigError, suggestion
from tafs.report.leaderboard import FIELDS, Board
from tafs.rewards.metrics import METRICS

FILE = "evaluation.json"
SHOWN = 8  # characters of a digest that tells adapters of one name apart


@dataclass(frozen=True)
class Judged:
    """The systems that were judged under one protocol."""

    protocol: str
    sha256: str
    board: Board

    def by(self, metric: str | None) -> tuple[str, Board]:
        """(a metric, by default the protocol's first one, the board sorted by it)."""
        column = metric or self.board.columns[0]
        return column, self.board.ranked(column)


def holds(folder: Path) -> bool:
    """Whether a folder has results of `tafs evaluate`."""
    return bool(_files(folder))


def read(folder: Path, protocol: str | None = None, metric: str | None = None) -> list[Judged]:
    """The evaluations of a folder, by the names of their protocols.

    A system that was evaluated several times under a protocol has one row. An evaluation of an
    adapter gives a row to its base model too.

    Args:
        folder: with an `--out` folder of `tafs evaluate` for each evaluation, or one itself.
        protocol: its name; None: all.
        metric: that the protocols must have; None: any.

    Raises:
        ConfigError: there is no such protocol or metric.
        ValueError: a file is not an evaluation of this version; names it.
    """
    groups: dict[tuple[str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for file in _files(folder):
        content = file.read_bytes()
        try:
            record = json.loads(content)
            judged = record["protocol"]
            rows = groups.setdefault((judged["name"], judged["sha256"]), {})
            _add(rows, record)
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{file}: is not an evaluation of this version; repeat `tafs evaluate`"
            ) from None
    found = [Judged(*key, _board(key[0], rows)) for key, rows in sorted(groups.items())]
    names = list(dict.fromkeys(one.protocol for one in found))
    if protocol is not None and protocol not in names:
        raise ConfigError(f"--table: {folder} has no {protocol!r}{suggestion(protocol, names)}")
    found = [one for one in found if protocol in (None, one.protocol)]
    known = list(dict.fromkeys(column for one in found for column in one.board.columns))
    if metric is not None and metric not in known:
        raise ConfigError(f"--metric: unknown metric {metric!r}{suggestion(metric, known)}")
    return [one for one in found if metric is None or metric in one.board.columns]


def _files(folder: Path) -> list[Path]:
    return sorted([*folder.glob(FILE), *folder.glob(f"*/{FILE}")])


def _add(rows: dict[tuple[str, str], dict[str, Any]], record: Mapping[str, Any]) -> None:
    """Add the judged system and its base model to the rows by the digests of model and adapter."""
    model, adapter, metrics = record["model"], record["adapter"], record["metrics"]
    mark = " (random weights)" if record["random_weights"] else ""
    row = {
        "row": record["judged"] + mark,
        "variant": "base" if adapter is None else "adapter",
        "backbone": model["name"],
        "sampler": record["sampler"],
        "nfe": record["nfe"],
        "metrics": {name: _numbers(found) for name, found in metrics.items()},
    }
    rows[model["sha256"], adapter["sha256"] if adapter else ""] = row
    if adapter is not None:
        base = {
            "row": model["name"] + mark,
            "variant": "base",
            "sampler": record["base_sampler"],
            "metrics": {name: _numbers(found["base"]) for name, found in metrics.items()},
        }
        rows.setdefault((model["sha256"], ""), {**row, **base})


def _numbers(found: Mapping[str, Any]) -> dict[str, Any]:
    return {field: found.get(field) for field in FIELDS} | {"value": found["value"]}


def _board(name: str, rows: Mapping[tuple[str, str], dict[str, Any]]) -> Board:
    shared = Counter((row["row"], row["backbone"]) for row in rows.values())
    for (model, adapter), row in rows.items():
        if shared[row["row"], row["backbone"]] > 1:
            row["row"] += f" {(adapter or model)[:SHOWN]}"
    columns = tuple(c for c in METRICS if all(c in row["metrics"] for row in rows.values()))
    return Board(name, columns, tuple(rows.values()))
