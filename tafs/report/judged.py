"""The results of judged checkpoints and of scored images, with intervals, and as tables' rows."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tafs.common.errors import one_line
from tafs.common.files import atomic_text, atomic_write
from tafs.evaluation.checkpoint import Judged
from tafs.evaluation.image_scores import VENDI, Diversity, ImageScore
from tafs.experiment.specs import RowSpec
from tafs.report import formats, stats
from tafs.report.results import Result, System, check_paired, shown_mean
from tafs.report.tables import Row, Score, Table, fill, samplers_note, samplers_of
from tafs.rewards.metrics import METRICS
from tafs.runtime.progress import aligned

SHOWN = 12  # characters of a digest beside a number
FIELDS = ("value", "low", "high", "n_images", "n_missing")


def write(judged: Judged, out: Path) -> str:
    """Write evaluation.json, scores.parquet, row.md and row.csv into `out`; return what to print.

    Every file holds the protocol's SHA-256.

    Raises:
        ValueError: a file of the runs is missing or broken; names it.
    """
    rows = [_row(judged, adapted) for adapted in (False, True)[: len(judged.runs)]]
    shown, base = rows[-1], rows[0] if len(rows) > 1 else None
    found: dict[str, dict[str, Any]] = {}
    for metric in judged.protocol.metrics:
        found[metric] = {
            "unit": METRICS[metric].unit,
            "protocol": judged.protocol.sha256,
            **_numbers(shown_mean(metric, _values(shown, metric), shown.system.scores.tags)),
        }
        if base is not None:
            found[metric]["base"] = _numbers(
                shown_mean(metric, _values(base, metric), base.system.scores.tags)
            )
            found[metric]["difference"] = _numbers(_difference(shown, base, metric))
    record = _record(judged, shown, base, found)
    out.mkdir(parents=True, exist_ok=True)
    atomic_text(out / "evaluation.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    _write_scores(judged, out / "scores.parquet")
    notes = [f"Protocol {judged.protocol.name}, SHA-256 {judged.protocol.sha256}."]
    notes += [note for note in [samplers_note(rows)] if note]
    columns = [Score(metric) for metric in judged.protocol.metrics]
    caption = f"{judged.label} on {judged.target.title}"
    table = Table("row", caption, rows, columns, "Model", notes)
    texts = formats.texts(table, fill(table))
    atomic_text(out / "row.md", texts["md"])
    atomic_text(out / "row.csv", _with_column(texts["csv"], "protocol", judged.protocol.sha256))
    return _printed(judged, record, out)


def _row(judged: Judged, adapted: bool) -> Row:
    result = Result(judged.run(adapted).folder)
    spec, [setting] = result.spec, result.evaluation.settings
    return Row(
        RowSpec(
            label=spec.title,
            runs=(spec.name,),
            variant="adapter" if adapted else spec.variant,
            task="",
            role="",
            backbone=spec.backbone,
            nfe=setting.nfe,
            full_steps=setting.nfe,
            sampler=setting.sampler,
        ),
        System(spec.title, (result,)),
    )


def _values(row: Row, metric: str) -> stats.Array:
    """A row's scores on the shown scale, [1, prompts, images]."""
    return METRICS[metric].factor * row.values(metric)


def _difference(row: Row, base: Row, metric: str) -> stats.Estimate:
    check_paired(row.system.scores, base.system.scores)
    tags, macro = row.system.scores.tags, METRICS[metric].macro
    return stats.paired_difference(_values(row, metric), _values(base, metric), tags, macro=macro)


def _numbers(estimate: stats.Estimate) -> dict[str, Any]:
    found = {name: getattr(estimate, name) for name in FIELDS}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in found.items()
    }


