"""The real prompt sets: GenEval's 553 prompts, others of its kind to train on, and Pick-a-Pic's.

GenEval's set is what its generator draws from six templates over COCO's classes (Ghosh et al.,
2023, arXiv 2310.11513, github.com/djghosh13/geneval, prompts/create_prompts.py): 100 rows a task,
every class once where a single object is asked, and no row twice. The spelling is part of the set
("three benchs", "a scissors").
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tafs.data import geneval_rows
from tafs.data.geneval_rows import CLASSES, COLORS, TASKS
from tafs.shapes import captions

Row = dict[str, Any]

COLORED = CLASSES[1:]  # no coloured persons
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
SEED = 43  # of GenEval's own set
ROWS = 100  # drawn a task; repeated ones count once

# The training mix of Flow-GRPO (arXiv 2505.05470, experimental set-up), by the base model's
# accuracy on each task; a single object is never asked, since the evaluation has all 80.
SHARES = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}


def evaluation_rows() -> list[Row]:
    """The 553 rows that GenEval judges, in its generator's order."""
    rng = np.random.default_rng(SEED)
    classes, colored, colors = len(CLASSES), len(COLORED), len(COLORS)
    rows = [_single_object(a) for a in rng.choice(classes, classes, replace=False)]
    for _ in range(ROWS):
        rows.append(_two_object(*rng.choice(classes, 2, replace=False)))
    for _ in range(ROWS):
        rows.append(_counting(rng.choice(classes), int(rng.integers(len(NUMBERS)))))
    for _ in range(ROWS):
        rows.append(_colors(rng.choice(colored), rng.choice(colors)))
    for _ in range(ROWS):
        a, b = rng.choice(classes, 2, replace=False)
        rows.append(_position(a, b, rng.choice(len(RELATIONS))))
    for _ in range(ROWS):
        pair = rng.choice(colored, 2, replace=False)
        rows.append(_color_attr(*pair, *rng.choice(colors, 2, replace=False)))
    return list({row["prompt"]: row for row in rows}.values())


def training_rows(count: int, seed: int, shares: Mapping[str, float] = SHARES) -> list[Row]:
    """`count` rows of GenEval's templates, none of whose contents the evaluation asks for.

    Contents are compared, not wordings: "A and B" is "B and A", and "A above B" is "B below A".
    No content appears twice. Tasks are drawn by `shares`; one that has no content left (counting
    has at most 160) leaves its share to the others. A smaller count gives the first of the same
    rows.

    Raises:
        ValueError: `shares` has a task that is none, or no share above 0; or there are fewer
            than `count` rows.
    """
    for task, share in shares.items():
        if task not in TASKS:
            raise ValueError(f"shares: unknown task {task!r} (available: {', '.join(TASKS)})")
        if share < 0 or not math.isfinite(share):
            raise ValueError(f"shares.{task}: {share} is no share; give a number from 0")
    rng = np.random.default_rng(seed)
    used = {content(row) for row in evaluation_rows()}
    sources = {task: _shuffled(task, rng) for task, share in shares.items() if share}
    rows: list[Row] = []
    while len(rows) < count:
        if not sources:
            raise ValueError(f"count: {count} is too many; these shares have {len(rows)} rows")
        weights = np.array([shares[task] for task in sources])
        task = list(sources)[rng.choice(len(sources), p=weights / weights.sum())]
        row = next((row for row in sources[task] if content(row) not in used), None)
        if row is None:
            del sources[task]
        else:
            used.add(content(row))
            rows.append(row)
    return rows


def content(row: Mapping[str, Any]) -> str:
    """What a row asks for: its task and objects, whatever their order and the row's wording."""
    return f"{row['tag']}: {geneval_rows.content(dict(row))}"


