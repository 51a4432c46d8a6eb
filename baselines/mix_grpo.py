"""MixGRPO (Li et al., 2025, arXiv 2507.21802): SDE steps in a sliding window, ODE steps outside.

Inside the window the steps are Flow-GRPO's SDE steps, outside it Euler steps of the ODE. Only the
window is trained, on the clipped objective with the final image's advantage; the advantages of
several rewards are normalised separately. The window moves by one step every `interval` iterations.

As published, except:
- The window keeps its size and returns to the start when it reaches the end. In the public code it
  shrinks at the end and is empty for several iterations.
- The window never contains the last step, so that the scored image is clean.

`flash_steps` selects MixGRPO-Flash: after the window, at most this many DPM-Solver++(2M) steps
replace the Euler steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tafs.methods import PolicyGradient
from tafs.models import Backbone, sampling


@dataclass(frozen=True, kw_only=True)
class MixGrpo(PolicyGradient):
    """GRPO on a sliding window of SDE steps."""

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

    def check_iterations(self, iterations: int) -> None:
        if 1 < self.interval >= iterations:
            raise ValueError(
                f"interval: {self.interval} is not less than the {iterations} iterations, so the "
                "window would never move"
            )

    @property
    def _positions(self) -> int:
        """The number of positions of the window."""
        return self.steps - self.window

    @property
    def nfe_old(self) -> float:
        """For MixGRPO-Flash, the mean over the window's positions."""
        if self.flash_steps is None:
            return self.steps
        flash = self.flash_steps
        ends = (position + self.window for position in range(self._positions))
        return statistics.fmean(min(end + flash, self.steps) for end in ends)

    def trained_steps(self, iteration: int) -> Sequence[int]:
        start = iteration // self.interval % self._positions
        return range(start, start + self.window)

    def stochastic_steps(self, iteration: int) -> Sequence[int]:
        return self.trained_steps(iteration)

    def grid(self, backbone: Backbone, iteration: int) -> Tensor:
        grid = super().grid(backbone, iteration)
        after = self.trained_steps(iteration)[-1] + 1
        if self.flash_steps is None or self.steps - after <= self.flash_steps:
            return grid
        points = torch.linspace(after, self.steps, self.flash_steps + 1).round().long()
        return torch.cat([grid[:after], grid[points]])

    def deterministic_step(
        self, past: Sequence[tuple[Tensor, Tensor]], x_t: Tensor, s: Tensor
    ) -> Tensor:
        if self.flash_steps is None or len(past) < 2 or past[-2][1][0] >= 1:
            # The second-order step needs an earlier estimate, at t < 1 where log((1 - t) / t) is
            # finite.
            return super().deterministic_step(past, x_t, s)
        (x0_before, t_before), (x0_hat, t) = past[-2:]
        return sampling.dpm_solver_to(x_t, x0_hat, t, s, x0_before, t_before)


METHOD = MixGrpo
