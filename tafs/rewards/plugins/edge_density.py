"""Edge density: the share of pixels on an edge, where Sobel's gradient of the luma is at least 0.1.

A statistic of the damage panel: it falls if training removes detail, and rises with noise.
"""

from __future__ import annotations

from tafs.rewards.metrics import Folder, Metric, Reward, RewardPlugin

METRIC = Metric(
    name="edge_density",
    title="Edge density",
    unit="% of pixels",
    digits=2,
    factor=100,
    limits=(0, 100),
    optional=True,
    version="Sobel, 0.1 per pixel",
)


def build(device: str, folder: Folder) -> Reward:
    from tafs.rewards import statistics

    return statistics.reward(METRIC, statistics.edge_density)


REWARD = RewardPlugin(METRIC, build)
