"""Reward-Instruct (Luo et al., 2025, arXiv 2503.13070): a few-step generator from rewards alone.

    x_s  = (1 - s) x0_hat + s (sqrt(1 - eta^2) x1_hat + eta e),  eta random
    grad = sum_k w_k g_k / |g_k|,  g_k = d R_k(decode(x0_hat)) / d x0_hat

The paper has no public code. From its text: there is no distillation loss and no image data; the
gradients of several differentiable rewards are normalised before their weighted sum; the weights
are regularised towards the base model; the number of steps and eta are random; gradients stop
between steps, so that each step learns from the reward of its own image.

Choices made here:
- The gradients are taken at the latents and scaled to length 1 for each image and reward.
- The regulariser is AdamW's weight decay on the adapter; an adapter of zeros is the base model.
- The number of steps is drawn from 1 to `steps` for each optimiser step, eta from [0, 1] for each
  image and step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tafs.common.seeding import Generators
from tafs.methods import LossPart, Method, Trajectory, UpdateInputs, grpo
from tafs.models import Backbone, Conditioning, sampling


@dataclass(frozen=True, kw_only=True)
class RewardInstruct(Method):
    """Move the image of each step along the normalised gradients of the rewards."""

    steps: int = 4  # largest number of sampling steps
    weight_decay: float = 1e-2
    updates: int = 2

    TITLE: ClassVar[str] = "Reward-Instruct"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("steps", 1)

    @property
    def needs_reward_gradients(self) -> bool:
        return True

    @property
    def forward_equivalents(self) -> float:
        """Each step is sampled and trained; the number of steps is uniform on 1 to `steps`."""
        return (1 + 3) * (self.steps + 1) / 2

    def rollout(
        self,
        backbone: Backbone,
        cond: Conditioning,
        noise: Tensor,
        generators: Generators,
        iteration: int,
    ) -> Trajectory:
        steps = int(torch.randint(1, self.steps + 1, (), generator=generators.shared))
        grid = sampling.uniform_grid(steps).to(noise.device)
        x = noise
        states, ends, times, nexts = [], [], [], []
        for n in range(steps):
            t, s = grid[n].expand(len(x)), grid[n + 1].expand(len(x))
            v = backbone.velocity(x, t, cond)
            eta = generators.rand().to(x.device)
            transition = sampling.renoise(x, v, t, s, eta)
            states.append(x)
            x = transition.sample(generators)
            ends.append(x)
            times.append(t)
            nexts.append(s)
        t = torch.stack(times)
        return Trajectory(
            x_t=torch.stack(states),
            x_s=torch.stack(ends),
            t=t,
            s=torch.stack(nexts),
            log_prob=torch.zeros_like(t),
            scored=x[None],
            cond=cond,
        )

    def losses(
        self, backbone: Backbone, trajectory: Trajectory, inputs: UpdateInputs, micro_batch: int
    ) -> Iterator[LossPart]:
        steps, batch = trajectory.t.shape
        for n in range(steps):
            for low in range(0, batch, micro_batch):
                part = slice(low, low + micro_batch)
                x_t, t = trajectory.x_t[n, part], trajectory.t[n, part]
                v = backbone.velocity(x_t, t, trajectory.cond[part])
                x0_hat = sampling.x0_estimate(x_t, v, t)
                direction = self.direction(x0_hat.detach(), part, inputs)
                share = len(x_t) / (steps * batch)
                loss = -(direction * x0_hat).flatten(1).sum(1).mean()
                yield LossPart(loss * share, {})

    def direction(self, x0_hat: Tensor, part: slice, inputs: UpdateInputs) -> Tensor:
        """Return the weighted sum of the rewards' normalised gradients, like `x0_hat`."""
        latents = x0_hat.requires_grad_()
        rewards = inputs.rewards(latents, part)
        total = torch.zeros_like(latents)
        for name, weight in inputs.weights.items():
            (gradient,) = torch.autograd.grad(rewards[name].sum(), latents, retain_graph=True)
            flat = gradient.flatten(1)
            unit = grpo.binade(flat.abs().amax(1, keepdim=True))
            length = (flat / unit).norm(dim=1, keepdim=True) * unit
            length = length.where(length > 0, 1)  # the gradient 0 has no direction
            total += weight * gradient / length.view(-1, *[1] * (gradient.dim() - 1))
        return total


METHOD = RewardInstruct
