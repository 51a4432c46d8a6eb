"""TempFlow-GRPO (He et al., 2025, arXiv 2508.04324): branches at every step, weighted by noise.

    x_s = x_t + [v + g^2 / (2t) (x_t + (1 - t) v)] (s - t) + sigma e,
    g   = eta sqrt(t / (1 - t)),  sigma = g sqrt(t - s)
    loss = -mean_n w_n min(r A, clip(r, 1 - eps, 1 + eps) A),  w_n = sigma_n / mean sigma

At each step n one SDE step leaves the ODE trajectory and is continued along the ODE (trajectory
branching); the reward of its image credits step n alone. Steps are weighted by their noise (noise-
aware weighting), and all branches of a prompt start from the same noise (seed group).

As published, except:
- One seed per prompt with as many branches as the group has images. The public code has four seeds
  with six branches each.
- The weights are normalised by their mean over the trained steps; the public code multiplies sigma
  by 2.25 (SD3) or 1.73 (FLUX), which has that effect on its grid.
- `beta` is 0 by default, as for the other methods here; the public code has 0.001 to 0.004.
- The average is updated after each optimiser step; in the public code after every eighth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tafs.methods import Branching, Trajectory, grpo
from tafs.models.sampling import Transition


@dataclass(frozen=True, kw_only=True)
class TempflowGrpo(Branching):
    """GRPO on branches of single SDE steps, each weighted by its noise."""

    steps: int = 10
    trained: int = 9  # how many of the first steps branch; at most steps - 1
    sampler: str = "flow_sde"
    updates: int = 2
    ema: float = 0.9
    ema_warmup: bool = True
    advantage_limit: float | None = 5.0

    TITLE: ClassVar[str] = "TempFlow-GRPO"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._between("trained", 1, self.steps - 1)

    def trained_steps(self, iteration: int) -> Sequence[int]:
        return range(self.trained)

    def objective(
        self,
        transition: Transition,
        trajectory: Trajectory,
        index: tuple[int, slice],
        advantages: Tensor,
    ) -> grpo.Objective:
        weighted = advantages * self.weights(trajectory)[index]
        return super().objective(transition, trajectory, index, weighted)

    def weights(self, trajectory: Trajectory) -> Tensor:
        """Return the standard deviations of the steps over their mean, [T, B]."""
        t, s = trajectory.t, trajectory.s
        none = torch.zeros(t.shape[1], 1, device=t.device)  # a std depends on the times alone
        stds = [self.transition(none, none, *times).std[:, 0] for times in zip(t, s, strict=True)]
        std = torch.stack(stds)
        return std / std.mean(0)


METHOD = TempflowGrpo
