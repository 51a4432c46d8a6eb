"""Writes the golden scores that the package ships: `python -m tafs.assets.shipped_scores`.

They are those of the rewards of this folder that need no download, in every variant that an asset
source has. Call it after an intended change of such a reward, with another `version` of its metric.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tafs.rewards import golden, metrics
from tafs.rewards.metrics import METRICS, Reward
from tafs.rewards.template import FOLDER
from tafs.words import rewards as words


def rewards() -> Iterator[Reward]:
    """The shipped rewards that need no download, on the CPU."""
    for name, metric in METRICS.items():
        own = Path(metrics.PLUGINS.source(name)).parent == FOLDER
        if own and not (metric.resources or metric.served):
            yield metrics.plugin(name).build("cpu", Path)
    yield words.ocr()


def main() -> None:
    golden.ship(list(rewards()))
    print(golden.SHIPPED)


if __name__ == "__main__":
    main()
