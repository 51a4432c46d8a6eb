"""RG-LCD (Li et al., 2024, arXiv 2403.11027): reward-guided latent consistency distillation.

    loss = Huber(f_theta(x_t), f_ema(x_s)) - w R(decode(f_theta(x_t)))

f is the estimate x0_hat, and x_s one ODE step of the frozen teacher from x_t on a grid of
`grid_steps` steps.

As published, except:
- The images are the teacher's own samples for the training prompts (`teacher_steps` Euler steps),
  so that no data set is needed.
- The reward model itself is differentiated instead of a latent proxy model.
- The teacher is the base model, with the guidance of the active scale.

`reward_weight: 0` is plain consistency distillation.
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
class RgLcd(Method):
    """Distil one noised copy of each teacher sample per iteration, guided by the rewards."""

    teacher_steps: int = 10
    grid_steps: int = 50
    reward_weight: float = 1.0
    huber_c: float = 1e-3
    updates: int = 2
    ema: float = 0.95

    TITLE: ClassVar[str] = "RG-LCD"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("teacher_steps", 1)
        self._at_least("grid_steps", 2)
        self._at_least("reward_weight", 0)
        if not 0 < self.ema < 1:
            raise ValueError(
                f"ema: {self.ema} is not between 0 and 1; the averaged adapter gives the target"
            )

    @property
    def saves_average(self) -> bool:
        """The average is the target of the distillation only, as published."""
        return False

    @property
    def needs_reward_gradients(self) -> bool:
        return self.reward_weight > 0

    @property
    def retains_reward_graphs(self) -> bool:
        return False  # their sum is differentiated once

    @property
    def forward_equivalents(self) -> float:
        """Teacher sample, teacher step, scored estimate, target estimate, and trained estimate."""
        return self.teacher_steps + 1 + 1 + 1 + 3

    def rollout(
        self,
        backbone: Backbone,
        cond: Conditioning,
        noise: Tensor,
        generators: Generators,
        iteration: int,
    ) -> Trajectory:
        with backbone.reference():
            samples = sampling.integrate(
                lambda x, t: backbone.velocity(x, t, cond),
                noise,
                backbone.time_grid(self.teacher_steps).to(noise.device),
                sampling.ode,
                generators,
            )
            grid = backbone.time_grid(self.grid_steps)
            n = generators.randint(self.grid_steps)
            t, s = grid[n].to(noise.device), grid[n + 1].to(noise.device)
            fresh = generators.randn(noise.shape[1:]).to(noise.device)
            x_t = sampling.interpolate(samples, fresh, t)
            x_s = sampling.ode(x_t, backbone.velocity(x_t, t, cond), t, s).mean
        return Trajectory(
            x_t=x_t[None],
            x_s=x_s[None],
            t=t[None],
            s=s[None],
            log_prob=torch.zeros_like(t)[None],
            scored=sampling.x0_estimate(x_t, backbone.velocity(x_t, t, cond), t)[None],
            cond=cond,
        )

    def losses(
        self, backbone: Backbone, trajectory: Trajectory, inputs: UpdateInputs, micro_batch: int
    ) -> Iterator[LossPart]:
        batch = trajectory.t.shape[1]
        for low in range(0, batch, micro_batch):
            part = slice(low, low + micro_batch)
            x_t, t, cond = trajectory.x_t[0, part], trajectory.t[0, part], trajectory.cond[part]
            x_s, s = trajectory.x_s[0, part], trajectory.s[0, part]
            with torch.no_grad(), inputs.averaged():
                # At s = 0 the estimate equals the state whatever the velocity is.
                v = backbone.velocity(x_s, s.clamp(min=1e-3), cond)
                target = sampling.x0_estimate(x_s, v, s)
            estimate = sampling.x0_estimate(x_t, backbone.velocity(x_t, t, cond), t)
            distance = pseudo_huber(estimate, target, self.huber_c)
            loss = distance.mean()
            if self.reward_weight > 0:
                rewards = inputs.rewards(estimate, part)
                total = torch.stack([w * rewards[n] for n, w in inputs.weights.items()]).sum(0)
                loss = loss - self.reward_weight * total.mean()
            share = len(x_t) / batch
            yield LossPart(loss * share, {"distillation": distance.detach()})


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Return sqrt((a - b)^2 + c^2) - c, averaged over the non-batch elements, [B]."""
    return (((a - b).square() + c**2).sqrt() - c).flatten(1).mean(1)


METHOD = RgLcd
