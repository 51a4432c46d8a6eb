"""policy_gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tafs.methods import grpo
from tafs.methods.base import LossPart, Method, Trajectory, UpdateInputs
from tafs.models import sampling
from tafs.models.base import Backbone, Conditioning
from tafs.models.sampling import Transition


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Method):
    """Group-relative policy optimisation of a sampler's steps (Eqs. 1-3, 9, 10).

    Subclasses set `steps` and `sampler`, and override only what differs: which steps are
    stochastic, which are trained, which images are scored, how advantages are credited.
    """

    steps: int  # network evaluations per image in the rollout
    sampler: str  # of the policy's steps, one of sampling.TRANSITIONS
    eta: float = 0.7  # noise level of samplers that have one
    clip_range: float = 1e-4
    beta: float = 0.0  # weight of the KL to the base model
    time_grid: str = "model"  # the scheduler's own, or "uniform"
    normalize_rewards: bool = False  # advantages per reward, then their weighted sum
    global_std: bool = False  # advantages are divided by the batch's std, not by each group's
    advantage_limit: float | None = None
    shared_noise: bool = False  # one start noise for the whole group

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("steps", 1)
        self._at_least("clip_range", 0)
        self._at_least("eta", 0)
        if self.time_grid not in ("uniform", "model"):
            raise ValueError(f"time_grid: {self.time_grid!r} is neither 'uniform' nor 'model'")
        if self.sampler not in sampling.TRANSITIONS:
            options = ", ".join(sampling.TRANSITIONS)
            raise ValueError(f"sampler: unknown {self.sampler!r} (available: {options})")

    # -- what a variant overrides --------------------------------------------------------------

    def grid(self, backbone: Backbone, iteration: int) -> Tensor:
        """Times of the rollout, from 1 to 0: one more than it has evaluations."""
        if self.time_grid == "uniform":
            return sampling.uniform_grid(self.steps)
        return backbone.time_grid(self.steps)

    def transition(self, x_t: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Transition:
        """The policy's step."""
        return sampling.TRANSITIONS[self.sampler](x_t, v, t, s, self.eta)

    def deterministic_step(
        self, past: Sequence[tuple[Tensor, Tensor]], x_t: Tensor, s: Tensor
    ) -> Tensor:
        """A deterministic step to s; `past` holds the (x0_hat, t) of this step and those before."""
        x0_hat, t = past[-1]
        return sampling.ode_to(x_t, x0_hat, t, s)

    def trained_steps(self, iteration: int) -> Sequence[int]:
        """Indices of the grid's steps whose transitions are trained; never the last one."""
        raise NotImplementedError

    def stochastic_steps(self, iteration: int) -> Sequence[int]:
        """Steps that draw from `transition`; the others are deterministic."""
        return range(self.steps)

    def scored_steps(self) -> Sequence[int]:
        """Steps whose x0_hat is scored; -1 is the last one's, the final image."""
        return (-1,)

    def select_steps(
        self, records: Sequence[Tensor], generator: torch.Generator
    ) -> Sequence[Tensor]:
        """The part of the recorded steps [T, B, ...] that is trained; by default all of it."""
        return records

    def assign_credit(self, advantages: Tensor, steps: int) -> Tensor:
        """Advantages of the scored images [K, groups, G] -> of the trained steps [T, groups, G]."""
        return advantages[-1:].expand(steps, -1, -1)

    # -- shared --------------------------------------------------------------------------------

    @property
    def shares_start_noise(self) -> bool:
        return self.shared_noise

    @property
    def nfe_old(self) -> float:
        return self.steps

    @property
    def nfe_theta(self) -> int:
        return len(self.trained_steps(0))

    @property
    def forward_equivalents(self) -> float:
        """As of every method, and the base model's evaluations where its KL is in the loss."""
        return super().forward_equivalents + (self.nfe_theta if self.beta > 0 else 0)

    @property
    def evaluation_sampler(self) -> str:
        return "anneal" if self.sampler == "anneal" else "ode"

    def rollout(
        self,
        backbone: Backbone,
        cond: Conditioning,
        noise: Tensor,
        generator: torch.Generator,
        iteration: int,
    ) -> Trajectory:
        grid = self.grid(backbone, iteration).to(noise.device)
        last = len(grid) - 2
        trained = set(self.trained_steps(iteration))
        stochastic = set(self.stochastic_steps(iteration))
        scored = [n % (last + 1) for n in self.scored_steps()]
        x = noise
        records: list[tuple[Tensor, ...]] = []
        past: list[tuple[Tensor, Tensor]] = []
        images: list[Tensor] = []
        for n in range(last + 1):
            t, s = grid[n].expand(len(x)), grid[n + 1].expand(len(x))
            v = backbone.velocity(x, t, cond)
            past.append((sampling.x0_estimate(x, v, t), t))
            if n in scored:
                images.append(past[-1][0])
            if n == last:
                break
            if n not in stochastic:
                x = self.deterministic_step(past, x, s)
                continue
            transition = self.transition(x, v, t, s)
            x_s = transition.sample(generator)
            if n in trained:
                records.append((x, x_s, t, s, transition.log_prob(x_s)))
            x = x_s
        columns = [torch.stack(column) for column in zip(*records, strict=True)]
        x_t, x_s, t, s, log_prob = self.select_steps(columns, generator)
        return Trajectory(x_t, x_s, t, s, log_prob, torch.stack(images), cond)

    def compute_advantages(
        self, rewards: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> Tensor:
        """Of the weighted sum of the rewards, or the weighted sum of each reward's own."""
        if self.normalize_rewards:
            advantages = torch.stack([w * self.advantages(rewards[n]) for n, w in weights.items()])
            return self.assign_credit(advantages.sum(0), self.nfe_theta)
        total = torch.stack([w * rewards[n] for n, w in weights.items()]).sum(0)
        return self.assign_credit(self.advantages(total), self.nfe_theta)

    def advantages(self, rewards: Tensor) -> Tensor:
        """Of each scored image among those of its step: [K, groups, G] -> [K, groups, G].

        A missing reward is NaN; it must not count in the others' advantages.
        """
        normalise = grpo.global_std_advantages if self.global_std else grpo.group_advantages
        advantages = normalise(rewards)
        if self.advantage_limit is None:
            return advantages
        return advantages.clamp(-self.advantage_limit, self.advantage_limit)

    def losses(
        self, backbone: Backbone, trajectory: Trajectory, feedback: UpdateInputs, micro_batch: int
    ) -> Iterator[LossPart]:
        """The clipped objective of Eq. 10."""
        steps, batch = feedback.advantages.shape
        for n in range(steps):
            for low in range(0, batch, micro_batch):
                part = slice(low, low + micro_batch)
                x_t, t, s = trajectory.x_t[n, part], trajectory.t[n, part], trajectory.s[n, part]
                cond = trajectory.cond[part]
                transition = self.transition(x_t, backbone.velocity(x_t, t, cond), t, s)
                objective = grpo.clipped_objective(
                    transition.log_prob(trajectory.x_s[n, part]),
                    trajectory.log_prob[n, part],
                    feedback.advantages[n, part],
                    self.clip_range,
                )
                loss = objective.loss
                if self.beta > 0:
                    loss = loss + self.beta * self.kl(backbone, x_t, t, s, cond, transition).mean()
                share = len(x_t) / (steps * batch)
                facts = {
                    "ratio_deviation": (objective.ratio - 1).abs(),
                    "clip_fraction": objective.clipped.float(),
                }
                yield LossPart(loss * share, facts)

    def kl_to_base(self, backbone: Backbone, trajectory: Trajectory, iteration: int) -> float:
        """The KL of one trained step to the base model's."""
        n = iteration % len(trajectory.x_t)
        x_t, t, s = trajectory.x_t[n], trajectory.t[n], trajectory.s[n]
        v = backbone.velocity(x_t, t, trajectory.cond)
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
        """KL of a step to the base model's step, [b]."""
        with torch.no_grad(), backbone.reference():
            reference = self.transition(x_t, backbone.velocity(x_t, t, cond), t, s)
        return grpo.gaussian_kl(transition.mean, reference.mean, transition.std)
