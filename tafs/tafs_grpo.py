"""TAFS-GRPO: temperature-annealed few-step sampling, step-aware advantages (Yue et al., 2026).

As published, except where the paper is ambiguous:
- The ratio of step n is that of the re-noising transition x_{t_{n-1}} -> x_{t_n}, whose action
  leads to the image x0_hat^n; the printed p(x_0^n | x_t) has no density (Eq. 10).
- Eq. 10 credits each step with its own advantage, Algorithm 1 (line 18) with the sum; both can be
  chosen (`credit`), and `to_go` and `final` beside them.
- The clip range is not given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tafs import grpo, sampling
from tafs.method import Method
from tafs.sampling import Transition


@dataclass(frozen=True, kw_only=True)
class TafsGrpo(Method):
    """N = `steps` evaluations, N - 1 re-noisings ("annealed steps"), all of them trained."""

    steps: int = 4
    credit: str = "step"
    n_adv: int | None = None  # images that count, from the last one back; None: all N - 1

    TITLE: ClassVar[str] = "TAFS-GRPO"
    SAMPLER: ClassVar[str] = "anneal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 2:
            raise ValueError(f"steps: {self.steps} leaves no re-noising; at least 2 are needed")
        if self.credit not in grpo.CREDITS:
            options = ", ".join(grpo.CREDITS)
            raise ValueError(f"credit: unknown reading {self.credit!r} (available: {options})")
        if self.n_adv is not None and not 1 <= self.n_adv <= self.steps - 1:
            raise ValueError(f"n_adv: {self.n_adv} is not between 1 and {self.steps - 1}")

    def transition(self, x_t: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Transition:
        return sampling.anneal(x_t, v, t, s)

    def trained_steps(self, iteration: int) -> Sequence[int]:
        return range(self.steps - 1)

    def scored_steps(self) -> Sequence[int]:
        return range(1, self.steps)  # the first image is not scored

    def advantages(self, rewards: Tensor) -> Tensor:
        return grpo.assign_credit(grpo.group_advantages(rewards), self.credit, self.n_adv)


METHOD = TafsGrpo
