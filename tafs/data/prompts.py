"""Prompt sets: rows in GenEval's metadata format, from JSON Lines, split into train and test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """`row` is GenEval's metadata {tag, include, exclude?}, or empty where a set has none."""

    text: str
    row: Mapping[str, Any]

    @property
    def tag(self) -> str:
        return str(self.row.get("tag", ""))


def read(path: Path) -> list[Prompt]:
    """The prompts of a JSON Lines file, in its order.

    Raises:
        ValueError: a line is not a JSON object with a string `prompt` of characters; names file and
            line.
    """
    prompts = []
    # Not every character that ends a line elsewhere ends one of JSON Lines.
    content = path.read_text(encoding="utf-8")
    lines = content.removesuffix("\n").split("\n") if content else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            text = row["prompt"]
            text.encode()  # half a character would fail in the tokenizer
            prompts.append(Prompt(text=text, row=row))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path}:{number}: not a JSON object with a 'prompt'") from None
    if not prompts:
        raise ValueError(f"{path}: holds no prompt")
    return prompts


def first_of_each(prompts: Sequence[Prompt], count: int | None) -> list[int]:
    """The places of the first `count` prompts of each tag, in their order; None: of all."""
    seen: dict[str, int] = {}
    kept = []
    for place, prompt in enumerate(prompts):
        seen[prompt.tag] = seen.get(prompt.tag, 0) + 1
        if count is None or seen[prompt.tag] <= count:
            kept.append(place)
    return kept


def draw(
    prompts: Sequence[Prompt],
    count: int,
    rng: np.random.Generator,
    shares: Mapping[str, float] | None = None,
) -> list[Prompt]:
    """`count` prompts with replacement: first a tag, uniformly or by `shares`, then one of its own.

    Tags have prompts in very different numbers; drawn prompt by prompt, one would be most of it.
    """
    by_tag: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_tag.setdefault(prompt.tag, []).append(prompt)
    groups = list(by_tag.values())
    if shares is None:
        chosen = rng.integers(len(groups), size=count)
    else:
        chosen = rng.choice(len(groups), size=count, p=[shares[tag] for tag in by_tag])
    return [groups[i][rng.integers(len(groups[i]))] for i in chosen]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write GenEval rows as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
