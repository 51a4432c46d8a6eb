"""Pref-GRPO (Wang et al., 2025, arXiv 2508.20751): GRPO on win rates within a group.

    w_i = 1 / (G - 1) sum over j != i of [i is preferred to j],   A_i = (w_i - mean w) / std w

Images are compared in pairs and not by the differences of their scores, which may be tiny and are
then blown up by the normalisation. Rollout and objective are those of Flow-GRPO.

As published, except:
- An image is preferred if its reward is larger, and a tie counts half. In the paper a
  vision-language model judges each pair.
- Rollout and trained steps are those of this project's Flow-GRPO.
- `beta` is 0 by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tafs.methods import PolicyGradient, grpo


@dataclass(frozen=True, kw_only=True)
class PrefGrpo(PolicyGradient):
    """Flow-GRPO with the win rate of each image as its reward."""

    steps: int = 10
    trained: int = 6  # how many of the first steps are trained; at most steps - 1
    sampler: str = "flow_sde"
    updates: int = 2
    ema: float = 0.9
    ema_warmup: bool = True
    advantage_limit: float | None = 5.0

    TITLE: ClassVar[str] = "Pref-GRPO"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._between("trained", 1, self.steps - 1)

    def trained_steps(self, iteration: int) -> Sequence[int]:
        return range(self.trained)

    def advantages(self, rewards: Tensor) -> Tensor:
        return super().advantages(win_rates(rewards))


def win_rates(rewards: Tensor) -> Tensor:
    """Return the share of the group's other known images that each image beats, [..., G].

    Rewards that differ by no more than float rounding are a tie. A missing reward is NaN, and so
    is its win rate.
    """
    one, other = rewards.unsqueeze(-1), rewards.unsqueeze(-2)
    rounding = grpo.SAME_ULPS * torch.finfo(rewards.dtype).eps
    tie = (one - other).abs() <= rounding * torch.maximum(one.abs(), other.abs())
    won = torch.where(tie, 0.5, (one > other).to(rewards.dtype))
    others = (~rewards.isnan()).sum(-1, keepdim=True) - 1
    rates = (won.sum(-1) - 0.5) / others.clamp(min=1)  # without the tie with itself
    return rates.masked_fill(rewards.isnan(), torch.nan)


METHOD = PrefGrpo
