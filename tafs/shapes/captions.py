"""Captions of the six GenEval tasks for the embedded models, and their split.

The split is by content: the objects, colours and relation of a test row appear in no training row
under any wording. Single objects are the exception: there are only five, split by wording.

`python -m tafs.shapes.captions` rewrites tafs/data/shapes/train.jsonl and test.jsonl.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

import numpy as np

from tafs.data import prompts
from tafs.data.geneval_rows import NUMBERS, TASKS, Row, objects, plural
from tafs.data.plugins.shapes import FOLDER
from tafs.shapes.scenes import COLORS, RELATIONS, SHAPES

MAX_WORDS = 8  # that the text encoders read; the longest caption has seven

# Test prompts per task, 105 in total.
TEST_PROMPTS = {
    "single_object": 8,
    "two_object": 12,
    "counting": 20,
    "colors": 16,
    "position": 21,
    "color_attr": 28,
}
TEST_SHARE = 0.2  # share of a task's contents that are held out for the test split
SPLIT_SEED = 20260201


def rows() -> Iterator[Row]:
    """All prompts, in a fixed order."""
    for shape in SHAPES:
        for text in (f"a {shape}", f"one {shape}", f"a single {shape}", f"just one {shape}"):
            yield _row("single_object", text, [_item(shape)])
    for a, b in itertools.permutations(SHAPES, 2):
        for text in (f"a {a} and a {b}", f"one {a} and one {b}", f"a {a} with a {b}"):
            yield _row("two_object", text, [_item(a), _item(b)])
    for shape, (count, word) in itertools.product(SHAPES, NUMBERS.items()):
        for color in (None, *COLORS):
            thing = f"{color} {plural(shape)}" if color else plural(shape)
            for text in (f"{word} {thing}", f"a group of {word} {thing}"):
                yield _row(
                    "counting",
                    text,
                    [_item(shape, count, color)],
                    exclude=[{"class": shape, "count": count + 1}],
                )
    for color, shape in itertools.product(COLORS, SHAPES):
        for text in (
            f"a {color} {shape}",
            f"one {color} {shape}",
            f"a {shape} that is {color}",
            f"a single {color} {shape}",
        ):
            yield _row("colors", text, [_item(shape, color=color)])
    for (a, b), relation in itertools.product(itertools.permutations(SHAPES, 2), RELATIONS):
        for text in (f"a {a} {relation} a {b}", f"one {a} {relation} one {b}"):
            yield _row("position", text, [_item(b), {**_item(a), "position": [relation, 0]}])
    for (a, b), (c, d) in itertools.product(
        itertools.permutations(SHAPES, 2), itertools.permutations(COLORS, 2)
    ):
        for text in (f"a {c} {a} and a {d} {b}", f"one {c} {a} and one {d} {b}"):
            yield _row("color_attr", text, [_item(a, color=c), _item(b, color=d)])


@cache
def words() -> frozenset[str]:
    """All words of the captions: the vocabulary of the embedded models."""
    return frozenset(word for row in rows() for word in row["prompt"].split())


def split() -> tuple[list[Row], list[Row]]:
    """Split all rows into (train, test), as the module's docstring describes."""
    rng = np.random.default_rng(SPLIT_SEED)
    train: list[Row] = []
    test: list[Row] = []
    by_task: dict[str, list[Row]] = {task: [] for task in TASKS}
    for row in rows():
        by_task[row["tag"]].append(row)
    for task, members in by_task.items():
        groups: dict[str, list[Row]] = {}
        for row in members:
            groups.setdefault(_key(row), []).append(row)
        keys = sorted(groups)
        # Hold out enough prompts for the test set.
        share = max(TEST_SHARE, TEST_PROMPTS[task] / len(members))
        held_out = {keys[i] for i in rng.permutation(len(keys))[: round(share * len(keys))]}
        candidates = [row for key in keys if key in held_out for row in groups[key]]
        chosen = sorted(rng.permutation(len(candidates))[: TEST_PROMPTS[task]])
        test += [candidates[i] for i in chosen]
        train += [row for row in members if _key(row) not in held_out]
    return train, test


def _key(row: Row) -> str:
    """The unit of the split: a content, or a wording of a single object."""
    return row["prompt"] if row["tag"] == "single_object" else objects(row)


def _item(shape: str, count: int = 1, color: str | None = None) -> Row:
    item: Row = {"class": shape, "count": count}
    return {**item, "color": color} if color else item


def _row(tag: str, text: str, include: list[Row], exclude: list[Row] | None = None) -> Row:
    row: Row = {"tag": tag, "prompt": text, "include": include}
    return {**row, "exclude": exclude} if exclude else row


def main() -> None:
    train, test = split()
    prompts.write(FOLDER / "train.jsonl", train)
    prompts.write(FOLDER / "test.jsonl", test)


if __name__ == "__main__":
    main()
