"""Rewards by name: what each measures, on which scale it trains and on which it is reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tafs.data.prompts import Prompt
from tafs.rewards.metrics import METRICS

# Of the images of an iteration or an evaluation that may have no score before the work stops.
MISSING_SHARE = 0.1
ROUNDING = 1e-3  # how far from [0, 1] arithmetic may carry a pixel: a quarter of an 8-bit step


class Scorer(Protocol):
    """Scores images against prompts on the training scale."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B] float32; NaN is a missing value."""
        ...


@dataclass(frozen=True)
class Reward:
    """A reward model: `report` maps the training scale to the reported one."""

    name: str
    score: Scorer
    report: Callable[[Tensor], Tensor]
    differentiable: bool
    higher_is_better: bool = True
    record: Callable[[], dict[str, str]] = dict  # its version and scale, for provenance
    served: bool = False  # by a server, whose scores depend a little on what else it is asked


class RewardSet:
    """Several rewards on one device, loaded once."""

    def __init__(self, rewards: Sequence[Reward]) -> None:
        self.rewards = tuple(rewards)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(r.name for r in self.rewards)

    @torch.no_grad()
    def score(
        self, images: Tensor, prompts: Sequence[Prompt], chunk: int = 512
    ) -> dict[str, Tensor]:
        """Training-scale scores by name, [B] each; images [B, 3, H, W] in [0, 1].

        Raises:
            ValueError: an image holds NaN or infinity; names the rewards and the image.
        """
        check_finite(", ".join(self.names), images)
        out = {}
        for reward in self.rewards:
            parts = [
                reward.score(images[low : low + chunk], prompts[low : low + chunk])
                for low in range(0, len(images), chunk)
            ]
            out[reward.name] = torch.cat(parts)
        return out

    def differentiate(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Training-scale scores by name, [B] each, with gradients to the images.

        Raises:
            ValueError: a reward has no gradient, or an image holds NaN or infinity; names them.
        """
        check_finite(", ".join(self.names), images)
        for reward in self.rewards:
            if not reward.differentiable:
                raise ValueError(f"reward {reward.name!r} is not differentiable")
        return {reward.name: reward.score(images, prompts) for reward in self.rewards}

    def report(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same scores on the scale on which each metric is published."""
        return {r.name: r.report(scores[r.name]) for r in self.rewards}


def check_finite(name: str, images: Tensor) -> None:
    """Refuse images [B, ...] that a broken model left.

    Raises:
        ValueError: an image holds NaN or infinity; names the reward and the image.
    """
    broken = ~images.detach().flatten(1).isfinite().all(1)
    if broken.any():
        first = int(broken.nonzero()[0, 0])
        raise ValueError(f"reward {name}: image {first} of {len(images)} holds NaN or infinity")


def check_images(name: str, images: Tensor, prompts: Sequence[Prompt]) -> None:
    """Refuse what a model of photographs would score without a word.

    Raises:
        ValueError: images are not [B, 3, H, W] with a prompt each, not finite or not in [0, 1];
            names the reward.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"reward {name}: images are [B, 3, H, W], not {list(images.shape)}")
    if len(images) != len(prompts):
        raise ValueError(f"reward {name}: {len(images)} images, but {len(prompts)} prompts")
    check_finite(name, images)
    low, high = (value.item() for value in images.detach().aminmax())
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ValueError(
            f"reward {name}: images lie in [0, 1], these reach from {low:.3g} to {high:.3g}"
        )


def load(names: Sequence[str], build: Callable[[str], Reward]) -> RewardSet:
    """The rewards of these names, as a world builds them.

    Raises:
        ValueError: an unknown reward; lists those there are.
    """
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown reward {name!r} (available: {', '.join(METRICS)})")
    return RewardSet([build(name) for name in names])
