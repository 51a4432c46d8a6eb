"""HPSv2.1 (Wu et al., 2023, arXiv 2306.09341): the cosine of a ViT-H-14 tuned on preferences."""

from __future__ import annotations

from tafs.rewards.metrics import Folder, Metric, Reward, RewardPlugin

METRIC = Metric(
    name="hpsv2",
    title="HPSv2.1",
    unit="score",
    digits=3,
    published="hpsv2_1",
    differentiable=True,
    version="xswu/HPSv2 HPS_v2.1_compressed.pt",
    resources=("hpsv2",),
    castable=("hpsv2",),
)


def build(device: str, folder: Folder) -> Reward:
    from tafs.rewards.hpsv2 import HPSv2

    return HPSv2(folder("hpsv2") / "HPS_v2.1_compressed.pt", device).reward()


REWARD = RewardPlugin(METRIC, build)
