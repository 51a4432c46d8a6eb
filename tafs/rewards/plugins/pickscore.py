"""PickScore v1 (Kirstain et al., 2023, arXiv 2305.01569); training divides it by 26 (Flow-GRPO)."""

from __future__ import annotations

from tafs.rewards.metrics import Folder, Metric, Reward, RewardPlugin

METRIC = Metric(
    name="pickscore",
    title="PickScore",
    unit="score",
    digits=2,
    published="pickscore",
    scale=26.0,
    differentiable=True,
    version="yuvalkirstain/PickScore_v1",
    resources=("pickscore", "clip-vit-h-14"),
    castable=("pickscore",),
)


def build(device: str, folder: Folder) -> Reward:
    from tafs.rewards.clip import PickScore

    return PickScore(folder("pickscore"), folder("clip-vit-h-14"), device).reward()


REWARD = RewardPlugin(METRIC, build)
