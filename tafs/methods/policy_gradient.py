"""The base class of policy-gradient methods: GRPO on the steps of a sampler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tafs.common.seeding import Generators
from tafs.methods import grpo
from tafs.methods.base import LossPart, Trajectory, UpdateInputs
from tafs.methods.group_relative import GroupRelative
from tafs.models import Backbone, Conditioning, sampling
from tafs.models.sampling import Transition


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(GroupRelative):
    """Group-relative policy optimisation of a sampler's steps (Eqs. 1-3, 9, 10).

    The rollout walks the time grid. A stochastic step draws x_s from `transition`, any other step
    is `deterministic_step`; the last one always ends at x0_hat. The loss is the clipped
    objective of the trained steps.

    Subclasses set `steps` and `sampler`, and override what differs: which steps are stochastic,
    which are trained, which images are scored, how their advantages are credited to the steps.
    """

    steps: int  # network evaluations per image in the rollout
    sampler: str  # the policy's transition, a key of sampling.TRANSITIONS
    eta: float = 0.7  # noise level, for samplers that have one
    clip_range: float = 1e-4
    beta: float = 0.0  # weight of the KL to the base model
    time_grid: str = "model"  # "model": the scheduler's own; or "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("steps", 1)
        self._at_least("clip_range", 0)
        self._at_least("eta", 0)
        self._at_least("beta", 0)
        if self.time_grid not in ("uniform", "model"):
            raise ValueError(f"time_grid: {self.time_grid!r} is neither 'uniform' nor 'model'")
        if self.sampler not in sampling.TRANSITIONS:
            options = ", ".join(sampling.TRANSITIONS)
            raise ValueError(f"sampler: unknown {self.sampler!r} (available: {options})")

    def grid(self, backbone: Backbone, iteration: int) -> Tensor:
        """Return the times of the rollout from 1 to 0, [evaluations + 1]."""
        if self.time_grid == "uniform":
            return sampling.uniform_grid(self.steps)
        return backbone.time_grid(self.steps)

    def transition(self, x_t: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Transition:
        """Return the policy's Gaussian step from t to s."""
        return sampling.TRANSITIONS[self.sampler](x_t, v, t, s, self.eta)

    def deterministic_step(
        self, past: Sequence[tuple[Tensor, Tensor]], x_t: Tensor, s: Tensor
    ) -> Tensor:
        """Return x_s; `past` is (x0_hat, t) of all steps so far, the current one last."""
        x0_hat, t = past[-1]
        return sampling.ode_to(x_t, x0_hat, t, s)

    def trained_steps(self, iteration: int) -> Sequence[int]:
        """Return the indices of the trained steps; the last step cannot be trained."""
        raise NotImplementedError

    def stochastic_steps(self, iteration: int) -> Sequence[int]:
        """Return the indices of the steps that draw from `transition`; others are deterministic."""
        return range(self.steps)

    def select_steps(self, records: Sequence[Tensor], generators: Generators) -> Sequence[Tensor]:
        """Select the trained steps of each image from the recorded ones; by default all.

        Records are x_t, x_s, t, s, log_prob and those of `record`, of `trained_steps`,
        [T, B, ...] each.
        """
        return records

    def record(self, transition: Transition) -> Mapping[str, Tensor]:
        """Return what `objective` needs of the sampling policy's step, by name, [B, ...] each."""
        return {}

    def objective(
        self,
        transition: Transition,
        trajectory: Trajectory,
        index: tuple[int, slice],
        advantages: Tensor,
    ) -> grpo.Objective:
        """Return the objective of one step of some images; by default that of Eqs. 2 and 10.

        Args:
            transition: the step under the trained policy, with gradients.
            index: the number of the trained step, and the images: `trajectory.t[index]` is [b].
            advantages: [b].
        """
        log_prob = transition.log_prob(trajectory.x_s[index])
        old = trajectory.log_prob[index]
        return grpo.clipped_objective(log_prob, old, advantages, self.clip_range)

    def velocity(self, backbone: Backbone, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Return the network's velocity at states of a trajectory, [b, ...]."""
        return backbone.velocity(x_t, t, cond)

    def parts(self, x_t: Tensor, micro_batch: int) -> Sequence[slice]:
        """Divide the states of a step, [B, ...], into those whose velocities need a micro-batch."""
        return [slice(low, low + micro_batch) for low in range(0, len(x_t), micro_batch)]

    @property
    def keeps_graphs(self) -> bool:
        """Not if each image trains other steps: most evaluations would be kept for few images."""
        return type(self).select_steps is PolicyGradient.select_steps

    @property
    def nfe_old(self) -> float:
        return self.steps

    @property
    def nfe_theta(self) -> int:
        return len(self.trained_steps(0))

    @property
    def forward_equivalents(self) -> float:
        """As in `Method`, plus the base model's evaluations if the KL is part of the loss."""
        return super().forward_equivalents + (self.nfe_theta if self.beta > 0 else 0)

    def rollout(
        self,
        backbone: Backbone,
        cond: Conditioning,
        noise: Tensor,
        generators: Generators,
        iteration: int,
    ) -> Trajectory:
        grid = self.grid(backbone, iteration).to(noise.device)
        last = len(grid) - 2
        trained = set(self.trained_steps(iteration))
        stochastic = set(self.stochastic_steps(iteration))
        scored = [n % (last + 1) for n in self.scored_steps()]
        x = noise
        steps: list[tuple[Tensor, ...]] = []
        names: Sequence[str] = ()
        past: list[tuple[Tensor, Tensor]] = []
        images: list[Tensor] = []
        keeps, kept = torch.is_grad_enabled(), []
        # A compiled network rounds as in the update only if it is evaluated as in the update.
        with_graph = trained if keeps or backbone.compiled else set()
        for n in range(last + 1):
            t, s = grid[n].expand(len(x)), grid[n + 1].expand(len(x))
            with torch.set_grad_enabled(n in with_graph):
                v = backbone.velocity(x, t, cond)
                if keeps and n in trained:
                    kept.append(self.transition(x, v, t, s))
            v = v.detach()
            past.append((sampling.x0_estimate(x, v, t), t))
            if n in scored:
                images.append(past[-1][0])
            if n == last:
                break
            if n not in stochastic:
                x = self.deterministic_step(past, x, s)
                continue
            transition = self.transition(x, v, t, s)
            x_s = transition.sample(generators)
            if n in trained:
                extra = self.record(transition)
                names = tuple(extra)
                steps.append((x, x_s, t, s, transition.log_prob(x_s), *extra.values()))
            x = x_s
        columns = [torch.stack(column) for column in zip(*steps, strict=True)]
        x_t, x_s, t, s, log_prob, *own = self.select_steps(columns, generators)
        records = dict(zip(names, own, strict=True))
        scores = torch.stack(images)
        return Trajectory(x_t, x_s, t, s, log_prob, scores, cond, tuple(kept), records)

    def losses(
        self, backbone: Backbone, trajectory: Trajectory, inputs: UpdateInputs, micro_batch: int
    ) -> Iterator[LossPart]:
        """Yield the objective of every step, plus the weighted KL term if `beta` > 0."""
        steps, batch = inputs.advantages.shape
        for n in range(steps):
            for part in self.parts(trajectory.x_t[n], micro_batch):
                x_t, t, s = trajectory.x_t[n, part], trajectory.t[n, part], trajectory.s[n, part]
                cond = trajectory.cond[part]
                if trajectory.kept:
                    transition = trajectory.kept[n]
                else:
                    transition = self.transition(x_t, self.velocity(backbone, x_t, t, cond), t, s)
                advantages = inputs.advantages[n, part]
                objective = self.objective(transition, trajectory, (n, part), advantages)
                loss = objective.loss
                if self.beta > 0:
                    loss = loss + self.beta * self.kl(backbone, x_t, t, s, cond, transition).mean()
                share = len(x_t) / (steps * batch)
                yield LossPart(loss * share, objective.metrics)

    def kl_to_base(self, backbone: Backbone, trajectory: Trajectory, number: int) -> float:
        """Return the mean KL divergence of one trained step to the base model's step.

        Each estimate is of the step after that of the one before.
        """
        n = number % len(trajectory.x_t)
        x_t, t, s = trajectory.x_t[n], trajectory.t[n], trajectory.s[n]
        v = self.velocity(backbone, x_t, t, trajectory.cond)
        transition = self.transition(x_t, v, t, s)
        return self.kl(backbone, x_t, t, s, trajectory.cond, transition).mean().item()

    def kl(
        self,
        backbone: Backbone,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        cond: Conditioning,
        transition: Transition,
    ) -> Tensor:
        """Return the KL divergence of a step to the base model's step, [b]."""
        with torch.no_grad(), backbone.reference():
            reference = self.transition(x_t, self.velocity(backbone, x_t, t, cond), t, s)
        return grpo.gaussian_kl(transition.mean, reference.mean, transition.std)
