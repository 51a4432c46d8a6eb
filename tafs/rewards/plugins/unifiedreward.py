"""UnifiedReward (Wang et al., 2025, arXiv 2503.05236): a vision language model that grades 1 to 5.

The published model runs in a chat server of its own (`tafs.rewards.chat`), which the evaluation
starts; only the embedded model scores in the training process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tafs.rewards.metrics import Folder, Metric, RewardPlugin

if TYPE_CHECKING:
    from tafs.rewards.chat import ChatJudge

METRIC = Metric(
    name="unifiedreward",
    title="UnifiedReward",
    unit="score (1 to 5)",
    digits=3,
    published="unifiedreward",
    limits=(1, 5),
    scale=5.0,
    differentiable=True,
    served=True,
    version="UnifiedReward-7b-v1.5",
    resources=("unifiedreward", "siglip"),
)


def connect(url: str, folder: Folder, images: int) -> ChatJudge:
    from tafs.rewards.unifiedreward import UnifiedReward

    return UnifiedReward(url, images=images)


REWARD = RewardPlugin.served(METRIC, connect)
