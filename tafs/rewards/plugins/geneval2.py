"""GenEval 2 (Kamath et al., 2025, arXiv 2512.16853): Soft-TIFA, answers of a vision language model.

Every prompt of its 800 has questions about its objects, attributes, counts and relations. A
question's score is the probability of the right answer as Qwen3-VL's first token, and an image's
the geometric mean over its questions (Soft-TIFA GM). The prompts and questions are under
CC BY-NC 4.0: they are downloaded, never shipped, and for non-commercial use. The model is
Qwen3-VL-8B-Instruct (Apache-2.0), which vLLM serves. Unlike the published script, only the 20 most
probable tokens count, because servers tell no more; the rest of a distribution is below each of
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tafs.rewards.metrics import Folder, Metric, RewardPlugin

if TYPE_CHECKING:
    from tafs.rewards.chat import ChatJudge

METRIC = Metric(
    name="geneval2",
    title="GenEval 2",
    unit="Soft-TIFA GM (%)",
    digits=2,
    factor=100,
    limits=(0, 100),
    metadata="vqa_list",
    served=True,
    optional=True,
    version="Qwen3-VL-8B-Instruct",
    resources=("qwen3-vl-8b",),
)


def connect(url: str, folder: Folder, images: int) -> ChatJudge:
    from tafs.rewards.geneval2 import GenEval2

    return GenEval2(url, images=images, folder=folder("qwen3-vl-8b"))


REWARD = RewardPlugin.served(METRIC, connect)
