"""Prompts: reading them from files, drawing from them, and their digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """A prompt; `row` holds GenEval's metadata {tag, include, exclude?} where the set has it."""

    text: str
    row: Mapping[str, Any]

    @property
    def tag(self) -> str:
        return str(self.row.get("tag", ""))


def quoted(text: str) -> str:
    """The text in the first pair of double quotes; "" if there is none."""
    parts = text.split('"')
    return parts[1].strip() if len(parts) > 2 else ""


def read(path: Path, keys: Sequence[str] = ("prompt",)) -> list[Prompt]:
    """Read the prompts of a JSON Lines file, in its order.

    Args:
        keys: of the prompt in a line; the first that is there counts.

    Raises:
        ValueError: a line is not a JSON object with such a string; names file and line.
    """
    prompts = []
    # str.splitlines would also split at characters that are valid inside a JSON string.
    content = path.read_text(encoding="utf-8")
    lines = content.removesuffix("\n").split("\n") if content else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            text = row[next((key for key in keys if key in row), keys[0])]
            text.encode()  # a lone surrogate would fail in the tokenizer
            prompts.append(Prompt(text=text, row=row))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path}:{number}: not a JSON object with a 'prompt'") from None
    if not prompts:
        raise ValueError(f"{path}: holds no prompt; write one per line")
    return prompts


def read_lines(path: Path) -> list[Prompt]:
    """Read the prompts of a text file, one per line; blank lines are skipped.

    Raises:
        FileNotFoundError, ValueError: no such file, not UTF-8 text, or no prompt; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; write one prompt per line into it")
    try:
        with path.open(encoding="utf-8-sig") as lines:
            texts = [line.strip() for line in lines if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    if not texts:
        raise ValueError(f"{path}: holds no prompt; write one per line")
    return [Prompt(text, {"prompt": text}) for text in texts]


def digest(prompts: Iterable[Prompt]) -> str:
    """SHA-256 of the prompts' texts and rows, in their order."""
    rows = ({**prompt.row, "prompt": prompt.text} for prompt in prompts)
    lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    return hashlib.sha256(lines.encode()).hexdigest()


def first_of_each(prompts: Sequence[Prompt], count: int | None) -> list[int]:
    """Indices of the first `count` prompts of each tag, in their order; None: of all prompts."""
    seen: dict[str, int] = {}
    kept = []
    for index, prompt in enumerate(prompts):
        seen[prompt.tag] = seen.get(prompt.tag, 0) + 1
        if count is None or seen[prompt.tag] <= count:
            kept.append(index)
    return kept


def draw(
    prompts: Sequence[Prompt],
    count: int,
    rng: np.random.Generator,
    shares: Mapping[str, float] | None = None,
) -> list[Prompt]:
    """Draw prompts with replacement: first a tag, then one of its prompts.

    Tags differ in their number of prompts; uniform draws would mostly return the largest one.
    `shares` are the probabilities of the tags; None: uniform.
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


def draw_balanced(
    prompts: Sequence[Prompt],
    count: int,
    rng: np.random.Generator,
    shares: Mapping[str, float] | None = None,
) -> list[Prompt]:
    """Draw prompts so that each tag's number is its expected one, rounded up or down.

    Systematic sampling of the tags, in random order. The prompts of a tag are drawn without
    replacement while there are enough. `shares` are as in `draw`.
    """
    by_tag: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_tag.setdefault(prompt.tag, []).append(prompt)
    tags = [str(tag) for tag in rng.permutation(list(by_tag))]
    expected = [count * shares[tag] if shares else count / len(tags) for tag in tags]
    points = rng.random() + np.arange(count)
    owners = np.searchsorted(np.cumsum(expected), points, side="right").clip(max=len(tags) - 1)
    drawn = []
    for index, tag in enumerate(tags):
        known, number = by_tag[tag], int((owners == index).sum())
        chosen = rng.choice(len(known), number, replace=number > len(known))
        drawn += [known[i] for i in chosen]
    return [drawn[i] for i in rng.permutation(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
