"""JPEG compressibility: minus the size of the JPEG file (Black et al., 2023, arXiv 2305.13301).

As in DDPO: the file of Pillow at quality 95, in units of 1000 bytes. It needs no model and no
prompt and has no gradient.
"""

from __future__ import annotations

from tafs.rewards.metrics import Folder, Metric, Reward, RewardPlugin

METRIC = Metric(
    name="jpeg_compressibility",
    title="JPEG size",
    unit="kB",
    digits=2,
    higher_is_better=False,
    scale=-1.0,  # published is the size, the reward its negative
    optional=True,
    version="JPEG, quality 95",
)


def build(device: str, folder: Folder) -> Reward:
    from tafs.rewards import statistics

    return statistics.reward(METRIC, statistics.jpeg_kilobytes)


REWARD = RewardPlugin(METRIC, build)
