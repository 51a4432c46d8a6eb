"""DRaFT-K (Clark et al., 2023, arXiv 2309.17400): rewards differentiated through the last steps.

    loss = -sum_k w_k R_k(decode(x_0)),   with gradients through the last K sampling steps

As published, except:
- The rollout has ten Euler steps of a flow model; the paper has 50 DDIM steps of Stable Diffusion.
- Several rewards are summed with the task's weights.
- DRaFT-LV's averaging over several noised images, for K = 1, is not included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from tafs.common.seeding import Generators
from tafs.methods import LossPart, Method, Trajectory, UpdateInputs
from tafs.models import Backbone, Conditioning, sampling


@dataclass(frozen=True, kw_only=True)
class DraftK(Method):
    """Move the final image along the rewards' gradients, through the last `last` steps."""

    steps: int = 10
    last: int = 1  # K
    updates: int = 2

    TITLE: ClassVar[str] = "DRaFT-K"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("steps", 1)
        self._between("last", 1, self.steps)

    @property
    def needs_reward_gradients(self) -> bool:
        return True

    @property
    def retains_reward_graphs(self) -> bool:
        return False  # their sum is differentiated once

    @property
    def nfe_old(self) -> float:
        return self.steps

    @property
    def nfe_theta(self) -> int:
        return self.last

    def rollout(
        self,
        backbone: Backbone,
        cond: Conditioning,
        noise: Tensor,
        generators: Generators,
        iteration: int,
    ) -> Trajectory:
        grid = backbone.time_grid(self.steps).to(noise.device)
        split = self.steps - self.last
        x_t = self.walk(backbone, noise, grid[: split + 1], cond)
        x_0 = self.walk(backbone, x_t, grid[split:], cond)
        t = grid[split].expand(1, len(noise))
        none = torch.zeros_like(t)
        return Trajectory(x_t[None], x_0[None], t, none, none, x_0[None], cond)

    def losses(
        self, backbone: Backbone, trajectory: Trajectory, inputs: UpdateInputs, micro_batch: int
    ) -> Iterator[LossPart]:
        batch = trajectory.t.shape[1]
        times = backbone.time_grid(self.steps)[-self.last - 1 :].to(trajectory.t.device)
        for low in range(0, batch, micro_batch):
            part = slice(low, low + micro_batch)
            x_t = trajectory.x_t[0, part]
            x_0 = self.walk(backbone, x_t, times, trajectory.cond[part])
            rewards = inputs.rewards(x_0, part)
            total = torch.stack([w * rewards[n] for n, w in inputs.weights.items()]).sum(0)
            yield LossPart(-total.mean() * len(x_t) / batch, {})

    def walk(self, backbone: Backbone, x: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        """Take Euler steps from x at times[0] to times[-1]."""
        for t, s in pairwise(times):
            x = sampling.ode(x, backbone.velocity(x, t.expand(len(x)), cond), t, s).mean
        return x


METHOD = DraftK