def pickapic(folder: Path, split: str) -> list[Row]:
    """Pick-a-Pic's prompts as Flow-GRPO splits them: `train` has 25,432, `test` has 2,048.

    Args:
        folder: holds train.txt and test.txt, a prompt a line (dataset/pickscore in
            github.com/yifan123/flow_grpo).
        split: "train" or "test".

    Returns:
        Rows {prompt}. Of `train`, prompts that `test` has too and repeated ones are left out, and
        how many is printed to stderr.

    Raises:
        FileNotFoundError: a split's file is missing; names it.
        ValueError: there is no such split, or a file holds no prompt; names it.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r} (available: train, test)")
    test = _lines(folder / "test.txt")
    if split == "test":
        return [{"prompt": text} for text in test]
    file = folder / "train.txt"
    train = _lines(file)
    different = list(dict.fromkeys(train))
    held_out = set(test)
    kept = [text for text in different if text not in held_out]
    if len(kept) < len(train):
        print(
            f"{file}: {len(train) - len(kept)} of {len(train)} prompts left out "
            f"({len(train) - len(different)} repeated, {len(different) - len(kept)} in test.txt)",
            file=sys.stderr,
        )
    return [{"prompt": text} for text in kept]


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; it holds a prompt a line")
    try:
        with file.open(encoding="utf-8") as text:
            lines = [line.strip() for line in text if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{file}: is not UTF-8 text") from None
    if not lines:
        raise ValueError(f"{file}: holds no prompt")
    return lines


# -- templates: of numbers, the places in the lists above ------------------------------------------


def _single_object(a: int) -> Row:
    return _row("single_object", _a(CLASSES[a]), [_item(CLASSES[a])])


def _two_object(a: int, b: int) -> Row:
    first, second = CLASSES[a], CLASSES[b]
    return _row("two_object", f"{_a(first)} and {_a(second)}", [_item(first), _item(second)])


def _counting(a: int, number: int) -> Row:
    name, (count, word) = CLASSES[a], list(NUMBERS.items())[number]
    row = _row("counting", f"{word} {captions.plural(name)}", [_item(name, count)])
    return {**row, "exclude": [_item(name, count + 1)]}


def _colors(a: int, color: int) -> Row:
    name, paint = COLORED[a], COLORS[color]
    return _row("colors", f"{_a(paint)} {name}", [_item(name, color=paint)])


def _position(a: int, b: int, relation: int) -> Row:
    subject, target, where = CLASSES[a], CLASSES[b], RELATIONS[relation]
    include = [_item(target), {**_item(subject), "position": [where, 0]}]
    return _row("position", f"{_a(subject)} {where} {_a(target)}", include)


def _color_attr(a: int, b: int, color_a: int, color_b: int) -> Row:
    first, second = (COLORED[a], COLORS[color_a]), (COLORED[b], COLORS[color_b])
    text = " and ".join(f"{_a(color)} {name}" for name, color in (first, second))
    return _row("color_attr", text, [_item(name, color=color) for name, color in (first, second)])


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _item(name: str, count: int = 1, **more: str) -> Row:
    return {"class": name, "count": count, **more}


def _row(tag: str, text: str, include: list[Row]) -> Row:
    return {"tag": tag, "prompt": f"a photo of {text}", "include": include}


# -- every row of a task ---------------------------------------------------------------------------


def _other(first: int, index: int) -> int:
    """The place of the `index`-th of those that are not `first`."""
    return index + (index >= first)


_N, _M, _C = len(CLASSES), len(COLORED), len(COLORS)
# Of each task how many values each of its choices has, and the row of the choices.
_SPACES: dict[str, tuple[tuple[int, ...], Callable[..., Row]]] = {
    "single_object": ((_N,), _single_object),
    "two_object": ((_N, _N - 1), lambda a, b: _two_object(a, _other(a, b))),
    "counting": ((_N, len(NUMBERS)), _counting),
    "colors": ((_M, _C), _colors),
    "position": (
        (_N, _N - 1, len(RELATIONS)),
        lambda a, b, relation: _position(a, _other(a, b), relation),
    ),
    "color_attr": (
        (_M, _M - 1, _C, _C - 1),
        lambda a, b, c, d: _color_attr(a, _other(a, b), c, _other(c, d)),
    ),
}


def _shuffled(task: str, rng: np.random.Generator) -> Iterator[Row]:
    """Every row of a task once, in random order."""
    shape, row = _SPACES[task]
    for place in rng.permutation(math.prod(shape)):
        yield row(*np.unravel_index(place, shape))
