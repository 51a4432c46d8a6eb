"""GenEval's 553 evaluation rows, and training rows from the same templates.

The evaluation rows are those of GenEval's generator (Ghosh et al., 2023, arXiv 2310.11513,
github.com/djghosh13/geneval, prompts/create_prompts.py): 100 draws per task from six templates over
COCO's classes, each class once for single objects, without duplicates. Its spelling is part of the
set ("three benchs", "a scissors").
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from tafs.data.geneval_rows import CLASSES, COLORS, NUMBERS, TASKS, Row, content, plural

COLORED = CLASSES[1:]  # all but "person"
RELATIONS = ("left of", "right of", "above", "below")
SEED = 43  # of GenEval's generator
ROWS = 100  # draws per task, before duplicates are removed

# Flow-GRPO's training shares (arXiv 2505.05470, experimental set-up), chosen by the base model's
# accuracy on each task. Single objects are left out, since the evaluation asks for all 80 classes.
SHARES = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}


def evaluation_rows() -> list[Row]:
    """GenEval's 553 evaluation rows, in its generator's order."""
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
    """Draw training rows from GenEval's templates without any content of the evaluation rows.

    Contents are compared instead of wordings: "A and B" equals "B and A", and "A above B" equals
    "B below A". No content appears twice. When a task has no content left (counting has 160), its
    share goes to the other tasks. A smaller count gives a prefix of the same rows.

    `shares` are the relative frequencies of the tasks.

    Raises:
        ValueError: `shares` has an unknown task or a negative share, or there are fewer than
            `count` rows.
    """
    for task, share in shares.items():
        if task not in TASKS:
            raise ValueError(f"shares: unknown task {task!r} (available: {', '.join(TASKS)})")
        if share < 0 or not math.isfinite(share):
            raise ValueError(
                f"shares.{task}: {share} is not a share; give a number that is at least 0"
            )
    rng = np.random.default_rng(seed)
    used = {content(row) for row in evaluation_rows()}
    sources = {task: _shuffled(task, rng) for task, share in shares.items() if share}
    rows: list[Row] = []
    tasks, bounds = _cumulative(sources, shares)
    while len(rows) < count:
        if not sources:
            raise ValueError(f"count: {count} is too many; these shares have {len(rows)} rows")
        task = tasks[bisect(bounds, rng.random())]  # as rng.choice draws, which is slower
        row = next((row for row in sources[task] if content(row) not in used), None)
        if row is None:
            del sources[task]
            tasks, bounds = _cumulative(sources, shares)
        else:
            used.add(content(row))
            rows.append(row)
    return rows


def _cumulative(tasks: Iterable[str], shares: Mapping[str, float]) -> tuple[list[str], list[float]]:
    """The tasks, and their cumulative probabilities."""
    found = list(tasks)
    weights = np.array([shares[task] for task in found])
    sums = np.cumsum(weights / weights.sum())
    return found, (sums / sums[-1:]).tolist()


def _single_object(a: int) -> Row:
    return _row("single_object", _a(CLASSES[a]), [_item(CLASSES[a])])


def _two_object(a: int, b: int) -> Row:
    first, second = CLASSES[a], CLASSES[b]
    return _row("two_object", f"{_a(first)} and {_a(second)}", [_item(first), _item(second)])


def _counting(a: int, number: int) -> Row:
    name, (count, word) = CLASSES[a], list(NUMBERS.items())[number]
    row = _row("counting", f"{word} {plural(name)}", [_item(name, count)])
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


def _other(first: int, index: int) -> int:
    """The index of the `index`-th element when element `first` is left out."""
    return index + (index >= first)


_N, _M, _C = len(CLASSES), len(COLORED), len(COLORS)
# For each task: the number of values of each argument, and the template.
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
    """All rows of a task in random order."""
    shape, row = _SPACES[task]
    for place in rng.permutation(math.prod(shape)):
        yield row(*np.unravel_index(place, shape))
