"""ImageReward (Xu et al., 2023, arXiv 2304.05977): the standardised score."""

from __future__ import annotations

from tafs.rewards.metrics import Folder, Metric, Reward, RewardPlugin

METRIC = Metric(
    name="imagereward",
    title="ImageReward",
    unit="score",
    digits=3,
    published="imagereward",
    differentiable=True,
    version="THUDM/ImageReward ImageReward.pt",
    resources=("imagereward", "bert-base-uncased"),
    castable=("imagereward",),
)


def build(device: str, folder: Folder) -> Reward:
    from tafs.rewards.imagereward import ImageReward

    files, tokenizer = folder("imagereward"), folder("bert-base-uncased")
    weights, config = files / "ImageReward.pt", files / "med_config.json"
    return ImageReward(weights, config, tokenizer, device).reward()


REWARD = RewardPlugin(METRIC, build)
