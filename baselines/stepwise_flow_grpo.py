"""Stepwise-Flow-GRPO (Savani et al., 2026, arXiv 2603.28718): credit by each step's gain.

    g_i^n = R(x0_hat_i^{n+1}) - R(x0_hat_i^n),   A_i^n = (g_i^n - mean_n) / std_n

x0_hat^n is the one-step estimate (Tweedie's formula) at the state before step n. A step is credited
with what it adds to the reward, not with the reward of the image that it leads to: the gains of a
trajectory's steps add up to the difference of its last and first reward. Rollout and objective are
those of Flow-GRPO.

As published, except:
- Flow-GRPO's SDE is used, not the DDIM-inspired SDE of the paper.
- Gains are normalised over the images of a prompt at the same step, as in Eq. 9 of TAFS-GRPO.
- Rollout and trained steps are those of this project's Flow-GRPO.

TAFS-GRPO's `credit_reading: gain` is this credit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tafs.methods import PolicyGradient


@dataclass(frozen=True, kw_only=True)
class StepwiseFlowGrpo(PolicyGradient):
    """GRPO whose steps are credited with the gain of the estimated image's reward."""

    steps: int = 10
    trained: int = 6  # how many of the first steps are trained; at most steps - 1
    sampler: str = "flow_sde"
    updates: int = 2
    ema: float = 0.9
    ema_warmup: bool = True
    advantage_limit: float | None = 5.0

    TITLE: ClassVar[str] = "Stepwise-Flow-GRPO"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._between("trained", 1, self.steps - 1)

    def trained_steps(self, iteration: int) -> Sequence[int]:
        return range(self.trained)

    def scored_steps(self) -> Sequence[int]:
        """Return the trained steps and the one after them."""
        return range(self.trained + 1)

    def advantages(self, rewards: Tensor) -> Tensor:
        """Normalise the gains, [K - 1, groups, G]."""
        return super().advantages(rewards.diff(dim=0))

    def assign_credit(self, advantages: Tensor, steps: int) -> Tensor:
        return advantages


METHOD = StepwiseFlowGrpo
