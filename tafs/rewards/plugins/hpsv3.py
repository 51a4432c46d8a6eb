"""HPSv3 (Ma et al., 2025, arXiv 2508.03789): a Qwen2-VL-7B trained on a wide range of preferences.

The mean of the normal distribution that it gives an image's score; about 0 to 15 for published
models. Its weights are under the Apache License 2.0, 17 GB in bfloat16.
"""

from __future__ import annotations

from tafs.rewards.metrics import Folder, Metric, Reward, RewardPlugin

METRIC = Metric(
    name="hpsv3",
    title="HPSv3",
    unit="score",
    digits=2,
    differentiable=True,
    optional=True,
    version="MizzenAI/HPSv3 HPSv3.safetensors",
    resources=("hpsv3", "qwen2-vl-7b"),
)


def build(device: str, folder: Folder) -> Reward:
    from tafs.rewards.hpsv3 import HPSv3

    return HPSv3(folder("hpsv3") / "HPSv3.safetensors", folder("qwen2-vl-7b"), device).reward()


REWARD = RewardPlugin(METRIC, build)
