"""The page's images: a sheet per run, sampler and number of steps, with a cell per prompt.

The page loads a sheet when it is looked at, so it opens fast whatever their number.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tafs.experiment.specs import EvalSetting
from tafs.report.figures import image_grid
from tafs.report.page.content import number
from tafs.report.page.systems import Systems
from tafs.report.results import Report, Result
from tafs.rewards.metrics import METRICS

FOLDER = "images"
TRAJECTORIES = "trajectories"  # in place of a setting in a sheet's name
BUDGET = 45e6  # bytes of all sheets
PER_PIXEL = 0.25  # bytes, at QUALITY
PER_EXACT_PIXEL = 1.5  # without loss
QUALITY = 80  # of WebP, for images that are not shown pixel by pixel
LARGEST = 256  # pixels of a cell's side
EXACT = 64  # images up to this side are kept without loss


def kept_prompts(result: Result) -> dict[int, str]:
    """The texts of the scored prompts whose images a run keeps, by the prompt's number."""
    scored = {*result.scores.prompts}
    return {p: text for p, text in image_grid.captions(result).items() if p in scored}


def write(report: Report, systems: Systems, folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Write the sheets of all runs to FOLDER/images/.

    Returns:
        (what the scripts need to show them, the files).

    Raises:
        ValueError: a run has no samples, or not those of a setting; names the file.
    """
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    results = [result for result, _ in systems.results if result.evaluation.settings]
    sets: dict[tuple[int, ...], dict[str, Any]] = {}
    runs, files = {}, []
    side, exact = _resolution(results)
    for result in results:
        captions, tags = kept_prompts(result), _tags(result)
        of = sets.setdefault(
            tuple(captions),
            {"captions": list(captions.values()), "tags": [tags[p] for p in captions]},
        )
        sheets = {}
        for setting in _settings(result):
            images = image_grid.samples(result, setting.images, list(captions))
            file = folder / FOLDER / f"{result.spec.name}.{setting.images}.webp"
            _save(images, _columns(len(images)), side, exact, file)
            files.append(file)
            sheets[setting.images] = {"scores": _scores(result, setting, list(captions))}
        runs[result.spec.name] = {"set": list(sets.values()).index(of), "sheets": sheets}
    trajectories = {}
    for result in results:
        if result.run.trajectory_images.is_file():
            file = folder / FOLDER / f"{result.spec.name}.{TRAJECTORIES}.webp"
            trajectories[result.spec.name] = _trajectories(result, side, exact, file)
            files.append(file)
    record = {
        "trajectories": trajectories,
        "sets": [{**of, "columns": _columns(len(of["tags"]))} for of in sets.values()],
        "runs": runs,
        "exact": exact,
    }
    return record, files


def _settings(result: Result) -> list[EvalSetting]:
    """The settings of the final model, and those of snapshots whose images are kept."""
    kept = image_grid.kept(result)
    return [s for s in result.evaluation.settings if s.iteration is None or s.images in kept]


def _trajectories(result: Result, side: int, exact: bool, file: Path) -> dict[str, Any]:
    """Write the sheet of a run's trajectories, a row per prompt; return what the scripts need."""
    images, prompts, captions, tags = image_grid.trajectories(result)
    steps = images.shape[1]
    _save(images.reshape(-1, *images.shape[2:]), steps, side, exact, file)
    rewards = result.trajectory_rewards
    found = rewards[rewards["prompt"].isin(prompts)].pivot_table(
        index=["metric", "prompt"], columns="step", values="value", observed=True, dropna=False
    )
    return {
        "steps": steps,
        "captions": captions,
        "tags": tags,
        "scores": {
            metric: [
                [number(METRICS[metric].factor * float(x)) for x in found.loc[(metric, p)]]
                for p in prompts
            ]
            for metric in METRICS
            if metric in found.index.get_level_values("metric")
        },
    }


def _tags(result: Result) -> dict[int, str]:
    return dict(zip(result.scores.prompts, result.scores.tags, strict=True))


def _columns(prompts: int) -> int:
    return math.ceil(math.sqrt(prompts))


def _resolution(results: Sequence[Result]) -> tuple[int, bool]:
    """(the side of a cell, whether it is kept without loss), so that all stay within the budget."""
    count = sum(len(kept_prompts(result)) * len(_settings(result)) for result in results)
    native = max((result.evaluation.resolution for result in results), default=LARGEST)
    if native <= EXACT and count * native**2 * PER_EXACT_PIXEL <= BUDGET:
        return native, True
    return min(native, math.isqrt(int(BUDGET / PER_PIXEL / max(count, 1))), LARGEST), False


def _save(images: np.ndarray, columns: int, side: int, exact: bool, file: Path) -> None:
    """A sheet of images, uint8 [n, H, W, 3], each in a square cell."""
    sheet = Image.new("RGB", (columns * side, -(-len(images) // columns) * side))
    for place, pixels in enumerate(images):
        cell = Image.fromarray(pixels)
        if cell.size != (side, side):
            cell = cell.resize((side, side), Image.Resampling.LANCZOS)
        row, column = divmod(place, columns)
        sheet.paste(cell, (column * side, row * side))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, "WEBP", lossless=exact, quality=QUALITY, method=4)


def _scores(
    result: Result, setting: EvalSetting, prompts: Sequence[int]
) -> dict[str, list[float | None]]:
    """The score of each shown image, the first one of its prompt, on the shown scale."""
    scores = result.scores
    place = {prompt: i for i, prompt in enumerate(scores.prompts)}
    at = [place[prompt] for prompt in prompts]
    after = result.spec.iterations if setting.iteration is None else setting.iteration
    found = {}
    for metric in scores.metrics():
        values = scores.values.get((setting.sampler, setting.nfe, metric, after))
        if values is not None:
            found[metric] = [number(METRICS[metric].factor * float(x)) for x in values[at, 0]]
    return found
