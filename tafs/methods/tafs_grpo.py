"""TAFS-GRPO: few-step sampling with re-noising, step-aware advantages (Yue et al., 2026).

arXiv 2602.01591, "Know Your Step: Faster and Better Alignment for Flow Matching Models via
Step-aware Advantages". With t_n = 1 - (n - 1) / N, v = v_theta(x_{t_n}, t_n), e ~ N(0, I):

    x0_hat^n    = x_{t_n} - t_n v                                          (Eq. 4)
    x_{t_{n+1}} = (1 - t_{n+1}) x0_hat^n + t_{n+1} e                       (Eqs. 5-7)
    A_i^n       = (R_i^n - mean_n) / std_n over the images i of a prompt   (Eq. 9)
    loss        = -mean_{i, n = 2..N} min(r A, clip(r, 1 - eps, 1 + eps) A)  (Eq. 10)

As published, except where the paper is ambiguous:
- The ratio of step n is that of the re-noising transition x_{t_{n-1}} -> x_{t_n}, which leads to
  the image x0_hat^n. The printed p(x_0^n | x_t) has no density, because x0_hat^n is a deterministic
  function of x_t.
- Eq. 10 credits each step with its own advantage, Algorithm 1 (line 18) with the sum of all.
  `credit_reading` selects one of these, or `to_go`, `final` or `gain`.
- The paper does not give the clip range.

Ablations of the paper: `sampler: flow_sde` with `credit_reading: final` is "w/o TAFS",
`credit_reading: final` is "w/o Step Adv."; `steps` is N_annealed + 1, `n_adv` is N_adv.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tafs.methods import PolicyGradient, grpo

# What a step adds to the reward of the image before it, as in Stepwise-Flow-GRPO.
GAIN = "gain"
CREDITS = (*grpo.CREDITS, GAIN)


@dataclass(frozen=True, kw_only=True)
class TafsGrpo(PolicyGradient):
    """N = `steps` evaluations with N - 1 re-noisings ("annealed steps"), all of them trained."""

    steps: int = 4
    sampler: str = "anneal"
    time_grid: str = "uniform"
    credit_reading: str = "step"  # one of CREDITS
    n_adv: int | None = None  # how many of the last images are scored; None: all N - 1

    TITLE: ClassVar[str] = "TAFS-GRPO"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 2:
            raise ValueError(f"steps: {self.steps} leaves no re-noising; at least 2 are needed")
        if self.credit_reading not in CREDITS:
            options = ", ".join(CREDITS)
            raise ValueError(
                f"credit_reading: unknown {self.credit_reading!r} (available: {options})"
            )
        if self.n_adv is not None:
            self._between("n_adv", 1, self.steps - 1)

    def trained_steps(self, iteration: int) -> Sequence[int]:
        return range(self.steps - 1)

    def scored_steps(self) -> Sequence[int]:
        """Return the last N_adv images' steps, and for gains the one before them.

        Otherwise the first image is not scored.
        """
        counted = 1 if self.credit_reading == "final" else self.n_adv or self.steps - 1
        return range(self.steps - counted - (self.credit_reading == GAIN), self.steps)

    def advantages(self, rewards: Tensor) -> Tensor:
        """Normalise the rewards, or their gains."""
        return super().advantages(rewards.diff(dim=0) if self.credit_reading == GAIN else rewards)

    def assign_credit(self, advantages: Tensor, steps: int) -> Tensor:
        credit = "step" if self.credit_reading == GAIN else self.credit_reading
        return grpo.assign_credit(advantages, credit, steps)


METHOD = TafsGrpo
