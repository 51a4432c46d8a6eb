"""Reward models and metrics, a file each, behind one registry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """How a metric is reported; more is better for all of them."""

    title: str
    digits: int
    published: str  # its column in the paper's tables
    factor: float = 1.0  # reported value per unit of the score
    macro: bool = False  # the mean of the tasks' means, not of all images


METRICS = {
    "geneval": Metric("GenEval", 2, "geneval", factor=100, macro=True),
    "pickscore": Metric("PickScore", 2, "pickscore"),
    "clip": Metric("CLIP", 2, "clip"),
    "hpsv2": Metric("HPSv2.1", 3, "hpsv2_1"),
    "imagereward": Metric("ImageReward", 3, "imagereward"),
    "unifiedreward": Metric("UnifiedReward", 3, "unifiedreward"),
}


DIFFERENTIABLE = frozenset({"pickscore", "clip", "hpsv2", "imagereward", "unifiedreward"})


# The published models that each is made of, entries of resources.yaml.
RESOURCES = {
    "pickscore": ("pickscore", "clip-vit-h-14"),
    "clip": ("clip-vit-l-14",),
    "hpsv2": ("hpsv2",),
    "imagereward": ("imagereward", "bert-base-uncased"),
    "geneval": ("mask2former", "clip-vit-l-14"),
    "unifiedreward": ("unifiedreward", "siglip"),
}


SERVED = "unifiedreward"  # the published model is behind a server: `unifiedreward.UnifiedReward`
