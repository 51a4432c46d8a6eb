"""GenEval (Ghosh et al., 2023, arXiv 2310.11513): objects, counts, colours and positions.

Training uses the graded credit of a prompt's requirements, evaluation the strict 0/1 verdict.
"""

from __future__ import annotations

from functools import partial

from tafs.rewards.metrics import Folder, Metric, Reward, RewardPlugin

METRIC = Metric(
    name="geneval",
    title="GenEval",
    unit="accuracy (%)",
    digits=2,
    published="geneval",
    factor=100,
    limits=(0, 100),
    macro=True,
    metadata="include",
    version="facebook/mask2former-swin-small-coco-instance, colours by "
    "openai/clip-vit-large-patch14",
    resources=("mask2former", "clip-vit-l-14"),
    castable=("clip-vit-l-14",),
)


def build(device: str, folder: Folder, strict: bool = False) -> Reward:
    from tafs.rewards.detector import GenEval, Mask2FormerDetector

    detector = Mask2FormerDetector(folder("mask2former"), folder("clip-vit-l-14"), device)
    return GenEval(detector, strict=strict).reward()


REWARD = RewardPlugin(METRIC, build, partial(build, strict=True))
