"""The base class of policy-gradient methods whose stochastic steps branch off one trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tafs.common.seeding import Generators
from tafs.methods.base import Trajectory
from tafs.methods.policy_gradient import PolicyGradient
from tafs.models import Backbone, Conditioning, sampling


@dataclass(frozen=True, kw_only=True)
class Branching(PolicyGradient):
    """Group-relative policy optimisation of single stochastic steps.

    The rollout walks the grid along the ODE. At each trained step a branch leaves it with one draw
    from `transition` and follows the ODE to its images, so that nothing but this draw distinguishes
    the images of a group that start from the same noise. A step learns from its own branch alone.
    One evaluation at a branching state serves both the ODE and the branch.
    """

    shared_noise: bool = True

    def suffixes(self, grid: Tensor, n: int) -> Sequence[Tensor]:
        """Return the times of a branch after step n, from grid[n + 1] to 0, for each of its images.

        The number of images has to be the same for all steps.
        """
        return (grid[n + 1 :],)

    def _lengths(self, n: int) -> list[int]:
        """The evaluations that each image of the branch at step n needs."""
        return [len(times) - 1 for times in self.suffixes(sampling.uniform_grid(self.steps), n)]

    def scored_steps(self) -> Sequence[int]:
        """Return the branching step of each scored image."""
        return [n for n in self.trained_steps(0) for _ in self._lengths(n)]

    def assign_credit(self, advantages: Tensor, steps: int) -> Tensor:
        """Sum the advantages of the images of each step's branch."""
        return advantages.unflatten(0, (steps, -1)).sum(1)

    @property
    def nfe_old(self) -> float:
        trained = self.trained_steps(0)
        return trained[-1] + 1 + sum(sum(self._lengths(n)) for n in trained)

    def rollout(
        self,
        backbone: Backbone,
        cond: Conditioning,
        noise: Tensor,
        generators: Generators,
        iteration: int,
    ) -> Trajectory:
        grid = self.grid(backbone, iteration).to(noise.device)
        trained = self.trained_steps(iteration)
        x = noise
        steps: list[tuple[Tensor, ...]] = []
        names: Sequence[str] = ()
        keeps, kept = torch.is_grad_enabled(), []
        with_graph = set(trained) if keeps or backbone.compiled else set()
        for n in range(trained[-1] + 1):
            t, s = grid[n].expand(len(x)), grid[n + 1].expand(len(x))
            with torch.set_grad_enabled(n in with_graph):
                v = backbone.velocity(x, t, cond)
                if keeps and n in trained:
                    kept.append(self.transition(x, v, t, s))
            v = v.detach()
            if n in trained:
                transition = self.transition(x, v, t, s)
                x_s = transition.sample(generators)
                extra = self.record(transition)
                names = tuple(extra)
                steps.append((x, x_s, t, s, transition.log_prob(x_s), *extra.values()))
            x = sampling.ode(x, v, t, s).mean
        columns = [torch.stack(column) for column in zip(*steps, strict=True)]
        x_t, x_s, t, s, log_prob, *own = columns
        with torch.no_grad():
            images = [
                self._finish(backbone, x_s[number], times, cond)
                for number, n in enumerate(trained)
                for times in self.suffixes(grid, n)
            ]
        records = dict(zip(names, own, strict=True))
        scored = torch.stack(images)
        return Trajectory(x_t, x_s, t, s, log_prob, scored, cond, tuple(kept), records)

    def _finish(self, backbone: Backbone, x: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        """Follow the ODE from x at times[0] to times[-1] = 0; return x_0."""
        for t, s in pairwise(times):
            t = t.expand(len(x))
            x = sampling.ode(x, backbone.velocity(x, t, cond), t, s).mean
        return x
