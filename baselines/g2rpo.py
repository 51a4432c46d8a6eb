"""Granular-GRPO, G2RPO (Zhou et al., 2025, arXiv 2510.01982): dense rewards of single SDE steps.

    x_s = x_t + [v + g^2 / (2t) (x_t + (1 - t) v)] (s - t) + g sqrt(t - s) e,
    g   = eta sqrt(t / (1 - t))
    A_i^n = sum_k (R_i^{n,k} - mean) / std over the images i of a prompt

All images of a prompt share one ODE trajectory. Each image leaves it at each of the first `trained`
steps n with one SDE step, and is finished along the ODE at several granularities k: with all later
times of the grid, with every second one, and so on. The clipped objective of step n uses the sum
of the advantages over the granularities (the multi-granularity advantage integration).

As published, except:
- The time grid is the model's own; the public code shifts a uniform grid by 3.
- All trained steps share an optimiser step, as in the public code for HPS and CLIP; that for HPS
  alone takes one for each of them.
- Advantages are clamped before they are summed over rewards and granularities, and stds are not
  Bessel-corrected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tafs.methods import Branching


@dataclass(frozen=True, kw_only=True)
class G2rpo(Branching):
    """GRPO on branches of single SDE steps, each finished at `granularities` step sizes."""

    steps: int = 16
    trained: int = 8  # how many of the first steps branch; at most steps - 1
    granularities: int = 2  # step sizes 1 to this many grid intervals
    sampler: str = "flow_sde"
    updates: int = 2
    normalize_rewards: bool = True
    advantage_limit: float | None = 5.0

    TITLE: ClassVar[str] = "G2RPO"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._between("trained", 1, self.steps - 1)
        self._between("granularities", 1, self.steps)

    def trained_steps(self, iteration: int) -> Sequence[int]:
        return range(self.trained)

    def suffixes(self, grid: Tensor, n: int) -> Sequence[Tensor]:
        """Return grid[n + 1] and every k-th time from grid[n + 2], for k = 1 to `granularities`.

        The last time is 0, so that the last interval is longer where the size does not fit.
        """
        found = []
        for size in range(1, self.granularities + 1):
            times = torch.cat([grid[n + 1 : n + 2], grid[n + 2 :: size]])
            times[-1] = 0
            found.append(times)
        return found


METHOD = G2rpo
