"""AWM, advantage weighted matching (Xue et al., 2025, arXiv 2509.25050): GRPO on the training loss.

    x_t   = (1 - t) x_0 + t e
    log p = -h(mean (v_theta(x_t, t) - (e - x_0))^2) t,  h(d) = ((d + c)^p - c^p) / p,  c = 1e-10
    r     = exp(log p_theta - log p_old),  with the same t and e
    loss  = -E min(r A, clip(r, 1 - eps, 1 + eps) A) + w E (v_theta - v_old)^2

The flow-matching loss stands for the log-likelihood of an image, so that any sampler can be used.
h is the generalised Huber loss of the public code with p = `power`, and A is scaled to [-1, 1].

As published, with the settings of the public code, except:
- The rollout takes Euler steps with the scale's guidance; the public code a second-order stochastic
  solver (SA-Solver) without guidance.
- The times are distinct ones of the rollout's grid; the public code draws one from each of six
  equal parts of its first 90 % (PickScore), or steps without the first and the last two.
- The last term compares with the policy that sampled; the public code with an average of it that
  forgets all but 30 % in each iteration.
- The distance to the base model (`beta`) has weight 0; 1e-4 to 3e-3 in the public code.
- No average of the adapter is saved by default; the public code has one with `ema` 0.99.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tafs.methods import ForwardProcess, Trajectory, forward_process, grpo

SMALLEST = 1e-10  # c


@dataclass(frozen=True, kw_only=True)
class Awm(ForwardProcess):
    """GRPO whose log-likelihood is minus the flow-matching loss of noised copies."""

    steps: int = 14
    copies: int = 6
    clip_range: float = 1.0
    power: float = 0.25  # p
    old_weight: float = 1.0  # w; holds back all optimiser steps of an iteration but the first
    global_std: bool = True
    advantage_limit: float = 5.0

    TITLE: ClassVar[str] = "AWM"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("clip_range", 0)
        self._at_least("old_weight", 0)
        for name in ("power", "advantage_limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not above 0")

    def loss(
        self, v: Tensor, trajectory: Trajectory, index: tuple[int, slice], advantages: Tensor
    ) -> grpo.Objective:
        old = trajectory.records[forward_process.VELOCITY][index]
        objective = grpo.clipped_objective(
            self.log_likelihood(v, trajectory, index),
            self.log_likelihood(old, trajectory, index),
            advantages / self.advantage_limit,
            self.clip_range,
        )
        change = forward_process.mean_square(v - old).mean()
        return objective._replace(loss=objective.loss + self.old_weight * change)

    def log_likelihood(self, v: Tensor, trajectory: Trajectory, index: tuple[int, slice]) -> Tensor:
        """Return log p of the images for a velocity at their copies, up to a constant, [b]."""
        distance = forward_process.mean_square(v - forward_process.target(trajectory, index))
        huber = (distance + SMALLEST) ** self.power - SMALLEST**self.power
        return -huber / self.power * trajectory.t[index]


METHOD = Awm
