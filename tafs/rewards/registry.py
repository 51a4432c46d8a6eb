"""Rewards by name: what each measures, on which scale it trains and on which it is reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tafs.prompts import Prompt
from tafs.rewards import METRICS


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
        """Training-scale scores by name, [B] each; images [B, 3, H, W] in [0, 1]."""
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
            ValueError: a reward has no gradient; names it.
        """
        for reward in self.rewards:
            if not reward.differentiable:
                raise ValueError(f"reward {reward.name!r} is not differentiable")
        return {reward.name: reward.score(images, prompts) for reward in self.rewards}

    def report(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same scores on the scale on which each metric is published."""
        return {r.name: r.report(scores[r.name]) for r in self.rewards}


def load(names: Sequence[str], world: str, *, strict_geneval: bool = False) -> RewardSet:
    """Load reward models.

    Args:
        names: of METRICS.
        world: "shapes", the embedded models.
        strict_geneval: GenEval's 0/1 verdict (evaluation) in place of the graded credit (training).

    Raises:
        ValueError: an unknown reward or world; lists those there are.
    """
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown reward {name!r} (available: {', '.join(METRICS)})")
    if world != "shapes":
        raise ValueError(f"unknown reward world {world!r} (available: shapes)")
    from tafs.rewards import shapes

    return RewardSet([shapes.build(name, strict_geneval=strict_geneval) for name in names])
