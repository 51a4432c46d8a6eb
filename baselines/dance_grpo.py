"""DanceGRPO (Xue et al., 2025, arXiv 2505.07818): GRPO on an SDE with a constant noise level.

    x_s = x_t + [v + eta^2 / (2t) (x_t + (1 - t) v)] (s - t) + eta sqrt(t - s) e

A random `fraction` of each image's steps is trained on the clipped objective, with the group
advantage of the final image. The time grid is t -> shift t / (1 + (shift - 1) t).

As published, except:
- The last step is never trained: the default trains 14 of the 24 other steps (60 %).
- The scored image is the last step's estimate x0_hat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tafs.common.seeding import Generators
from tafs.methods import PolicyGradient
from tafs.models import Backbone, sampling


@dataclass(frozen=True, kw_only=True)
class DanceGrpo(PolicyGradient):
    """GRPO on a random `fraction` of each image's SDE steps."""

    steps: int = 25
    fraction: float = 0.6
    shift: float = 3.0  # of the uniform time grid towards noise; 1 leaves it uniform
    sampler: str = "dance_sde"
    eta: float = 0.3
    updates: int = 2
    normalize_rewards: bool = True
    shared_noise: bool = True
    advantage_limit: float | None = 5.0

    TITLE: ClassVar[str] = "DanceGRPO"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._between("fraction", 0, 1)
        self._at_least("shift", 1)
        if self.nfe_theta < 1:
            raise ValueError(
                f"fraction: {self.fraction} of {self.steps} steps is less than one step"
            )

    def grid(self, backbone: Backbone, iteration: int) -> Tensor:
        return sampling.shifted(sampling.uniform_grid(self.steps), self.shift)

    def trained_steps(self, iteration: int) -> Sequence[int]:
        return range(self.steps - 1)

    @property
    def nfe_theta(self) -> int:
        return int(self.fraction * (self.steps - 1))

    def select_steps(self, records: Sequence[Tensor], generators: Generators) -> Sequence[Tensor]:
        steps, batch = records[0].shape[:2]
        order = generators.rand([steps]).argsort(1)[:, : self.nfe_theta].T
        images = torch.arange(batch)
        return [record[order, images] for record in records]


METHOD = DanceGrpo
