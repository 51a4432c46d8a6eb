"""DiffusionNFT (Zheng et al., 2025, arXiv 2509.16117): fine-tuning on good and bad samples.

    x_t  = (1 - t) x_0 + t e,  v = e - x_0,  r = 1/2 + clip(A / A_max, -1, 1) / 2
    v+   = (1 - b) v_old + b v_theta,   v- = (1 + b) v_old - b v_theta
    loss = A_max / b E[r |x+ - x_0|^2 / w+ + (1 - r) |x- - x_0|^2 / w-]

x+ and x- are the estimates x_t - t v+ and x_t - t v-, and w+ and w- the means of |x+ - x_0| and
|x- - x_0| over an image, without gradients. A is the group's mean-centred reward over the batch's
std. The images come from the old policy, which follows the trained one slowly: after iteration i,
theta_old <- d theta_old + (1 - d) theta with d = min(`old_rate` i, `old_limit`).

As published, with the weights w and A_max = 5 of the public code, except:
- Euler steps on the model's grid, with the guidance of the active scale; the public code samples
  with a second-order solver and without classifier-free guidance.
- The distance to the base model (`beta`) has weight 0; 1e-4 in the public code.
- The trained adapter is saved; the public code evaluates an average of it.

An image without a reward has r = 1/2: its loss only holds the policy at the old one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tafs.methods import ForwardProcess, Trajectory, forward_process
from tafs.models import sampling

SMALLEST = 1e-5  # of the weights w


@dataclass(frozen=True, kw_only=True)
class DiffusionNft(ForwardProcess):
    """Contrast the implicit positive and negative policies on noised copies of the images."""

    mixing: float = 1.0  # b: the share of the trained velocity in the positive one
    old_rate: float = 0.001
    old_limit: float = 0.5
    updates: int = 2
    global_std: bool = True
    advantage_limit: float = 5.0  # A_max

    TITLE: ClassVar[str] = "DiffusionNFT"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mixing > 0:
            raise ValueError(f"mixing: {self.mixing} is not above 0")
        self._at_least("old_rate", 0)
        self._between("old_limit", 0, 1)
        if not self.advantage_limit > 0:
            raise ValueError(f"advantage_limit: {self.advantage_limit} is not above 0")
        if self.ema:
            raise ValueError(
                f"ema: {self.ema} has no effect, because the averaged adapter is the old policy; "
                "set old_rate and old_limit"
            )

    @property
    def samples_average(self) -> bool:
        return True

    def decay(self, updates: int) -> float:
        """The old policy's, which changes after the last optimiser step of an iteration."""
        iterations, within = divmod(updates + 1, self.updates)
        return 1.0 if within else min(self.old_rate * iterations, self.old_limit)

    def loss(
        self, v: Tensor, trajectory: Trajectory, index: tuple[int, slice], advantages: Tensor
    ) -> Tensor:
        old = trajectory.records[forward_process.VELOCITY][index]
        limit, b = self.advantage_limit, self.mixing
        optimality = (0.5 + advantages / limit / 2).clamp(0, 1)
        positive = self.distance((1 - b) * old + b * v, trajectory, index)
        negative = self.distance((1 + b) * old - b * v, trajectory, index)
        return limit / b * (optimality * positive + (1 - optimality) * negative).mean()

    def distance(self, v: Tensor, trajectory: Trajectory, index: tuple[int, slice]) -> Tensor:
        """Return |x0_hat - x_0|^2 / mean |x0_hat - x_0| for a velocity at the copies, [b]."""
        estimate = sampling.x0_estimate(trajectory.x_t[index], v, trajectory.t[index])
        error = estimate - trajectory.x_s[index]
        weight = error.detach().abs().flatten(1).mean(1).clamp(min=SMALLEST)
        return forward_process.mean_square(error) / weight


METHOD = DiffusionNft
