"""Soft-TIFA of GenEval 2 (Kamath et al., 2025, arXiv 2512.16853), asked of a chat server.

As in evaluation.py of https://github.com/facebookresearch/GenEval2, except that only the 20 most
probable first tokens of an answer count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tafs.data.prompts import Prompt
from tafs.rewards import learned
from tafs.rewards.chat import ChatJudge, Missing, Question
from tafs.rewards.metrics import METRICS, Metric

TOKENS = 20  # of the first token's distribution; the most that vLLM and OpenAI's protocol give
SETTINGS = {"max_tokens": 1, "logprobs": True, "top_logprobs": TOKENS}
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(eq=False)
class GenEval2(ChatJudge):
    """The geometric mean of the probabilities of the right answers.

    `folder` holds the model's tokenizer.

    Raises:
        FileNotFoundError: the tokenizer is missing; names the file.
    """

    metric: ClassVar[Metric] = METRICS["geneval2"]

    folder: Path = Path()

    def __post_init__(self) -> None:
        super().__post_init__()
        from tokenizers import Tokenizer

        file = self.folder / "tokenizer.json"
        learned.require(self.metric.name, file)
        self.tokenizer = Tokenizer.from_file(str(file))
        self.first_token = functools.cache(self._first_token)

    def questions(self, prompt: Prompt) -> Sequence[Question]:
        return [
            Question(f"{question} Answer in one word.", SETTINGS) for question, _ in _pairs(prompt)
        ]

    def value(self, prompt: Prompt, answers: Sequence[Any]) -> float:
        scores = [
            sum(found.get(self.first_token(text), 0.0) for text in accepted(*pair))
            for pair, found in zip(_pairs(prompt), map(first_tokens, answers), strict=True)
        ]
        if min(scores) <= 0:
            return 0.0
        return math.exp(sum(map(math.log, scores)) / len(scores))

    def _first_token(self, text: str) -> str:
        """The text of the first token that spells a text."""
        return str(self.tokenizer.decode(self.tokenizer.encode(text).ids[:1]))


def _pairs(prompt: Prompt) -> list[tuple[str, str]]:
    """The questions and right answers of a prompt.

    Raises:
        ValueError: it has none; names it.
    """
    match prompt.row.get("vqa_list"):
        case [*pairs] if pairs and all(
            isinstance(pair, list | tuple) and [*map(type, pair)] == [str, str] for pair in pairs
        ):
            return [(question, answer) for question, answer in pairs]
    raise ValueError(
        f"GenEval 2 cannot judge {prompt.text!r}: its 'vqa_list' is not a list of questions with "
        "their answers"
    )


def accepted(question: str, answer: str) -> list[str]:
    """The spellings of the right answer whose first tokens' probabilities are added up."""
    if not question.startswith("How many"):
        return ["Yes", "yes", " yes", " Yes"]
    number = str(NUMBERS.index(answer) + 1) if answer in NUMBERS else "other"
    return [text for word in (answer, answer.capitalize(), number) for text in (word, f" {word}")]


def first_tokens(choice: Any) -> dict[str, float]:
    """The probabilities of an answer's first token, by its text.

    Raises:
        Missing: the answer has none ("no_logprobs").
    """
    try:
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        return {str(entry["token"]): math.exp(float(entry["logprob"])) for entry in top}
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        raise Missing("no_logprobs") from None
