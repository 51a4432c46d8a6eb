"""MixGRPO (Li et al., 2025, arXiv 2507.21802): SDE steps in a sliding window, the ODE outside.

As published, except:
- The window keeps its size and starts anew when it reaches the end; in the public code it shrinks
  there and is empty for a while.
- The window stays before the last step, so the scored image is clean.
- `flash_steps` is MixGRPO-Flash: behind the window, so many steps of DPM-Solver++(2M) in place of
  Euler's remaining ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tafs.methods.policy_gradient import PolicyGradient
from tafs.models import sampling
from tafs.models.base import Backbone


@dataclass(frozen=True, kw_only=True)
class MixGrpo(PolicyGradient):
    """`window` SDE steps are trained; they move by one step every `interval` iterations."""

    steps: int = 25
    window: int = 4
    interval: int = 25
    flash_steps: int | None = None
    sampler: str = "flow_sde"
    updates: int = 2
    normalize_rewards: bool = True
    shared_noise: bool = True
    advantage_limit: float | None = 5.0

    TITLE: ClassVar[str] = "MixGRPO"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._between("window", 1, self.steps - 1)
        self._at_least("interval", 1)
        if self.flash_steps is not None:
            self._at_least("flash_steps", 1)

    @property
    def _places(self) -> int:
        """How many places the window takes before it starts anew."""
        return self.steps - self.window

    @property
    def nfe_old(self) -> float:
        """Of MixGRPO-Flash the mean over the window's places, the later the costlier."""
        if self.flash_steps is None:
            return self.steps
        return statistics.fmean(
            min(place + self.window + self.flash_steps, self.steps) for place in range(self._places)
        )

    def trained_steps(self, iteration: int) -> Sequence[int]:
        start = iteration // self.interval % self._places
        return range(start, start + self.window)

    def stochastic_steps(self, iteration: int) -> Sequence[int]:
        return self.trained_steps(iteration)

    def grid(self, backbone: Backbone, iteration: int) -> Tensor:
        grid = super().grid(backbone, iteration)
        behind = self.trained_steps(iteration)[-1] + 1
        if self.flash_steps is None or self.steps - behind <= self.flash_steps:
            return grid
        places = torch.linspace(behind, self.steps, self.flash_steps + 1).round().long()
        return torch.cat([grid[:behind], grid[places]])

    def deterministic_step(
        self, past: Sequence[tuple[Tensor, Tensor]], x_t: Tensor, s: Tensor
    ) -> Tensor:
        if self.flash_steps is None or len(past) < 2 or past[-2][1][0] >= 1:
            return super().deterministic_step(
                past, x_t, s
            )  # the second order needs an estimate before t = 1
        (x0_before, t_before), (x0_hat, t) = past[-2:]
        return sampling.dpm_solver_to(x_t, x0_hat, t, s, x0_before, t_before)


METHOD = MixGrpo
