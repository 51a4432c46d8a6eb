"""DanceGRPO (Xue et al., 2025, arXiv 2505.07818): GRPO on an SDE of constant noise level.

As published, except:
- The random 60 % of the steps are 14 of the 24 before the last one, which is never trained; they
  are drawn anew for every image. The scored image is the last step's estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tafs.methods.policy_gradient import PolicyGradient
from tafs.models import sampling
from tafs.models.base import Backbone


@dataclass(frozen=True, kw_only=True)
class DanceGrpo(PolicyGradient):
    """A random `fraction` of the steps of each image is trained, with its final advantage."""

    steps: int = 25
    fraction: float = 0.6
    shift: float = 3.0  # of the uniform grid towards noise
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
            raise ValueError(f"fraction: {self.fraction} of {self.steps} steps is none")

    def grid(self, backbone: Backbone, iteration: int) -> Tensor:
        return sampling.shifted(sampling.uniform_grid(self.steps), self.shift)

    def trained_steps(self, iteration: int) -> Sequence[int]:
        return range(self.steps - 1)

    @property
    def nfe_theta(self) -> int:
        return int(self.fraction * (self.steps - 1))

    def select_steps(
        self, records: Sequence[Tensor], generator: torch.Generator
    ) -> Sequence[Tensor]:
        steps, batch = records[0].shape[:2]
        order = torch.rand(steps, batch, generator=generator).argsort(0)[: self.nfe_theta]
        images = torch.arange(batch)
        return [record[order, images] for record in records]


METHOD = DanceGrpo
