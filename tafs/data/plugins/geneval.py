"""GenEval's 553 prompts, and training prompts of its templates in Flow-GRPO's number and shares."""

from __future__ import annotations

from collections.abc import Iterable

from tafs.data import geneval
from tafs.data.prompt_sets import PromptSet
from tafs.data.prompts import Prompt

COUNT, SEED = 50_000, 0  # training prompts, as many as in Flow-GRPO's public set


def _prompts(rows: Iterable[geneval.Row]) -> list[Prompt]:
    return [Prompt(row["prompt"], row) for row in rows]


PROMPT_SET = PromptSet(
    train=lambda _: _prompts(geneval.training_rows(COUNT, SEED)),
    test=lambda _: _prompts(geneval.evaluation_rows()),
    shares={tag: share / sum(geneval.SHARES.values()) for tag, share in geneval.SHARES.items()},
    metadata=("include",),
)
