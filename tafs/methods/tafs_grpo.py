"""TAFS-GRPO: temperature-annealed few-step sampling, step-aware advantages (Yue et al., 2026).

As published, except where the paper is ambiguous:
- The ratio of step n is that of the re-noising transition x_{t_{n-1}} -> x_{t_n}, whose action
  leads to the image x0_hat^n; the printed p(x_0^n | x_t) has no density (Eq. 10).
- Eq. 10 credits each step with its own advantage, Algorithm 1 (line 18) with the sum; both can be
  chosen (`credit_reading`), and `to_go` and `final` beside them.
- The clip range is not given.

The ablations are settings: `sampler: flow_sde` with `credit_reading: final` is
"w/o TAFS", `credit_reading: final` is "w/o Step Adv.", `steps` is N_annealed + 1, `n_adv` is
N_adv.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tafs.methods import grpo
from tafs.methods.policy_gradient import PolicyGradient

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TafsGrpo(PolicyGradient):
    """N = `steps` evaluations, N - 1 re-noisings ("annealed steps"), all of them trained."""

    steps: int = 4
    sampler: str = "anneal"
    time_grid: str = "uniform"
    credit_reading: str = "step"  # one of grpo.CREDITS
    n_adv: int | None = None  # images that count, from the last one back; None: all N - 1

    TITLE: ClassVar[str] = "TAFS-GRPO"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 2:
            raise ValueError(f"steps: {self.steps} leaves no re-noising; at least 2 are needed")
        if self.credit_reading not in grpo.CREDITS:
            options = ", ".join(grpo.CREDITS)
            raise ValueError(
                f"credit_reading: unknown {self.credit_reading!r} (available: {options})"
            )
        if self.n_adv is not None:
            self._between("n_adv", 1, self.steps - 1)

    def trained_steps(self, iteration: int) -> Sequence[int]:
        return range(self.steps - 1)

    def scored_steps(self) -> Sequence[int]:
        """The last N_adv images; the first image of all is never scored."""
        counted = 1 if self.credit_reading == "final" else self.n_adv or self.steps - 1
        return range(self.steps - counted, self.steps)

    def assign_credit(self, advantages: Tensor, steps: int) -> Tensor:
        return grpo.assign_credit(advantages, self.credit_reading, steps)


METHOD = TafsGrpo
