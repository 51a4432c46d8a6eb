"""Captions of the embedded words, split by word (`python -m tafs.words.captions`)."""

from __future__ import annotations

from pathlib import Path

from tafs.data import prompts
from tafs.data.prompt_sets import PromptSet

FOLDER = Path(__file__).parents[1] / "words"

PROMPT_SET = PromptSet(
    train=lambda _: prompts.read(FOLDER / "train.jsonl"),
    test=lambda _: prompts.read(FOLDER / "test.jsonl"),
    assets=("words",),
    quotes=True,
)