def _record(
    judged: Judged, shown: Row, base: Row | None, metrics: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    protocol, target, adapter = judged.protocol, judged.target, judged.adapter
    random = sorted(set[str]().union(*(r.random_weights for r in shown.system.results)))
    return {
        "judged": judged.label,
        "protocol": {"name": protocol.name, "sha256": protocol.sha256, **protocol.pinned},
        "model": {
            "name": target.name,
            "sha256": target.sha256,
            "settings": dict(target.settings),
            "files": dict(target.files),
        },
        "adapter": None
        if adapter is None
        else {"file": adapter.file.name, "sha256": adapter.sha256, "alpha": adapter.alpha},
        "nfe": shown.spec.nfe,
        "sampler": samplers_of(shown)[0],
        "base_sampler": None if base is None else samplers_of(base)[0],
        "random_weights": random,
        "metrics": metrics,
        "statistics": {"level": stats.LEVEL, "resamples": stats.RESAMPLES},
    }


def _write_scores(judged: Judged, file: Path) -> None:
    """The scores of all images of both runs, with the protocol in a column."""
    files = [f for run in judged.runs for f in (run.scores, run.served_scores) if f.is_file()]
    table = pd.concat([pd.read_parquet(one) for one in files], ignore_index=True)
    names = ("run", "method", "tag", "sampler", "metric")
    table = table.astype(dict.fromkeys(names, "str")).assign(protocol=judged.protocol.sha256)
    table = table.astype(dict.fromkeys((*names, "protocol"), "category"))
    atomic_write(file, lambda path: table.to_parquet(path, index=False))


def _with_column(text: str, name: str, value: str) -> str:
    head, *lines = text.splitlines()
    return "\n".join([f"{head},{name}", *(f"{line},{value}" for line in lines)]) + "\n"


def _printed(judged: Judged, record: dict[str, Any], out: Path) -> str:
    digest = judged.protocol.sha256
    head = ["metric", judged.label, "95 % interval"]
    compared = len(judged.runs) > 1
    head += ["base", "difference", "95 % interval"] if compared else []
    rows = [[*head, "protocol"]]
    for metric, found in record["metrics"].items():
        digits = METRICS[metric].digits
        cells = [METRICS[metric].title, *_shown(found, digits)]
        if compared:
            cells += [_shown(found["base"], digits)[0], *_shown(found["difference"], digits, "+")]
        rows.append([*cells, digest[:SHOWN]])
    lines = [
        f"{judged.label} on {judged.target.title}, {record['nfe']} steps, "
        f"sampler {record['sampler']}",
        f"protocol {judged.protocol.name}, SHA-256 {digest}",
        *aligned(rows),
        f"wrote {out}/: evaluation.json, scores.parquet, row.md, row.csv",
    ]
    if record["random_weights"]:
        names = ", ".join(record["random_weights"])
        lines.insert(0, f"RANDOM WEIGHTS ({names}): these numbers are not results")
    return "\n".join(lines)


def _shown(numbers: dict[str, Any], digits: int, sign: str = "") -> list[str]:
    """The value and its interval as text."""
    value, low, high = (numbers[name] for name in FIELDS[:3])
    interval = "-" if low is None else f"[{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
    return ["-" if value is None else f"{value:{sign}.{digits}f}", interval]


def of_images(metric: str, scores: Sequence[ImageScore]) -> stats.Estimate:
    """The mean score of images on the shown scale; images of one prompt are resampled together."""
    groups: dict[str, list[ImageScore]] = {}
    for score in scores:
        groups.setdefault(score.prompt.text, []).append(score)
    longest = max(len(group) for group in groups.values())
    values = np.full((1, len(groups), longest), np.nan)
    for i, group in enumerate(groups.values()):
        values[0, i, : len(group)] = [METRICS[metric].factor * score.value for score in group]
    tags = [group[0].prompt.tag for group in groups.values()]
    found = shown_mean(metric, values, tags)
    return found._replace(n_missing=len(scores) - found.n_images)


def images_record(metric: str, scores: Sequence[ImageScore], out: Path) -> dict[str, Any]:
    """The mean of images' scores, as JSON values."""
    return {"metric": metric, **_numbers(of_images(metric, scores)), "out": str(out)}


def write_images(metric: str, scores: Sequence[ImageScore], folder: Path, out: Path) -> str:
    """Write a CSV with a row per image; return what to print.

    Args:
        folder: of the images, which the files are relative to.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "prompt", "tag", metric])
    for score in scores:
        value = "" if math.isnan(score.value) else f"{score.value:.10g}"
        name = score.file.relative_to(folder).as_posix()
        writer.writerow([name, score.prompt.text, score.prompt.tag, value])
    atomic_text(out, text.getvalue())
    found, digits = of_images(metric, scores), METRICS[metric].digits
    value, interval = _shown(_numbers(found), digits)
    missing = f", {found.n_missing} without a score" if found.n_missing else ""
    title = one_line(METRICS[metric].title)
    return (
        f"{title} {value}, 95 % interval {interval}, {found.n_images} images{missing}\nwrote {out}"
    )


def diversity_record(scores: Sequence[Diversity], out: Path) -> dict[str, Any]:
    """The Vendi scores of all images and of the prompts, as JSON values."""
    every, *groups = scores
    within = {
        "prompts": len(groups),
        "value": float(np.mean([group.value for group in groups])) if groups else None,
        "images": float(np.mean([group.images for group in groups])) if groups else None,
    }
    own = {"value": every.value, "n_images": every.images}
    return {"metric": VENDI, **own, "within_prompts": within, "out": str(out)}


def write_diversity(scores: Sequence[Diversity], out: Path) -> str:
    """Write a CSV with a row for all images and one per prompt; return what to print."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["prompt", "images", VENDI])
    for score in scores:
        writer.writerow([score.prompt or "", score.images, f"{score.value:.10g}"])
    atomic_text(out, text.getvalue())
    record = diversity_record(scores, out)
    within, printed = record["within_prompts"], ""
    if within["prompts"]:
        printed = (
            f"; within a prompt {within['value']:.2f} of {within['images']:.3g} on average "
            f"({within['prompts']} prompts)"
        )
    every = f"Vendi score {record['value']:.2f} of {record['n_images']} images"
    return f"{every}{printed}\nwrote {out}"
