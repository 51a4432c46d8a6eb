"""run_view."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tafs.runtime import journal

if TYPE_CHECKING:
    pass
from tafs.tracking.mlflow_mirror import RUN

# MLflow's limits; it cuts longer parameters without a word.
PARAMETER_LENGTH, TAG_LENGTH = 6000, 5000


class Point(NamedTuple):
    """One value of a curve."""

    key: str
    value: float
    timestamp_ms: int
    step: int


@dataclass(frozen=True)
class Mirror:
    """A run folder in MLflow's terms."""

    folder: Path
    name: str
    task: str
    key: str  # of this one training of this run
    parameters: dict[str, str]
    tags: dict[str, str]
    curves: list[Point]
    next_iteration: int
    scores: list[Point]
    scores_sha256: str
    started_ms: int
    ended_ms: int | None
    skipped: int
    journal: Path | None


def read_run(folder: Path) -> Mirror | None:
    """What MLflow shall show of a run folder; None where nothing has started yet.

    Raises:
        OSError: run.json or another file cannot be read.
        ValueError: run.json, the journal or the scores are damaged; names the file.
    """
    description = _read_description(folder / "run.json")
    # While a run trains, its journal lies with its resume state.
    journals = [folder / ".state" / "journal.jsonl", folder / "journal.jsonl"]
    path = next((p for p in journals if p.exists()), None)
    records = journal.read(path) if path else []
    files = [folder / "scores.parquet", folder / "served_scores.parquet"]
    score_files = [file for file in files if file.exists()]
    if not records and not score_files:
        return None

    start: dict[str, Any] = next((r for r in reversed(records) if r["kind"] == "start"), {})
    fingerprint = start.get("fingerprint", description.get("fingerprint", ""))
    facts = description.get("provenance", {}) | start.get("provenance", {})
    described = {k: v for k, v in description.items() if k not in ("fingerprint", "provenance")}
    parameters = {
        _entity(key): _shorten(_text(value), PARAMETER_LENGTH) for key, value in _flatten(described)
    }
    name = str(description.get("name", folder.resolve().name))
    tags = {_entity(key): _text(value) for key, value in _flatten({"provenance": facts})}
    tags |= {k: str(description[k]) for k in ("method", "title", "scale") if k in description}
    tags |= {"fingerprint": fingerprint, RUN: name}
    if facts.get("git_commit"):
        tags["mlflow.source.git.commit"] = facts["git_commit"]

    iterations = journal.iterations(path) if path else []
    curves: list[Point] = []
    skipped = 0
    for record in iterations:
        found, bad = _curve_points(record)
        curves += found
        skipped += bad
    next_iteration = iterations[-1]["iteration"] + 1 if iterations else 0
    scores: list[Point] = []
    for file in score_files:
        found, bad = _score_points(file)
        scores += found
        skipped += bad
    content = b"".join(file.read_bytes() for file in score_files)
    scores_sha256 = hashlib.sha256(content).hexdigest() if score_files else ""
    started = int(records[0]["time"] * 1000) if records else _modified_ms(score_files[0])
    ended = next((int(r["time"] * 1000) for r in records if r["kind"] == "end"), None)
    tags["tafs.skipped_values"] = str(skipped)
    # The start's time, because a run that is trained anew draws curves of its own.
    identity = json.dumps([name, fingerprint, started if records else 0, parameters])
    return Mirror(
        folder=folder,
        name=name,
        task=str(description.get("task") or "base"),
        key=hashlib.sha256(identity.encode()).hexdigest(),
        parameters=parameters,
        tags={key: _shorten(value, TAG_LENGTH) for key, value in tags.items()},
        curves=curves,
        next_iteration=next_iteration,
        scores=scores,
        scores_sha256=scores_sha256,
        started_ms=started,
        ended_ms=ended if records else started,
        skipped=skipped,
        journal=path,
    )


def _read_description(file: Path) -> dict[str, Any]:
    try:
        description = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(description, dict):
        raise ValueError(f"{file}: holds no JSON object")
    return description


def _curve_points(record: Mapping[str, Any]) -> tuple[list[Point], int]:
    """An iteration's points, and how many of its values are no finite numbers.

    A list is indexed by step: `rewards: {toy: [a, b]}` becomes reward/toy/step_0, reward/toy/step_1
    and reward/toy/last, which methods with different numbers of scored steps share.
    """
    values = {k: v for k, v in record.items() if k not in ("kind", "time", "iteration", "rewards")}
    values["reward"] = record.get("rewards", {})
    timestamp, step = int(record["time"] * 1000), record["iteration"]
    points, skipped = [], 0
    for key, leaf in _flatten(values):
        named = {key: leaf}
        if isinstance(leaf, list):
            named = {f"{key}/step_{i}": value for i, value in enumerate(leaf)}
            if leaf:
                named[f"{key}/last"] = leaf[-1]
        for name, value in named.items():
            if value is None or (isinstance(value, float) and not math.isfinite(value)):
                skipped += 1
            elif isinstance(value, int | float):
                points.append(Point(_entity(name), float(value), timestamp, step))
    return points, skipped


def _score_points(file: Path) -> tuple[list[Point], int]:
    """score/METRIC/SAMPLER/nfe_N: means over the images, GenEval's as 100 x the mean of its tags'.

    A snapshot's point stands at its iteration, so that the last point is the final model's.

    Raises:
        ValueError: the file is no table of scores.
    """
    import pandas as pd

    try:
        columns = ["tag", "iteration", "sampler", "nfe", "metric", "value"]
        table = pd.read_parquet(file, columns=columns)
    except Exception as error:  # pyarrow has no common class for what a damaged file raises
        raise ValueError(f"{file}: not a table of scores ({error})") from error
    points, skipped = [], 0
    for keys, rows in table.groupby(["metric", "sampler", "nfe", "iteration"], observed=True):
        metric, sampler, nfe, iteration = keys
        if metric == "geneval":
            tags = rows.groupby("tag", observed=True)["value"]
            value = 100 * tags.mean(skipna=False).mean(skipna=False)
        else:
            # A server's missing grades are counted in the tables.
            value = rows["value"].mean(skipna=file.stem == "served_scores")
        if math.isfinite(value):
            key = _entity(f"score/{metric}/{sampler}/nfe_{nfe}")
            points.append(Point(key, float(value), _modified_ms(file), int(iteration)))
        else:
            skipped += 1
    return points, skipped


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings with keys such as `seconds/total`."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flatten(item, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", item


def _entity(key: str) -> str:
    """A key without the characters that MLflow refuses."""
    return re.sub(r"[^\w./: -]", "_", key, flags=re.ASCII)[:250]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _shorten(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    note = f"... ({len(text)} characters)"
    return text[: length - len(note)] + note


def _modified_ms(file: Path) -> int:
    return file.stat().st_mtime_ns // 1_000_000


def pictures(folder: Path) -> list[Path]:
    """The PNG files in a run's folder, but for its hidden ones, which are works in progress and may
    be gone before they have been looked through."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent) / name for name in files if name.endswith(".png")]
    return sorted(found)


def _status(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except FileNotFoundError:
        return None
