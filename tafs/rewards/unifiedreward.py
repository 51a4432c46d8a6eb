"""UnifiedReward (Wang et al., arXiv 2503.05236): models that grade images from 1 to 5.

The models run in a separate chat server; see `tafs.rewards.chat`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tafs.data.prompts import Prompt
from tafs.rewards.chat import ChatJudge, Missing, Question, text_of
from tafs.rewards.metrics import METRICS, Metric

GRADES = 5
# The question of Flow-GRPO's reward (`unifiedreward_score_sglang` of flow_grpo/rewards.py in
# https://github.com/yifan123/flow_grpo), except: without its leading "<image>\n", which marks the
# image's place in a plain text prompt; here the image is a part of the message.
QUESTION = (
    "You are given a text caption and a generated image based on that caption. Your task is to "
    "evaluate this image based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. "
    "Consider the accuracy of depicted objects, their relationships, and attributes as described "
    "in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\n"
    "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{caption}]"
)
# The question of UnifiedReward-2.0 (inference_qwen/UnifiedReward-2.0-inference/
# point_score_ACS_image_generation.py in https://github.com/CodeGoat24/UnifiedReward).
QUESTION_2 = (
    "You are presented with a generated image and its associated text caption. Your task is to "
    "analyze the image across multiple dimensions in relation to the caption. Specifically:\n"
    "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object "
    "distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy."
    "\n\nOutput your evaluation using the format below:\n\n"
    "Alignment Score (1-5): X\n"
    "Coherence Score (1-5): Y\n"
    "Style Score (1-5): Z\n\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{caption}]"
)
AXES = ("Alignment", "Coherence", "Style")
SIDE = 512  # pixels; the size at which Flow-GRPO sends images
MAX_TOKENS = 512

_NUMBER = r"""
    [\s*_`"'\[(<{$]*+                         # Markdown, quotes, brackets
    (\d+(?:\.\d+)?) (?![\w%]|[.,]\d)          # not a part of another number or word
    [*_`"'\])>}$]*+
    (?: [ ]*(?:/|out[ ]of)[ ]*5(?:\.0+)?(?!\d|[.,]\d) )?
    (?! [ ]*(?:/|-|–|to|or|out[ ]of)[ *_]*\d ) # not a range, not of another scale
"""
_LABEL = r"""
    \bFinal[\s*_]+Score[*_`"'\s]*+ (?:\([^()]*\)[*_\s]*+)? (?: : | ： | = | \bis\b | \bof\b )
"""
_FLAGS = re.ASCII | re.IGNORECASE | re.VERBOSE
_SCORE = re.compile(_LABEL + _NUMBER, _FLAGS)
_ALONE = re.compile(rf"[*_\s]*+ (?:(?:Final|Score)[*_\s]*+:)? {_NUMBER} [*_.\s]*+", _FLAGS)


@dataclass(eq=False)
class UnifiedReward(ChatJudge):
    """UnifiedReward 1.x: one grade, for alignment and quality together."""

    metric: ClassVar[Metric] = METRICS["unifiedreward"]

    side: int | None = SIDE

    def questions(self, prompt: Prompt) -> Sequence[Question]:
        return [Question(QUESTION.format(caption=prompt.text), {"max_tokens": MAX_TOKENS})]

    def value(self, prompt: Prompt, answers: Sequence[Any]) -> float:
        [answer] = answers
        return grade(text_of(answer))


@dataclass(eq=False)
class UnifiedReward2(ChatJudge):
    """UnifiedReward-2.0: the mean of the grades for alignment, coherence and style."""

    metric: ClassVar[Metric] = METRICS["unifiedreward2"]

    def questions(self, prompt: Prompt) -> Sequence[Question]:
        return [Question(QUESTION_2.format(caption=prompt.text), {"max_tokens": MAX_TOKENS})]

    def value(self, prompt: Prompt, answers: Sequence[Any]) -> float:
        [answer] = answers
        return sum(axis_grades(text_of(answer))) / len(AXES)


def grade(text: str) -> float:
    """The grade in an answer: the number after "Final Score:", or the number that the answer is.

    The published readers are Flow-GRPO's, which takes the first "Final Score:" before a digit from
    1 to 5, and UnifiedReward's (DiffusionDPO/sift_dpo_data.py in
    https://github.com/CodeGoat24/UnifiedReward), which takes the last. The grade is theirs where
    they agree on one; where they give 0, differ, or take a part of a number such as the 4 of 45,
    it is missing.

    Raises:
        Missing: there is no number or there are different ones ("no_score"), or it is outside
            [1, 5] ("out_of_range").
    """
    alone = _ALONE.fullmatch(text)
    grades = {float(number) for number in ([alone[1]] if alone else _SCORE.findall(text))}
    if len(grades) != 1:
        raise Missing("no_score")
    [found] = grades
    if not 1 <= found <= GRADES:
        raise Missing("out_of_range")
    return found


def axis_grades(text: str) -> list[float]:
    """The grades of AXES in an answer of UnifiedReward-2.0, the number after "NAME Score (1-5):".

    Raises:
        Missing: an axis has no number or different ones ("no_score"), or one outside [1, 5]
            ("out_of_range").
    """
    found: list[float] = []
    for axis in AXES:
        label = rf"\b{axis}[\s*_]+Score[*_`\s]*+ (?:\([^()]*\)[*_`\s]*+)? : "
        grades = {float(number) for number in re.findall(label + _NUMBER, text, _FLAGS)}
        if len(grades) != 1:
            raise Missing("no_score")
        found += grades
    if not all(1 <= value <= GRADES for value in found):
        raise Missing("out_of_range")
    return found
