"""The base class of methods that learn from noised copies of their own images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tafs.common.seeding import Generators
from tafs.methods import grpo
from tafs.methods.base import LossPart, Trajectory, UpdateInputs
from tafs.methods.group_relative import GroupRelative
from tafs.models import Backbone, Conditioning, sampling

VELOCITY = "velocity"  # the record of the sampling policy's velocity at each noised copy


@dataclass(frozen=True, kw_only=True)
class ForwardProcess(GroupRelative):
    """Group-relative learning on the forward process: no step needs a density.

    The rollout samples images x_0 along the ODE and noises `copies` copies of each, x_t = (1 - t)
    x_0 + t e with fresh noise e, at as many distinct times of the sampling grid, drawn for each
    image. The trajectory's steps lead from x_t at t to x_0 at 0. The loss compares the network's
    velocity at x_t with e - x_0 = (x_t - x_0) / t.
    """

    steps: int = 10  # Euler steps of the rollout
    copies: int = 9  # noised copies of each image; at most `steps`
    beta: float = 0.0  # weight of the squared difference from the base model's velocity

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("steps", 1)
        self._between("copies", 1, self.steps)
        self._at_least("beta", 0)

    def loss(
        self,
        v: Tensor,
        trajectory: Trajectory,
        index: tuple[int, slice],
        advantages: Tensor,
    ) -> Tensor | grpo.Objective:
        """Return the loss of some images' copies, a scalar: the mean over the images.

        A method whose loss has a ratio returns an objective, so that the journal records it.

        Args:
            v: the trained network's velocity at the copies, [b, ...], with gradients.
            index: the number of the copy, and the images: `trajectory.t[index]` is [b].
            advantages: [b].
        """
        raise NotImplementedError

    @property
    def records_velocity(self) -> bool:
        """Whether the loss needs the sampling policy's velocity at the copies."""
        return True

    @property
    def nfe_old(self) -> float:
        return self.steps

    @property
    def nfe_theta(self) -> int:
        return self.copies

    @property
    def forward_equivalents(self) -> float:
        """As in `Method`, plus the sampling policy's and the base model's evaluations of copies."""
        others = self.records_velocity + (self.beta > 0)
        return super().forward_equivalents + self.copies * others

    def rollout(
        self,
        backbone: Backbone,
        cond: Conditioning,
        noise: Tensor,
        generators: Generators,
        iteration: int,
    ) -> Trajectory:
        grid = backbone.time_grid(self.steps)
        x_0 = sampling.integrate(
            lambda x, t: backbone.velocity(x, t, cond),
            noise,
            grid.to(noise.device),
            sampling.ode,
            generators,
        )
        order = generators.rand([self.steps]).argsort(1)[:, : self.copies].T
        t = grid[order].to(noise.device)
        copies = [
            sampling.interpolate(x_0, generators.randn(noise.shape[1:]).to(noise.device), times)
            for times in t
        ]
        records = {}
        if self.records_velocity:
            v = [backbone.velocity(x, times, cond) for x, times in zip(copies, t, strict=True)]
            records[VELOCITY] = torch.stack(v)
        return Trajectory(
            x_t=torch.stack(copies),
            x_s=x_0.expand(self.copies, *x_0.shape),
            t=t,
            s=torch.zeros_like(t),
            log_prob=torch.zeros_like(t),
            scored=x_0[None],
            cond=cond,
            records=records,
        )

    def losses(
        self, backbone: Backbone, trajectory: Trajectory, inputs: UpdateInputs, micro_batch: int
    ) -> Iterator[LossPart]:
        """Yield the loss of every copy, plus the distance to the base model if `beta` > 0."""
        copies, batch = inputs.advantages.shape
        for n in range(copies):
            for low in range(0, batch, micro_batch):
                index = n, slice(low, low + micro_batch)
                x_t, t, cond = trajectory.x_t[index], trajectory.t[index], trajectory.cond[index[1]]
                v = backbone.velocity(x_t, t, cond)
                loss = self.loss(v, trajectory, index, inputs.advantages[index])
                moved = mean_square(v.detach() - trajectory.records[VELOCITY][index])
                metrics = {"policy_change": moved}
                if isinstance(loss, grpo.Objective):
                    metrics |= loss.metrics
                    loss = loss.loss
                if self.beta > 0:
                    with torch.no_grad(), backbone.reference():
                        base = backbone.velocity(x_t, t, cond)
                    loss = loss + self.beta * mean_square(v - base).mean()
                yield LossPart(loss * len(x_t) / (copies * batch), metrics)


def mean_square(values: Tensor) -> Tensor:
    """Return the mean of the squares over the non-batch elements, [b]."""
    return values.square().flatten(1).mean(1)


def target(trajectory: Trajectory, index: tuple[int, slice]) -> Tensor:
    """Return the velocity e - x_0 that leads from x_0 to the noised copies, [b, ...]."""
    x_t, x_0, t = trajectory.x_t[index], trajectory.x_s[index], trajectory.t[index]
    return (x_t - x_0) / t.view(-1, *[1] * (x_t.dim() - 1))
