"""image_grid."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open

from tafs.report.figures.style import DPI, _save, _style
from tafs.report.results import (
    Result,
    read_results,
    systems_of,
)
from tafs.runtime import run_dir

ROWS = 12  # of prompts in a grid of images


def image_grid(
    run_dirs: Iterable[Path | str],
    out_dir: Path | str,
    *,
    name: str = "image_grid",
    captions: Sequence[str],
    indices: Sequence[int] | None = None,
    per_tag: int | None = None,
    nfe: int,
) -> list[Path]:
    """The same prompts and start noise side by side, each system's lowest seed.

    Args:
        captions: the text of every prompt, in their order.
        indices: the prompts to show; None takes the first `per_tag` of each task, which by default
            are ROWS together, of those whose images are kept.

    Raises:
        ValueError: an input is missing or broken, or the captions do not fit; names it.
    """
    results = read_results(run_dirs)
    columns: list[tuple[str, Result, str]] = []
    systems = systems_of(results)
    for system in systems:
        steps = [nfe] if system.trained else [system.full_steps, nfe]
        for n in dict.fromkeys(steps):
            title = f"{textwrap.fill(system.label, 14)}\n{n} steps"
            columns.append((title, system.results[0], f"{system.sampler}-{n}"))
    scores = systems[0].results[0].scores
    tags = dict(zip(scores.prompts, scores.tags, strict=True))
    fair = min(run_dir.SAMPLES_PER_TAG, ROWS // len(set(tags.values())))
    shown = list(indices) if indices is not None else _first_of_each(tags, per_tag or max(fair, 1))
    if not shown:
        raise ValueError("no prompts to show")
    if max(shown) >= len(captions):
        raise ValueError(f"prompt {max(shown)} has no caption: {len(captions)} were given")
    images = [_samples(result, key, shown) for _, result, key in columns]
    with _style():
        figure = _grid(columns, images, shown, captions, tags)
        return _save(figure, out_dir, name, systems)


def _grid(
    columns: Sequence[tuple[str, Result, str]],
    images: Sequence[np.ndarray],
    shown: Sequence[int],
    captions: Sequence[str],
    tags: dict[int, str],
) -> Figure:
    """In inches: the cells' sides are whole multiples of 24 pixels at the figure's dpi."""
    side, gap, text, between = 0.72, 0.04, 1.75, 0.1
    head = 0.2 + 0.12 * max(title.count("\n") + 1 for title, _, _ in columns)
    # Prompts of one task stand together.
    breaks = [i > 0 and tags.get(a) != tags.get(shown[i - 1]) for i, a in enumerate(shown)]
    width = text + len(columns) * (side + gap)
    height = head + len(shown) * (side + gap) + sum(breaks) * between + gap
    figure = Figure(figsize=(width, height))
    top = height - head
    for (title, _, _), i in zip(columns, range(len(columns)), strict=True):
        x = text + i * (side + gap) + side / 2
        figure.text(x / width, (top + 0.06) / height, title, ha="center", va="bottom", fontsize=7.5)
    for row, prompt in enumerate(shown):
        top -= between if breaks[row] else 0
        middle = (top - side / 2) / height
        caption = textwrap.fill(captions[prompt], 27, max_lines=3, placeholder=" …")
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
            for spine in axes.spines.values():  # many pictures are white up to their edges
                spine.set(visible=True, color="#dddddd")
            small = max(stack[row].shape[:2]) <= side * DPI
            axes.imshow(stack[row], interpolation="nearest" if small else "antialiased")
        top -= side + gap
    return figure


def _samples(result: Result, key: str, shown: Sequence[int]) -> np.ndarray:
    """uint8 [shown, H, W, 3]; reads no other images."""
    file = result.run.samples
    if not file.is_file():
        raise ValueError(f"{file}: not found; `python -m tafs.evaluation.evaluate` writes it")
    try:
        with safe_open(file, framework="numpy") as stored:
            for needed in ("prompts", key):
                if needed not in stored.keys():  # noqa: SIM118 (no mapping)
                    found = ", ".join(sorted(stored.keys()))
                    raise ValueError(f"{file}: has no {needed!r} (has: {found})")
            place = {int(p): i for i, p in enumerate(stored.get_tensor("prompts"))}
            missing = [prompt for prompt in shown if prompt not in place]
            if missing:
                raise ValueError(f"{file}: has no prompt {missing[0]}")
            part = stored.get_slice(key)
            return np.concatenate([part[place[p] : place[p] + 1] for p in shown])
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file ({error})") from None


def _first_of_each(tags: dict[int, str], count: int) -> list[int]:
    """The first prompts of each tag; tags in order of their first prompt."""
    groups: dict[str, list[int]] = {}
    for prompt in sorted(tags):
        groups.setdefault(tags[prompt], []).append(prompt)
    return [prompt for group in groups.values() for prompt in group[:count]]
