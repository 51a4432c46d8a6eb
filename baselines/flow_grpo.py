"""Flow-GRPO (Liu et al., 2025, arXiv 2505.05470): GRPO on an SDE with the ODE's marginals.

As published, except:
- Ten rollout steps with the first six trained, the setting of TAFS-GRPO's Table 2.
- The last step is taken without noise (it is never trained), so the scored image is clean.
- `beta` is 0 by default, as for FLUX.1-dev there; a positive one adds the KL to the base model.
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
class FlowGrpo(Method):
    """SDE steps of noise level `eta`; every trained step gets the final image's advantage."""

    steps: int = 10
    trained: int = 6  # the first steps; the last one is never trained
    eta: float = 0.7
    time_grid: str = "model"
    updates: int = 2
    ema: float = 0.9
    global_std: bool = True
    advantage_limit: float = 5.0

    TITLE: ClassVar[str] = "Flow-GRPO"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.trained < self.steps:
            raise ValueError(f"trained: {self.trained} is not between 1 and {self.steps - 1}")

    def transition(self, x_t: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Transition:
        return sampling.flow_sde(x_t, v, t, s, self.eta)

    def trained_steps(self, iteration: int) -> Sequence[int]:
        return range(self.trained)

    def advantages(self, rewards: Tensor) -> Tensor:
        normalise = grpo.global_std_advantages if self.global_std else grpo.group_advantages
        limit = self.advantage_limit
        return normalise(rewards).clamp(-limit, limit).expand(self.trained, -1, -1)


METHOD = FlowGrpo
