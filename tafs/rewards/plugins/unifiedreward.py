"""UnifiedReward (Wang et al., 2025, arXiv 2503.05236): a vision language model that grades 1 to 5.

The published model runs in a chat server of its own (`tafs.rewards.unifiedreward`), which the
evaluation starts; only the embedded model scores in the training process.
"""

from __future__ import annotations

from tafs.rewards.metrics import Folder, Metric, Reward, RewardPlugin

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


def build(device: str, folder: Folder) -> Reward:
    raise ValueError(
        f"reward {METRIC.name!r} is scored by a server and cannot be loaded into this process; "
        "remove it from the task's rewards"
    )


REWARD = RewardPlugin(METRIC, build)
