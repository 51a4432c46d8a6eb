"""Colour entropy: Shannon's entropy of an image's colours, in bits, at 8 levels per channel.

A statistic of the damage panel: it falls if training leaves few colours.
"""

from __future__ import annotations

from tafs.rewards.metrics import Folder, Metric, Reward, RewardPlugin

METRIC = Metric(
    name="colour_entropy",
    title="Colour entropy",
    unit="bits",
    digits=3,
    limits=(0, 9),
    optional=True,
    version="8 levels per channel",
)


def build(device: str, folder: Folder) -> Reward:
    from tafs.rewards import statistics

    return statistics.reward(METRIC, statistics.colour_entropy)


REWARD = RewardPlugin(METRIC, build)
