"""BranchGRPO (Li et al., 2025, arXiv 2509.06040): a tree of SDE steps, with advantages per depth.

    x_s = x_t + [v + eta^2 / (2t) (x_t + (1 - t) v)] (s - t) + sigma e,  sigma = b eta sqrt(t - s)
    R_node = mean of the rewards of the node's leaves
    A_node = (R_node - mean) / std over the nodes of a prompt at the node's depth

All paths of a prompt start from one noise. At steps 0, `interval`, 2 `interval`, ... each splits
into several; b is `split_noise` there and 1 elsewhere. A step learns from its end node's advantage
in the clipped objective. Siblings share an evaluation in the rollout, but not in the update.

As published, with the splits, grid and noise of the public code, except:
- The first split has as many children as the group has images, later ones two: each image is a
  subtree of 2^`splits` leaves, left out if one lacks rewards. A prompt has 8 G leaves, not 16.
- The ratio's density has the std sigma of the sample; the public code leaves b out of the density.
- Only the first `trained` steps are trained (depth pruning). The public code trains all by default,
  with an optimiser step after every 12 edges. Stds are not Bessel-corrected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tafs.common.seeding import Generators
from tafs.methods import PolicyGradient, Trajectory
from tafs.models import Backbone, Conditioning, sampling
from tafs.models.sampling import Transition


@dataclass(frozen=True, kw_only=True)
class BranchGrpo(PolicyGradient):
    """GRPO on the edges of a tree of SDE steps."""

    steps: int = 20
    trained: int = 10  # how many of the first steps are trained; at most steps - 1
    splits: int = 3  # how often each image's path splits in two
    interval: int = 3  # steps between splits
    split_noise: float = 4.0  # b
    shift: float = 3.0  # of the uniform time grid towards noise; 1 leaves it uniform
    sampler: str = "dance_sde"
    eta: float = 0.3
    clip_range: float = 1e-3
    updates: int = 2
    shared_noise: bool = True
    advantage_limit: float | None = 5.0

    TITLE: ClassVar[str] = "BranchGRPO"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._between("trained", 1, self.steps - 1)
        self._at_least("interval", 1)
        self._between("splits", 0, (self.steps - 2) // self.interval)
        self._at_least("split_noise", 1)
        self._at_least("shift", 1)

    def grid(self, backbone: Backbone | None = None, iteration: int = 0) -> Tensor:
        return sampling.shifted(sampling.uniform_grid(self.steps), self.shift)

    def transition(self, x_t: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Transition:
        step = super().transition(x_t, v, t, s)
        splits = self.grid().to(t.device)[:: self.interval][: self.splits + 1]
        scale = torch.where(torch.isin(t, splits), self.split_noise, 1.0)
        return Transition(step.mean, step.std * scale.view(-1, *[1] * (x_t.dim() - 1)))

    def paths(self, n: int) -> int:
        """Return the number of an image's paths before step n."""
        return 2 ** min(self.splits, max(n - 1, 0) // self.interval)

    def trained_steps(self, iteration: int) -> Sequence[int]:
        return range(self.trained)

    def scored_steps(self) -> Sequence[int]:
        return [-1] * self.paths(self.steps)

    def advantages(self, rewards: Tensor) -> Tensor:
        """Normalise the nodes' rewards: [leaves, groups, G] -> [edges, groups, G]."""
        found: list[Tensor] = []
        for n in range(1, self.trained + 1):
            nodes = rewards.unflatten(0, (self.paths(n), -1)).mean(1)
            found += super().advantages(torch.cat([*nodes], -1)).chunk(len(nodes), -1)
        return torch.stack(found)

    def assign_credit(self, advantages: Tensor, steps: int) -> Tensor:
        return advantages

    @property
    def keeps_graphs(self) -> bool:
        return False  # one backward pass would free the graph that siblings share

    @property
    def nfe_old(self) -> float:
        return sum(map(self.paths, range(self.steps)))

    @property
    def nfe_theta(self) -> int:
        return sum(map(self.paths, range(1, self.trained + 1)))

    def rollout(
        self,
        backbone: Backbone,
        cond: Conditioning,
        noise: Tensor,
        generators: Generators,
        iteration: int,
    ) -> Trajectory:
        grid = self.grid().to(noise.device)
        states: list[Tensor] = [noise]
        edges: list[tuple[Tensor, ...]] = []
        for n in range(self.steps - 1):
            t, s = grid[n].expand(len(noise)), grid[n + 1].expand(len(noise))
            parents, states = states, []
            for x in parents:
                # A compiled network rounds as in the update only if it is evaluated as there.
                with torch.set_grad_enabled(n < self.trained and backbone.compiled):
                    v = backbone.velocity(x, t, cond)
                transition = self.transition(x, v.detach(), t, s)
                for _ in range(self.paths(n + 1) // len(parents)):
                    states.append(transition.sample(generators))
                    edges.append((x, states[-1], t, s, transition.log_prob(states[-1])))
        images = [sampling.x0_estimate(x, backbone.velocity(x, s, cond), s) for x in states]
        x_t, x_s, t, s, log_prob = map(torch.stack, zip(*edges[: self.nfe_theta], strict=True))
        return Trajectory(x_t, x_s, t, s, log_prob, torch.stack(images), cond)


METHOD = BranchGrpo
