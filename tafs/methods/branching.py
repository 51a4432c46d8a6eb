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
    One evaluation at a branching state serves the ODE and the branches of all images that are
    there, in the rollout and in the update.
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

    def cost(self, group_size: int) -> float:
        """Images that start from the same noise share all evaluations but those of branches."""
        if not self.shared_noise:
            return self.forward_equivalents
        branches = self.nfe_old - (self.trained_steps(0)[-1] + 1)
        return branches + (self.forward_equivalents - branches) / group_size

    def velocity(self, backbone: Backbone, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Return the network's velocity at states, each of which is evaluated once."""
        first = _first(x_t)
        places = torch.zeros(len(x_t), dtype=torch.long, device=x_t.device)
        places[first[1:]] = 1
        return backbone.velocity(x_t[first], t[first], cond[first])[places.cumsum(0)]

    def parts(self, x_t: Tensor, micro_batch: int) -> Sequence[slice]:
        """Divide the states of a step into those of `micro_batch` evaluations."""
        bounds = [*_first(x_t)[::micro_batch].tolist(), len(x_t)]
        return [slice(low, high) for low, high in pairwise(bounds)]

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
                v = self.velocity(backbone, x, t, cond)
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


def _first(states: Tensor) -> Tensor:
    """Indices of the rows that differ from the row before; images of a group are neighbours."""
    rows = states.flatten(1)
    differs = (rows[1:] != rows[:-1]).any(1)
    return torch.cat([differs.new_ones(1), differs]).nonzero()[:, 0]
