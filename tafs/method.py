"""What a training method is: a frozen dataclass of hyperparameters with three hooks.

`rollout` makes images, `credit` turns their rewards into advantages, `losses` yields what is
differentiated. Policy-gradient methods share all three through `PolicyGradient`; methods that
differentiate the rewards themselves define `rollout` and `losses`.

A method is one file in baselines/ (or tafs/tafs_grpo.py) whose dataclass is called `METHOD`; the
file's name is its name everywhere: in config.yaml, in the graph and in results/.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tafs import grpo, sampling
from tafs.failures import shown
from tafs.sampling import Transition

if TYPE_CHECKING:  # importing torch and diffusers would cost every reader of config.yaml seconds
    import torch
    from torch import Tensor

    from tafs.backbones.base import Backbone, Conditioning
else:
    from tafs.lazy import torch

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
LARGEST = 10**6  # of a whole number: more steps or updates than anyone takes


@dataclass(frozen=True)
class Trajectory:
    """A rollout of B images: T steps to learn from and K scored images of each.

    The images of a prompt's group stand in a row: B = groups x G.
    """

    x_t: Tensor  # [T, B, ...] states before the steps
    x_s: Tensor  # [T, B, ...] states after them
    t: Tensor  # [T, B]
    s: Tensor  # [T, B]
    log_prob: Tensor  # [T, B] under the policy that sampled; 0 of a method without densities
    scored: Tensor  # [K, B, ...] latents whose images are scored
    cond: Conditioning  # of the B images

    def images(self, index: slice) -> Trajectory:
        """The part of the batch that `index` selects."""
        tensors = {
            f.name: getattr(self, f.name)[:, index]
            for f in dataclasses.fields(self)
            if f.name != "cond"
        }
        return Trajectory(**tensors, cond=self.cond[index])


@dataclass(frozen=True)
class Feedback:
    """What an update learns from, for the images of one trajectory."""

    advantages: Tensor  # [T, B]; [0, B] of a method that has none
    # Latents [b, ...] of the images that the slice selects -> training-scale rewards by name, [b]
    # each, differentiable in the latents.
    rewards: Callable[[Tensor, slice], dict[str, Tensor]]
    weights: Mapping[str, float]  # of the rewards
    averaged: Callable[[], AbstractContextManager[None]]  # the network with its averaged adapter


@dataclass(frozen=True)
class LossPart:
    """One micro-batch's share of an update's loss."""

    loss: Tensor  # scalar; the parts of an update add up to its loss
    facts: Mapping[str, Tensor]  # by name, [b] each, detached: what the journal sums up


@dataclass(frozen=True, kw_only=True)
class Method:
    """Hyperparameters that every method has, and the hooks that the training loop calls."""

    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    updates: int = 1  # optimiser steps per iteration; each takes an equal share of the prompts
    ema: float = 0.0  # decay of the averaged adapter that is kept; 0 keeps the last one
    max_grad_norm: float = 1.0

    TITLE: ClassVar[str] = ""  # in tables and figures

    def __post_init__(self) -> None:
        self._at_least("updates", 1)
        self._at_least("learning_rate", 0)
        self._at_least("weight_decay", 0)
        self._between("ema", 0, 1)

    def _at_least(self, name: str, low: float) -> None:
        if not getattr(self, name) >= low:
            raise ValueError(f"{name}: {getattr(self, name)} is less than {low}")

    def _between(self, name: str, low: float, high: float) -> None:
        if not low <= getattr(self, name) <= high:
            raise ValueError(f"{name}: {getattr(self, name)} is not between {low} and {high}")

    # -- what a method defines -----------------------------------------------------------------

    def rollout(
        self,
        backbone: Backbone,
        cond: Conditioning,
        noise: Tensor,
        generator: torch.Generator,
        iteration: int,
    ) -> Trajectory:
        """Sample images and record the steps to learn from; called without gradients.

        Args:
            cond: of the B images; noise: x_1, [B, ...].
            generator: the stream of the steps' noise and of every other random choice.
        """
        raise NotImplementedError

    def losses(
        self, backbone: Backbone, trajectory: Trajectory, feedback: Feedback, micro_batch: int
    ) -> Iterator[LossPart]:
        """What is differentiated, a micro-batch at a time; the parts add up to the loss."""
        raise NotImplementedError

    def credit(self, rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
        """Training-scale rewards by name, [K, groups, G] each -> advantages [T, groups, G].

        An image that lacks a reward is NaN in all of them; the others' advantages are those of
        their groups without it. The training loop sets its own to 0.
        """
        return next(iter(rewards.values()))[:0]

    def divergence(
        self, backbone: Backbone, trajectory: Trajectory, iteration: int
    ) -> float | None:
        """How far the model has moved from its base, estimated on one group of images."""
        return None

    @property
    def evaluation_sampler(self) -> str:
        """The one of `sampling.SAMPLERS` that the trained model is judged with at few steps."""
        return "ode"

    @property
    def needs_reward_gradients(self) -> bool:
        """Whether every reward has to be differentiable."""
        return False

    @property
    def shares_start_noise(self) -> bool:
        """Whether the images of a group start from one noise."""
        return False

    @property
    def nfe_old(self) -> float | None:
        """Network evaluations per image in the rollout, where the paper counts them.

        Their mean where iterations differ.
        """
        return None

    @property
    def nfe_theta(self) -> int | None:
        """Network evaluations per image with gradients, where the paper counts them."""
        return None

    @property
    def cost(self) -> float:
        """Network evaluations per image and iteration, in units of one forward pass.

        One with gradients counts three: forward, and twice that backward. A mean where iterations
        differ. Every call of the backbone's `velocity` in `rollout` and `losses` is counted;
        decoder and reward models are not, nor is `divergence`, which only watches.
        """
        if self.nfe_old is None or self.nfe_theta is None:
            raise NotImplementedError(
                f"{type(self).__name__}: define `cost`, "
                "the network evaluations per image and iteration"
            )
        return self.nfe_old + 3 * self.nfe_theta


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

    def follow(self, past: Sequence[tuple[Tensor, Tensor]], x_t: Tensor, s: Tensor) -> Tensor:
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

    def choose(self, records: Sequence[Tensor], generator: torch.Generator) -> Sequence[Tensor]:
        """The part of the recorded steps [T, B, ...] that is trained; by default all of it."""
        return records

    def assign(self, advantages: Tensor, steps: int) -> Tensor:
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
    def cost(self) -> float:
        """As of every method, and the base model's evaluations where its KL is in the loss."""
        return super().cost + (self.nfe_theta if self.beta > 0 else 0)

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
                x = self.follow(past, x, s)
                continue
            transition = self.transition(x, v, t, s)
            x_s = transition.sample(generator)
            if n in trained:
                records.append((x, x_s, t, s, transition.log_prob(x_s)))
            x = x_s
        columns = [torch.stack(column) for column in zip(*records, strict=True)]
        x_t, x_s, t, s, log_prob = self.choose(columns, generator)
        return Trajectory(x_t, x_s, t, s, log_prob, torch.stack(images), cond)

    def credit(self, rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
        """Of the weighted sum of the rewards, or the weighted sum of each reward's own."""
        if self.normalize_rewards:
            advantages = torch.stack([w * self.advantages(rewards[n]) for n, w in weights.items()])
            return self.assign(advantages.sum(0), self.nfe_theta)
        total = torch.stack([w * rewards[n] for n, w in weights.items()]).sum(0)
        return self.assign(self.advantages(total), self.nfe_theta)

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
        self, backbone: Backbone, trajectory: Trajectory, feedback: Feedback, micro_batch: int
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

    def divergence(self, backbone: Backbone, trajectory: Trajectory, iteration: int) -> float:
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


# -- discovery ---------------------------------------------------------------------------------


def sources() -> dict[str, str]:
    """Name -> importable module of every method, without importing any.

    They come from tafs/, baselines/ and installed packages' entry points in the group
    `tafs.methods` (NAME = "package.module").

    Raises:
        ValueError: two files claim one name; names both.
    """
    import baselines

    found = {"tafs_grpo": "tafs.tafs_grpo"}
    for info in pkgutil.iter_modules(baselines.__path__):
        found[info.name] = f"baselines.{info.name}"
    for point in installed():
        if found.setdefault(point.name, point.module) != point.module:
            raise ValueError(
                f"method {point.name!r} is defined twice: by {found[point.name]} and {point.module}"
            )
    return dict(sorted(found.items()))


@cache
def installed() -> tuple[EntryPoint, ...]:
    """The methods of other packages; a plan asks often, and each answer opens hundreds of files."""
    return tuple(entry_points(group="tafs.methods"))


def source_file(name: str) -> Path:
    """The file of a method; a change to it reruns that method's runs.

    Raises:
        ValueError: no such method; lists those there are.
    """
    spec = importlib.util.find_spec(_module(name))
    if spec is None or spec.origin is None:
        raise ValueError(f"method {name!r}: its source file was not found")
    return Path(spec.origin)


def method_class(name: str) -> type[Method]:
    """The dataclass METHOD of a method's file.

    Raises:
        ValueError: no such method, or its file is broken or defines no METHOD; names it.
    """
    path = _module(name)
    try:
        module = importlib.import_module(path)
    except Exception as error:  # whatever a method's file may raise
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{source_file(name)}: cannot be imported ({problem})") from error
    found = getattr(module, "METHOD", None)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"{source_file(name)}: defines no METHOD derived from tafs.method.Method")
    return found


def create(name: str, parameters: dict[str, Any]) -> Method:
    """The method with its hyperparameters.

    Raises:
        ValueError: an unknown hyperparameter, or a value of another type or out of range; names it.
    """
    found = method_class(name)
    known = {f.name for f in dataclasses.fields(found)}
    kinds = get_type_hints(found)
    for key, value in parameters.items():
        if key not in known:
            raise ValueError(
                f"unknown hyperparameter {shown(key)} (available: {', '.join(sorted(known))})"
            )
        # Else `true` would count as 1, and a word be refused by whatever first compares it.
        try:
            TypeAdapter(kinds[key], config=STRICT).validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            problem = f"{problem[0].lower()}{problem[1:]}"
            raise ValueError(f"{key}: {problem} (got {shown(value)})") from None
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"{key}: {value} is too large; give at most {LARGEST}")
    return found(**parameters)


def _module(name: str) -> str:
    available = sources()
    if name not in available:
        raise ValueError(f"unknown method {name!r} (available: {', '.join(available)})")
    return available[name]
