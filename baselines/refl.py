"""ReFL (Xu et al., 2023, arXiv 2304.05977, ImageReward): rewards of a one-step estimate.

    loss = -sum_k w_k R_k(decode(x0_hat)),   x0_hat = x_t - t v_theta(x_t, t) at a random late step

The steps before x_t are sampled without gradients; x0_hat is the one evaluation that has them.

As published, except:
- The rollout has twelve Euler steps of a flow model, of which one of the last three is trained; the
  public code has 40 steps of Stable Diffusion, and one of the last ten.
- The number of steps is drawn for each optimiser step, and the network sees the time of x_t. The
  public code gives it the number of the step instead.
- The loss is minus the reward. The public code has 0.001 max(2 - R, 0) for ImageReward: the factor
  matters for the clipping of gradients only, and the limit has no meaning on other rewards' scales.
- Several rewards are summed with the task's weights.
- The paper's additional loss on images of a data set is not included; nor is it in the public code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tafs.common.seeding import Generators
from tafs.methods import LossPart, Method, Trajectory, UpdateInputs
from tafs.models import Backbone, Conditioning, sampling


@dataclass(frozen=True, kw_only=True)
class Refl(Method):
    """Move the estimated image of a late step along the rewards' gradients."""

    steps: int = 12
    late: int = 3  # how many of the last steps may be the trained one
    updates: int = 2

    TITLE: ClassVar[str] = "ReFL"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("steps", 1)
        self._between("late", 1, self.steps)

    @property
    def needs_reward_gradients(self) -> bool:
        return True

    @property
    def retains_reward_graphs(self) -> bool:
        return False  # their sum is differentiated once

    @property
    def nfe_old(self) -> float:
        """The mean number of steps to the scored estimate, which is uniform on the last ones."""
        return self.steps - (self.late - 1) / 2

    @property
    def nfe_theta(self) -> int:
        return 1

    def rollout(
        self,
        backbone: Backbone,
        cond: Conditioning,
        noise: Tensor,
        generators: Generators,
        iteration: int,
    ) -> Trajectory:
        grid = backbone.time_grid(self.steps).to(noise.device)
        n = self.steps - 1 - int(torch.randint(self.late, (), generator=generators.shared))
        x_t = sampling.integrate(
            lambda x, t: backbone.velocity(x, t, cond),
            noise,
            grid[: n + 1],
            sampling.ode,
            generators,
        )
        t = grid[n].expand(len(noise))
        x0_hat = sampling.x0_estimate(x_t, backbone.velocity(x_t, t, cond), t)
        none = torch.zeros_like(t)[None]
        return Trajectory(x_t[None], x0_hat[None], t[None], none, none, x0_hat[None], cond)

    def losses(
        self, backbone: Backbone, trajectory: Trajectory, inputs: UpdateInputs, micro_batch: int
    ) -> Iterator[LossPart]:
        batch = trajectory.t.shape[1]
        for low in range(0, batch, micro_batch):
            part = slice(low, low + micro_batch)
            x_t, t = trajectory.x_t[0, part], trajectory.t[0, part]
            v = backbone.velocity(x_t, t, trajectory.cond[part])
            rewards = inputs.rewards(sampling.x0_estimate(x_t, v, t), part)
            total = torch.stack([w * rewards[n] for n, w in inputs.weights.items()]).sum(0)
            yield LossPart(-total.mean() * len(x_t) / batch, {})


METHOD = Refl
