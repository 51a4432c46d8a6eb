"""GRPO-Guard (Wang et al., 2025, arXiv 2510.22319): a normalised ratio and balanced gradients.

    m    = mean (mu - mu_old)^2 / (2 sigma^2),   sigma the std of the step from t to s
    r    = exp((log p - log p_old + m) sigma)
    loss = -mean min(r A, clip(r, 1 - eps, 1 + eps) A) / (t - s)

The logarithm of the plain ratio has mean -m, so that positive advantages are rarely clipped, and a
scale of 1 / sigma that differs between steps. r has neither (ratio normalisation), and division by
the step's length gives all steps gradients of the same size (gradient reweighting). Rollout and
advantages are those of Flow-GRPO, with the std of each group, as in the public code.

As published, except:
- Rollout and trained steps are those of this project's Flow-GRPO.
- The clip range is the public code's for PickScore, 4e-6; it has 2e-6 for OCR and GenEval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tafs.methods import PolicyGradient, Trajectory, grpo
from tafs.models.sampling import Transition

MEAN = "mean"  # the record mu_old


@dataclass(frozen=True, kw_only=True)
class GrpoGuard(PolicyGradient):
    """Flow-GRPO with regulated clipping."""

    steps: int = 10
    trained: int = 6  # how many of the first steps are trained; at most steps - 1
    sampler: str = "flow_sde"
    updates: int = 2
    ema: float = 0.9
    ema_warmup: bool = True
    clip_range: float = 4e-6
    advantage_limit: float | None = 5.0

    TITLE: ClassVar[str] = "GRPO-Guard"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._between("trained", 1, self.steps - 1)

    def trained_steps(self, iteration: int) -> Sequence[int]:
        return range(self.trained)

    def record(self, transition: Transition) -> Mapping[str, Tensor]:
        return {MEAN: transition.mean}

    def objective(
        self,
        transition: Transition,
        trajectory: Trajectory,
        index: tuple[int, slice],
        advantages: Tensor,
    ) -> grpo.Objective:
        bias = grpo.gaussian_kl(transition.mean, trajectory.records[MEAN][index], transition.std)
        log_ratio = transition.log_prob(trajectory.x_s[index]) - trajectory.log_prob[index] + bias
        normalised = log_ratio * transition.std.flatten(1)[:, 0]
        length = trajectory.t[index] - trajectory.s[index]
        none = torch.zeros_like(normalised)
        return grpo.clipped_objective(normalised, none, advantages / length, self.clip_range)


METHOD = GrpoGuard
