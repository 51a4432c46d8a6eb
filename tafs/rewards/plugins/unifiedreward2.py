"""UnifiedReward-2.0 (Wang et al., 2025, arXiv 2503.05236): grades for three axes, from 1 to 5.

The mean of its grades for alignment, coherence and style, asked with its authors' question. The
model is UnifiedReward-2.0-qwen-7b, a Qwen2.5-VL that vLLM serves (MIT License). Images are sent at
their own size, as PNG where the authors send JPEG. Another judge of the kind of UnifiedReward: an
evaluation computes it in its place if `evaluation.judge` names it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tafs.rewards.metrics import Folder, Metric, RewardPlugin

if TYPE_CHECKING:
    from tafs.rewards.chat import ChatJudge

METRIC = Metric(
    name="unifiedreward2",
    title="UnifiedReward-2.0",
    unit="score (1 to 5)",
    digits=3,
    limits=(1, 5),
    scale=5.0,
    served=True,
    optional=True,
    version="UnifiedReward-2.0-qwen-7b",
    resources=("unifiedreward-2",),
)


def connect(url: str, folder: Folder, images: int) -> ChatJudge:
    from tafs.rewards.unifiedreward import UnifiedReward2

    return UnifiedReward2(url, images=images)


REWARD = RewardPlugin.served(METRIC, connect)
