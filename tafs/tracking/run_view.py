"""What MLflow shows of a run folder: parameters, tags, curves, scores, sample images and files."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.entities import Metric as Point
from safetensors import safe_open

from tafs.common.files import check_readable, sha256
from tafs.rewards.metrics import METRICS, Metric
from tafs.runtime import journal
from tafs.runtime.run_dir import RunDir

# MLflow silently cuts longer values; older servers allow tags of 5000 characters.
PARAMETER_LENGTH, TAG_LENGTH = 6000, 5000
SHOWN_PROMPTS = 6  # of which images are shown, per sampler and number of steps


@dataclass(frozen=True)
class RunView:
    """A run folder in MLflow's terms."""

    name: str
    task: str
    key: str  # changes when the run is trained again
    parameters: dict[str, str]
    tags: dict[str, str]
    curves: list[Point]  # of the journal's iterations, in their order
    scores: list[Point]  # means of the score tables
    scores_sha256: str  # of the score tables; "" without any
    started_ms: int
    ended_ms: int | None  # None while the run trains
    skipped: int  # values that are not finite
    files: dict[str, Path]  # to copy, by their names in MLflow
    samples: Path | None


def read_run(folder: Path) -> RunView | None:
    """Read a run folder; None if nothing has started in it yet. Errors name the file."""
    run = RunDir(folder)
    description = dict(run.description)
    # While a run trains, its journal is next to its checkpoints.
    path = next((p for p in (run.state / "journal.jsonl", run.journal) if p.exists()), None)
    records = journal.read(path) if path else []
    tables = [file for file in (run.scores, run.served_scores) if file.exists()]
    if not records and not tables:
        return None

    start: dict[str, Any] = next((r for r in reversed(records) if r["kind"] == "start"), {})
    provenance = start.get("provenance", {})
    name = str(description.get("name", folder.resolve().name))
    curves, skipped = _curves(journal.iterations(path)) if path else ([], 0)
    scores: list[Point] = []
    for table in tables:
        points, left_out = _scores(table)
        scores, skipped = scores + points, skipped + left_out
    tags: dict[str, Any] = {key: description.get(key, "") for key in ("method", "title", "scale")}
    tags |= {"fingerprint": start.get("fingerprint", ""), "tafs.run": name}
    tags |= {"tafs.skipped_values": skipped, **dict(_flatten({"provenance": provenance}))}
    if provenance.get("git_commit"):
        tags["mlflow.source.git.commit"] = provenance["git_commit"]
    parameters = texts(_flatten(description), PARAMETER_LENGTH)
    # An untrained model has no journal, only scores.
    started = int(records[0]["time"] * 1000) if records else _modified_ms(tables[0])
    ended = next((int(r["time"] * 1000) for r in records if r["kind"] == "end"), None)
    identity = [name, start.get("fingerprint", ""), started if records else 0, parameters]
    files = [file for file in (folder / "run.json", run.adapter, path) if file and file.exists()]
    return RunView(
        name=name,
        task=str(description.get("task") or "base"),
        key=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        parameters=parameters,
        tags=texts(tags.items(), TAG_LENGTH),
        curves=curves,
        scores=scores,
        scores_sha256="".join(map(sha256, tables)),
        started_ms=started,
        ended_ms=ended if records else started,
        skipped=skipped,
        files={file.name: file for file in files},
        samples=run.samples if run.samples.exists() else None,
    )


def sample_images(view: RunView) -> Iterator[tuple[str, np.ndarray, int, int]]:
    """Yield key, image (uint8 [height, width, 3]), iteration and time (ms) of sample images.

    The keys are `samples/SAMPLER-NFE/prompt_INDEX`: MLflow's image grid compares the runs' images
    of one prompt, and its slider shows those of the snapshots.
    """
    if view.samples is None:
        return
    last = max((point.step for point in view.scores), default=0)
    with safe_open(view.samples, "numpy") as stored:
        prompts = stored.get_tensor("prompts")
        # Prompts are sorted by tag: every so many of them, so that each tag is shown.
        rows = range(0, len(prompts), math.ceil(len(prompts) / SHOWN_PROMPTS) or 1)
        for name in sorted(set(stored.keys()) - {"prompts"}):
            images = stored.get_slice(name)
            setting, _, after = name.partition("@")
            iteration = int(after) if after else last
            for row in rows:
                key = valid_key(f"samples/{setting}/prompt_{prompts[row]}").replace(":", "_")
                yield key, images[row], iteration, _modified_ms(view.samples)


def _curves(iterations: list[dict[str, Any]]) -> tuple[list[Point], int]:
    """Points of the journal's iterations, and the number of values that are not finite.

    A list has a value per sampling step: `rewards: {toy: [a, b]}` becomes `reward/toy/step_0`,
    `reward/toy/step_1` and `reward/toy/last`, which methods with other steps have too.
    """
    points, skipped = [], 0
    for record in iterations:
        values = {k: v for k, v in record.items() if k not in ("kind", "time", "iteration")}
        values["reward"] = values.pop("rewards", {})
        for key, leaf in _flatten(values):
            named = {key: leaf}
            if isinstance(leaf, list):
                named = {f"{key}/step_{i}": value for i, value in enumerate(leaf)}
                named |= {f"{key}/last": leaf[-1]} if leaf else {}
            for name, value in named.items():
                if value is None or (isinstance(value, float) and not math.isfinite(value)):
                    skipped += 1  # the journal holds null for NaN
                elif isinstance(value, int | float):
                    time, step = int(record["time"] * 1000), record["iteration"]
                    points.append(Point(valid_key(name), float(value), time, step))
    return points, skipped


def _scores(file: Path) -> tuple[list[Point], int]:
    """`score/METRIC/SAMPLER/nfe_N` as the tables show it, at the iteration of the scored model."""
    columns = ["metric", "sampler", "nfe", "iteration", "tag", "value"]
    check_readable(file)
    try:
        table = pd.read_parquet(file, columns=columns)
    except Exception as error:  # pyarrow's errors have no common class
        raise ValueError(f"{file}: not a score table ({error})") from error
    points, skipped = [], 0
    for (name, sampler, nfe, step), rows in table.groupby(columns[:4], observed=True):
        metric = METRICS.get(name) or Metric(name, name, "", 3)  # a plug-in that is not installed
        if metric.macro:
            rows = rows.groupby("tag", observed=True)[["value"]].mean(skipna=False)
        # A server may fail to score single images, which are NaN in its table.
        value = metric.factor * rows["value"].mean(skipna=metric.served)
        if math.isfinite(value):
            key = valid_key(f"score/{metric.title}/{sampler}/nfe_{nfe}")
            points.append(Point(key, float(value), _modified_ms(file), int(step)))
        else:
            skipped += 1
    return points, skipped


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings with keys such as `seconds/total`."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flatten(item, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", item


def valid_key(key: str) -> str:
    """Replace the characters that MLflow rejects in keys, and cut the key at MLflow's limit."""
    return re.sub(r"[^\w./: -]", "_", key, flags=re.ASCII)[:250]


def texts(values: Iterable[tuple[str, Any]], length: int) -> dict[str, str]:
    """Keys and values as MLflow takes them; a longer value ends with its number of characters."""
    found = {}
    for key, value in values:
        text = value if isinstance(value, str) else json.dumps(value)
        note = f"... ({len(text)} characters)"
        found[valid_key(key)] = text if len(text) <= length else text[: length - len(note)] + note
    return found


def _modified_ms(file: Path) -> int:
    return file.stat().st_mtime_ns // 1_000_000
