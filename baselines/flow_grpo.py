"""Flow-GRPO (Liu et al., 2025, arXiv 2505.05470): GRPO on an SDE with the ODE's marginals.

    x_s = x_t + [v + g^2 / (2t) (x_t + (1 - t) v)] (s - t) + g sqrt(t - s) e,
    g   = eta sqrt(t / (1 - t))                                            (Eq. 9)

The advantage of the final image, normalised by the group's mean and the batch's std, is used for
all trained steps of the clipped objective.

As published, except:
- The rollout has ten steps of which the first six are trained, as in Table 2 of TAFS-GRPO.
- The last step has no noise and is never trained, so that the scored image is clean.
- The average is updated after every optimiser step; the public code updates it after every eighth.
- `beta` is 0 by default, as published for FLUX.1-dev; `beta` > 0 adds the KL to the base model.

`sampler: cps` replaces the SDE by coefficient-preserving sampling (Wang and Yu, 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tafs.methods import PolicyGradient


@dataclass(frozen=True, kw_only=True)
class FlowGrpo(PolicyGradient):
    """GRPO on the first SDE steps, with the final image's advantage."""

    steps: int = 10
    trained: int = 6  # how many of the first steps are trained; at most steps - 1
    sampler: str = "flow_sde"
    updates: int = 2
    ema: float = 0.9
    ema_warmup: bool = True
    global_std: bool = True
    advantage_limit: float | None = 5.0

    TITLE: ClassVar[str] = "Flow-GRPO"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._between("trained", 1, self.steps - 1)

    def trained_steps(self, iteration: int) -> Sequence[int]:
        return range(self.trained)


METHOD = FlowGrpo
