"""Saturation: the mean over an image's pixels of HSV's saturation.

A statistic of the damage panel: rewards of preference tend to raise it.
"""

from __future__ import annotations

from tafs.rewards.metrics import Folder, Metric, Reward, RewardPlugin

METRIC = Metric(
    name="saturation",
    title="Saturation",
    unit="% (HSV)",
    digits=2,
    factor=100,
    limits=(0, 100),
    differentiable=True,
    optional=True,
    version="mean saturation of HSV",
)


def build(device: str, folder: Folder) -> Reward:
    from tafs.rewards import statistics

    return statistics.reward(METRIC, statistics.saturation)


REWARD = RewardPlugin(METRIC, build)
