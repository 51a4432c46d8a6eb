"""Sharpness: the variance of the luma's Laplacian (Pech-Pacheco et al., 2000).

A statistic of the damage panel: it falls if training blurs, and rises with noise.
"""

from __future__ import annotations

import math

from tafs.rewards.metrics import Folder, Metric, Reward, RewardPlugin

METRIC = Metric(
    name="sharpness",
    title="Sharpness",
    unit="variance (8-bit levels squared)",
    digits=1,
    limits=(0, math.inf),
    differentiable=True,
    optional=True,
    version="variance of the Laplacian",
)


def build(device: str, folder: Folder) -> Reward:
    from tafs.rewards import statistics

    return statistics.reward(METRIC, statistics.sharpness)


REWARD = RewardPlugin(METRIC, build)
