"""The published rewards: which class scores each, from which resources."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tafs.rewards.metrics import RESOURCES, SERVED
from tafs.rewards.registry import Reward


def build(
    name: str,
    folder: Callable[[str], Path],
    device: torch.device | str,
    *,
    strict_geneval: bool = False,
) -> Reward:
    """One reward on a device.

    Args:
        name: of RESOURCES, but for SERVED.
        folder: a resource's name -> its folder.
        strict_geneval: GenEval's 0/1 verdict (evaluation) in place of the graded credit (training).

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or the reward is SERVED; names
            it.
    """
    if name == SERVED:
        raise ValueError(f"reward {name!r} is behind a server and judges finished images only")
    folders = [folder(resource) for resource in RESOURCES[name]]
    if name == "clip":
        from tafs.rewards.clip import CLIPScore

        return CLIPScore(folders[0], device).reward()
    if name == "pickscore":
        from tafs.rewards.clip import PickScore

        return PickScore(folders[0], folders[1], device).reward()
    if name == "hpsv2":
        from tafs.rewards.hpsv2 import HPSv2

        return HPSv2(folders[0] / "HPS_v2.1_compressed.pt", device).reward()
    if name == "imagereward":
        from tafs.rewards.imagereward import ImageReward

        model, tokenizer = folders
        weights, config = model / "ImageReward.pt", model / "med_config.json"
        return ImageReward(weights, config, tokenizer, device).reward()
    from tafs.rewards.detector import GenEval, Mask2FormerDetector

    detector = Mask2FormerDetector(folders[0], folders[1], device)
    return GenEval(detector, strict=strict_geneval).reward()
