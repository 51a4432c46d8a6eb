"""What a training method is: a frozen dataclass of hyperparameters with three hooks.

`rollout` makes images, `advantages` credits them, `losses` yields what is differentiated. A
policy-gradient method overrides only what differs: the transition, which steps are stochastic,
which are trained, which images are scored, how advantages are credited.

A method is one file in baselines/ (or tafs/tafs_grpo.py) whose dataclass is called `METHOD`; the
file's name is its name everywhere: in config.yaml, in the graph and in results/.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tafs import grpo, sampling
from tafs.sampling import Transition

if TYPE_CHECKING:  # importing diffusers would cost every reader of config.yaml seconds
    from tafs.backbones.base import Backbone, Conditioning


@dataclass(frozen=True)
class Trajectory:
    """A rollout of B images: T trained steps and K scored images of each.

    The images of a prompt's group stand in a row: B = groups x G.
    """

    x_t: Tensor  # [T, B, ...] states before the trained steps
    x_s: Tensor  # [T, B, ...] what the steps drew
    t: Tensor  # [T, B]
    s: Tensor  # [T, B]
    log_prob: Tensor  # [T, B] under the policy that sampled
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
class LossPart:
    """One micro-batch's share of an update's loss, and what it saw, detached."""

    loss: Tensor  # scalar; the parts of an update add up to its loss
    ratio: Tensor  # [b]
    clipped: Tensor  # [b]


@dataclass(frozen=True, kw_only=True)
class Method:
    """Hyperparameters that every policy-gradient method has, and the shared hooks.

    Subclasses set `steps` (network evaluations per image in the rollout) and override what differs.
    """

    steps: int
    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    clip_range: float = 1e-4
    updates: int = 1  # optimiser steps per iteration; each takes an equal share of the prompts
    beta: float = 0.0  # weight of the KL to the base model
    ema: float = 0.0  # decay of the averaged adapter that is kept; 0 keeps the last one
    time_grid: str = "uniform"  # or "model": the scheduler's own grid
    normalize_rewards: bool = False  # advantages per reward, then their weighted sum
    shared_noise: bool = False  # one start noise for the whole group
    max_grad_norm: float = 1.0

    TITLE: ClassVar[str] = ""  # in tables and figures
    SAMPLER: ClassVar[str] = "ode"  # that the trained model is evaluated with at few steps

    def __post_init__(self) -> None:
        if self.time_grid not in ("uniform", "model"):
            raise ValueError(f"time_grid: {self.time_grid!r} is neither 'uniform' nor 'model'")
        for name, low in (("steps", 1), ("updates", 1), ("learning_rate", 0), ("clip_range", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: {getattr(self, name)} is less than {low}")

    # -- what a variant overrides -------------------------------------------------------------

    def grid(self, backbone: Backbone) -> Tensor:
        """Times of the rollout, [steps + 1] from 1 to 0."""
        if self.time_grid == "uniform":
            return sampling.uniform_grid(self.steps)
        return backbone.time_grid(self.steps)

    def transition(self, x_t: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Transition:
        """The policy's step."""
        raise NotImplementedError

    def trained_steps(self, iteration: int) -> Sequence[int]:
        """Indices of the grid's steps whose transitions are trained."""
        raise NotImplementedError

    def scored_steps(self) -> Sequence[int]:
        """Steps whose x0_hat is scored; the last step's is the final image."""
        return (self.steps - 1,)

    def advantages(self, rewards: Tensor) -> Tensor:
        """[K, groups, G] rewards of the scored images -> [T, groups, G] of the trained steps."""
        raise NotImplementedError

    # -- shared --------------------------------------------------------------------------------

    def stochastic_steps(self, iteration: int) -> Sequence[int]:
        """Steps that draw from `transition`; the others follow the ODE."""
        return range(self.steps)

    @property
    def nfe_old(self) -> int:
        """Network evaluations per image in the rollout."""
        return self.steps

    @property
    def nfe_theta(self) -> int:
        """Network evaluations per image with gradients."""
        return len(self.trained_steps(0))

    @torch.no_grad()
    def rollout(
        self,
        backbone: Backbone,
        cond: Conditioning,
        noise: Tensor,
        generator: torch.Generator,
        iteration: int,
    ) -> Trajectory:
        """Sample images and record the trained steps.

        Args:
            cond: of the B images; noise: x_1, [B, ...].
            generator: the stream of the steps' noise.
        """
        grid = self.grid(backbone).to(noise.device)
        trained, scored = set(self.trained_steps(iteration)), set(self.scored_steps())
        stochastic = set(self.stochastic_steps(iteration))
        x = noise
        records: list[tuple[Tensor, ...]] = []
        images: list[Tensor] = []
        for n in range(self.steps):
            t, s = grid[n].expand(len(x)), grid[n + 1].expand(len(x))
            v = backbone.velocity(x, t, cond)
            if n in scored:
                images.append(sampling.x0_estimate(x, v, t))
            if n == self.steps - 1 and n not in trained:
                break
            step = self.transition if n in stochastic else sampling.ode
            transition = step(x, v, t, s)
            x_s = transition.sample(generator)
            if n in trained:
                records.append((x, x_s, t, s, transition.log_prob(x_s)))
            x = x_s
        x_t, x_s, t, s, log_prob = (torch.stack(column) for column in zip(*records, strict=True))
        return Trajectory(x_t, x_s, t, s, log_prob, torch.stack(images), cond)

    def losses(
        self, backbone: Backbone, trajectory: Trajectory, advantages: Tensor, micro_batch: int
    ) -> Iterator[LossPart]:
        """The clipped objective of Eq. 10, a micro-batch at a time.

        Args:
            advantages: [T, B].
        """
        steps, batch = advantages.shape
        for n in range(steps):
            for low in range(0, batch, micro_batch):
                part = slice(low, low + micro_batch)
                x_t, t, s = trajectory.x_t[n, part], trajectory.t[n, part], trajectory.s[n, part]
                cond = trajectory.cond[part]
                transition = self.transition(x_t, backbone.velocity(x_t, t, cond), t, s)
                objective = grpo.clipped_objective(
                    transition.log_prob(trajectory.x_s[n, part]),
                    trajectory.log_prob[n, part],
                    advantages[n, part],
                    self.clip_range,
                )
                loss = objective.loss
                if self.beta > 0:
                    loss = loss + self.beta * self.kl(backbone, x_t, t, s, cond, transition).mean()
                share = len(x_t) / (steps * batch)
                yield LossPart(loss * share, objective.ratio, objective.clipped)

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
    """Name -> importable module of every method, without importing any."""
    import baselines

    found = {"tafs_grpo": "tafs.tafs_grpo"}
    for info in pkgutil.iter_modules(baselines.__path__):
        found[info.name] = f"baselines.{info.name}"
    return dict(sorted(found.items()))


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
        ValueError: an unknown hyperparameter, or a value out of range; names it.
    """
    found = method_class(name)
    known = {f.name for f in dataclasses.fields(found)}
    for key in parameters:
        if key not in known:
            raise ValueError(
                f"unknown hyperparameter {key!r} (available: {', '.join(sorted(known))})"
            )
    return found(**parameters)


def _module(name: str) -> str:
    available = sources()
    if name not in available:
        raise ValueError(f"unknown method {name!r} (available: {', '.join(available)})")
    return available[name]
