"""Sampled images side by side: a row per prompt, a column per system."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open

from tafs.common.files import check_readable
from tafs.report.figures import style
from tafs.report.figures.style import DPI
from tafs.report.results import LoadedTable, Result
from tafs.runtime.run_dir import SAMPLES_PER_TAG

ROWS = 12  # of prompts in a grid
CELL = 0.72  # inches; a whole multiple of 24 pixels at DPI
LARGEST = 512  # pixels of a cell


def draw(table: LoadedTable) -> Figure:
    """The same prompts and start noise side by side, from each system's lowest seed."""
    titles, images = [], []
    scores = table.distinct[0].scores
    tags = dict(zip(scores.prompts, scores.tags, strict=True))
    per_tag = max(min(SAMPLES_PER_TAG, ROWS // len(set(tags.values()))), 1)
    groups: dict[str, list[int]] = {}
    for prompt, tag in sorted(tags.items()):
        groups.setdefault(tag, []).append(prompt)
    shown = [prompt for group in groups.values() for prompt in group[:per_tag]]
    texts = captions(table.results[0])
    for system in table.distinct:
        few = table.spec.few_nfe
        for n in dict.fromkeys([few] if system.spec.trained else [system.full_steps, few]):
            titles.append(f"{style.wrap(system.label, 14)}\n{n} steps")
            images.append(samples(system.results[0], f"{system.spec.sampler}-{n}", shown))
    return _grid(titles, images, shown, texts, tags)


def write(
    titles: Sequence[str],
    images: Sequence[np.ndarray],
    texts: Sequence[str],
    out: Path,
    random_weights: bool = False,
) -> None:
    """Write images with the prompts beside the rows and titles above the columns.

    Args:
        titles: of the columns.
        images: of each column, uint8 [prompts, H, W, 3]; cells have up to LARGEST pixels.
        texts: the prompts.
        out: a .png or .pdf file; its folder is made.
        random_weights: whether to mark the images as those of random weights.
    """
    side = max(CELL, min(images[0].shape[2], LARGEST) / DPI)
    wrapped = [
        "\n".join(style.wrap(line, int(20 * side)) for line in title.split("\n"))
        for title in titles
    ]
    with style.style():
        figure = _grid(wrapped, images, range(len(texts)), dict(enumerate(texts)), {}, side)
        style.finish(figure, random_weights)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)


def _grid(
    titles: Sequence[str],
    images: Sequence[np.ndarray],
    shown: Sequence[int],
    texts: Mapping[int, str],
    tags: Mapping[int, str],
    side: float = CELL,
) -> Figure:
    """The figure; lengths are in inches."""
    gap, text, between = 0.04, 1.75, 0.1
    head = 0.2 + 0.12 * max(title.count("\n") + 1 for title in titles)
    # A gap separates the tasks.
    breaks = [i > 0 and tags.get(a) != tags.get(shown[i - 1]) for i, a in enumerate(shown)]
    width = text + len(titles) * (side + gap)
    height = head + len(shown) * (side + gap) + sum(breaks) * between + gap
    figure = Figure(figsize=(width, height))
    top = height - head
    for i, title in enumerate(titles):
        x = text + i * (side + gap) + side / 2
        figure.text(x / width, (top + 0.06) / height, title, ha="center", va="bottom", fontsize=7.5)
    for row, prompt in enumerate(shown):
        top -= between if breaks[row] else 0
        middle = (top - side / 2) / height
        caption = style.wrap(texts[prompt], 27, max_lines=3, placeholder=" …")
        tag = tags.get(prompt, "").replace("_", " ")
        lines = caption.count("\n") + 1
        offset = 0.06 * bool(tag)
        x = (text - 0.1) / width
        figure.text(x, middle + offset / height, caption, ha="right", va="center", fontsize=7.5)
        below = middle + (offset - 0.065 * lines - 0.03) / height
        figure.text(x, below, tag, ha="right", va="top", fontsize=6.5, color="#888888")
        for i, stack in enumerate(images):
            left = text + i * (side + gap)
            box = (left / width, (top - side) / height, side / width, side / height)
            axes = figure.add_axes(box)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():  # many images are white up to their edges
                spine.set(visible=True, color="#dddddd")
            small = max(stack[row].shape[:2]) <= side * DPI
            axes.imshow(stack[row], interpolation="nearest" if small else "antialiased")
        top -= side + gap
    return figure


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    if not file.is_file():
        raise ValueError(f"{file}: not found; the workflow's rule evaluate writes it")
    check_readable(file)
    try:
        with safe_open(file, framework="numpy") as stored:
            yield stored
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file ({error})") from None


def kept(result: Result) -> set[str]:
    """The settings whose images are kept; see `EvalSetting.images`."""
    with _opened(result.run.samples) as stored:
        return set(stored.keys()) - {"prompts"}


def captions(result: Result) -> dict[int, str]:
    """The texts of the prompts whose images are kept, by the prompt's number."""
    with _opened(result.run.samples) as stored:
        texts = (stored.metadata() or {}).get("captions")
        if texts is None:
            raise ValueError(f"{result.run.samples}: has no captions; evaluate the run again")
        return dict(zip(map(int, stored.get_tensor("prompts")), json.loads(texts), strict=True))


def samples(result: Result, key: str, shown: Sequence[int]) -> np.ndarray:
    """The images of the prompts `shown`, uint8 [shown, H, W, 3]; no other images are read."""
    file = result.run.samples
    with _opened(file) as stored:
        for needed in ("prompts", key):
            if needed not in stored.keys():  # noqa: SIM118 (not a mapping)
                found = ", ".join(sorted(stored.keys()))
                raise ValueError(f"{file}: has no {needed!r} (available: {found})")
        place = {int(p): i for i, p in enumerate(stored.get_tensor("prompts"))}
        missing = [prompt for prompt in shown if prompt not in place]
        if missing:
            raise ValueError(f"{file}: has no prompt {missing[0]}")
        part = stored.get_slice(key)
        return np.concatenate([part[place[p] : place[p] + 1] for p in shown])


def trajectories(result: Result) -> tuple[np.ndarray, list[int], list[str], list[str]]:
    """The kept trajectories of annealed sampling.

    Returns:
        (images, uint8 [prompts, steps, H, W, 3]; the prompts' numbers, texts and tags).
    """
    with _opened(result.run.trajectory_images) as stored:
        texts = stored.metadata() or {}
        prompts = [int(p) for p in stored.get_tensor("prompts")]
        captions_, tags = (json.loads(texts[key]) for key in ("captions", "tags"))
        return stored.get_tensor("images"), prompts, captions_, tags
