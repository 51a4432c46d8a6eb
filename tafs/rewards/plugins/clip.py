"""CLIP score (Hessel et al., 2021, arXiv 2104.08718): the cosine, published times 100."""

from __future__ import annotations

from tafs.rewards.metrics import Folder, Metric, Reward, RewardPlugin

METRIC = Metric(
    name="clip",
    title="CLIP",
    unit="100 × cosine",
    digits=2,
    published="clip",
    scale=100.0,
    differentiable=True,
    version="openai/clip-vit-large-patch14",
    resources=("clip-vit-l-14",),
    castable=("clip-vit-l-14",),
)


def build(device: str, folder: Folder) -> Reward:
    from tafs.rewards.clip import CLIPScore

    return CLIPScore(folder("clip-vit-l-14"), device).reward()


REWARD = RewardPlugin(METRIC, build)
