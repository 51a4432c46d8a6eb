"""Captions of the embedded words, and their split by word.

A caption is a text in double quotes and its colour: '"LAMP" in red'. The texts are the words of
tafs/data/words/words.txt and numbers. A text of the test split is in no training caption.

`python -m tafs.words.captions` rewrites tafs/data/words/train.jsonl and test.jsonl.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tafs.data import prompts
from tafs.data.plugins.words import FOLDER
from tafs.words.render import CELLS, CHARACTERS, COLORS

TAGS = ("numbers", "short", "long")  # 2 or 3 digits, 3 letters, 4 letters
NUMBERS = 240  # texts with the tag numbers
TEST_PROMPTS = 35  # of each tag
SPLIT_SEED = 20261127


def texts() -> dict[str, list[str]]:
    """All texts by tag. No digit follows an equal one, which the recogniser may join."""
    numbers = [str(n) for n in range(10, 1000)]
    readable = [n for n in numbers if all(a != b for a, b in zip(n, n[1:], strict=False))]
    rng = np.random.default_rng(SPLIT_SEED)
    chosen = sorted(rng.permutation(len(readable))[:NUMBERS])
    words = (FOLDER / "words.txt").read_text(encoding="utf-8").split()
    return {
        "numbers": [readable[i] for i in chosen],
        "short": [word for word in words if len(word) == 3],
        "long": [word for word in words if len(word) == 4],
    }


def split() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train, test): training texts in every colour, test texts in one each."""
    rng = np.random.default_rng(SPLIT_SEED)
    train, test = [], []
    for tag, members in texts().items():
        order = rng.permutation(len(members))
        held_out = {
            members[i]: c
            for i, c in zip(order, rng.integers(len(COLORS), size=TEST_PROMPTS), strict=False)
        }
        colors = list(COLORS)
        for text in members:
            if text in held_out:
                test.append(row(tag, text, colors[held_out[text]]))
            else:
                train += [row(tag, text, color) for color in colors]
    return train, test


def problem(text: str) -> str | None:
    """Why the embedded models cannot draw a prompt; None: they can."""
    if re.fullmatch(f'"[{CHARACTERS}]{{1,{CELLS}}}" in ({"|".join(COLORS)})', text):
        return None
    return (
        f"is not a caption like '\"LAMP\" in red' with 1 to {CELLS} capitals or digits, and one of "
        f"the colours {', '.join(COLORS)}"
    )


def row(tag: str, text: str, color: str) -> dict[str, Any]:
    return {"tag": tag, "prompt": f'"{text}" in {color}', "text": text, "color": color}


def main() -> None:
    train, test = split()
    prompts.write(FOLDER / "train.jsonl", train)
    prompts.write(FOLDER / "test.jsonl", test)


if __name__ == "__main__":
    main()
