"""Flow-GRPO (Liu et al., 2025, arXiv 2505.05470): GRPO on an SDE with the ODE's marginals.

As published, except:
- Ten rollout steps with the first six trained, the setting of TAFS-GRPO's Table 2.
- The last step is taken without noise (it is never trained), so the scored image is clean.
- `beta` is 0 by default, as for FLUX.1-dev there; a positive one adds the KL to the base model.

`sampler: cps` trains it on coefficient-preserving sampling (Wang and Yu, 2025) instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tafs.methods.policy_gradient import PolicyGradient


@dataclass(frozen=True, kw_only=True)
class FlowGrpo(PolicyGradient):
    """SDE steps of noise level `eta`; every trained step gets the final image's advantage."""

    steps: int = 10
    trained: int = 6  # the first steps; the last one is never trained
    sampler: str = "flow_sde"
    updates: int = 2
    ema: float = 0.9
    global_std: bool = True
    advantage_limit: float | None = 5.0

    TITLE: ClassVar[str] = "Flow-GRPO"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._between("trained", 1, self.steps - 1)

    def trained_steps(self, iteration: int) -> Sequence[int]:
        return range(self.trained)


METHOD = FlowGrpo
