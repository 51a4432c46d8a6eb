"""The base class of training methods, and what a method exchanges with the training loop.

A method is a frozen dataclass: its fields are its hyperparameters, and the training loop calls
three hooks of it in every iteration:

1. `rollout` samples images and records the sampling steps to learn from;
2. `compute_advantages` turns the rewards of these images into advantages;
3. `losses` yields the loss, one micro-batch at a time.

Policy-gradient methods inherit all three from `PolicyGradient`, and methods that learn from noised
copies of their images from `ForwardProcess`. Methods that backpropagate through the reward models
implement `rollout` and `losses`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tafs.common.seeding import Generators
from tafs.models import Backbone, Conditioning
from tafs.models.sampling import Transition


@dataclass(frozen=True)
class Trajectory:
    """A rollout of B = groups x G images: T steps to learn from, and K scored latents per image.

    The G images of one prompt are adjacent in the batch.
    """

    x_t: Tensor  # [T, B, ...] states before the steps
    x_s: Tensor  # [T, B, ...] states after the steps
    t: Tensor  # [T, B] times before the steps
    s: Tensor  # [T, B] times after the steps
    log_prob: Tensor  # [T, B] under the sampling policy; 0 for methods without densities
    scored: Tensor  # [K, B, ...] latents whose decoded images are scored
    cond: Conditioning  # of the B images
    # The T steps with the graphs of their evaluations, for one backward pass; () if not kept.
    kept: tuple[Transition, ...] = ()
    # What else a method's loss needs of each step, by name, [T, B, ...] each.
    records: Mapping[str, Tensor] = field(default_factory=dict)

    def images(self, index: slice) -> Trajectory:
        """Return the trajectory of the images that `index` selects, without kept graphs."""
        tensors = {
            f.name: getattr(self, f.name)[:, index]
            for f in dataclasses.fields(self)
            if f.name not in ("cond", "kept", "records")
        }
        records = {name: values[:, index] for name, values in self.records.items()}
        return Trajectory(**tensors, cond=self.cond[index], records=records)

    @staticmethod
    def cat(parts: Sequence[Trajectory]) -> Trajectory:
        """Return the trajectory of all images of some trajectories, without kept graphs."""
        tensors: dict[str, Any] = {
            f.name: torch.cat([getattr(part, f.name) for part in parts], dim=1)
            for f in dataclasses.fields(Trajectory)
            if f.name not in ("cond", "kept", "records")
        }
        records = {
            name: torch.cat([part.records[name] for part in parts], dim=1)
            for name in parts[0].records
        }
        cond = Conditioning.cat([part.cond for part in parts])
        negative = [part.cond.negative for part in parts if part.cond.negative is not None]
        if negative:
            cond = dataclasses.replace(cond, negative=Conditioning.cat(negative))
        return Trajectory(**tensors, cond=cond, records=records)


@dataclass(frozen=True)
class UpdateInputs:
    """What an update learns from besides the trajectory."""

    advantages: Tensor  # [T, B]; [0, B] for methods without advantages
    # (latents [b, ...] of the images that the slice selects, slice) -> training-scale rewards by
    # name, [b] each, differentiable with respect to the latents.
    rewards: Callable[[Tensor, slice], dict[str, Tensor]]
    weights: Mapping[str, float]  # of the rewards, by name
    averaged: Callable[[], AbstractContextManager[None]]  # switches to the averaged adapter


@dataclass(frozen=True)
class LossPart:
    """One micro-batch's share of an update's loss."""

    loss: Tensor  # scalar; the losses of an update's parts add up to its loss
    metrics: Mapping[str, Tensor]  # by name, [b] each, detached; the journal records their means


@dataclass(frozen=True, kw_only=True)
class Method:
    """Hyperparameters that all methods have, and the hooks that the training loop calls."""

    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    updates: int = 1  # optimiser steps per iteration; each takes an equal share of the prompts
    ema: float = 0.0  # decay of the averaged adapter; 0: no average
    ema_warmup: bool = False  # whether the decay grows from 0.1, as min((1 + n) / (10 + n), ema)
    warmup: int = 0  # optimiser steps in which the learning rate rises linearly to its value
    max_grad_norm: float = 1.0

    TITLE: ClassVar[str] = ""  # the name in tables and figures

    def __post_init__(self) -> None:
        self._at_least("updates", 1)
        self._at_least("learning_rate", 0)
        self._at_least("weight_decay", 0)
        self._between("ema", 0, 1)
        self._at_least("warmup", 0)
        self._at_least("max_grad_norm", 0)

    def _at_least(self, name: str, low: float) -> None:
        if not getattr(self, name) >= low:
            raise ValueError(f"{name}: {getattr(self, name)} is less than {low}")

    def _between(self, name: str, low: float, high: float) -> None:
        if not low <= getattr(self, name) <= high:
            raise ValueError(f"{name}: {getattr(self, name)} is not between {low} and {high}")

    def rate(self, updates: int) -> float:
        """The learning rate of the next optimiser step after this many."""
        return self.learning_rate * min(1.0, (updates + 1) / (self.warmup + 1))

    def decay(self, updates: int) -> float:
        """The decay of the averaged adapter after this many optimiser steps."""
        return min((1 + updates) / (10 + updates), self.ema) if self.ema_warmup else self.ema

    @property
    def saves_average(self) -> bool:
        """Whether the averaged adapter is saved and judged, and not the trained one."""
        return self.ema > 0

    @property
    def samples_average(self) -> bool:
        """Whether `rollout` samples with the averaged adapter and not with the trained one."""
        return False

    @property
    def compares_images(self) -> bool:
        """Whether `losses` needs all images of an update at once, and not a micro-batch of them."""
        return False

    def check_iterations(self, iterations: int) -> None:
        """Raise ValueError, naming a hyperparameter, if it does not suit so many iterations."""

    def rollout(
        self,
        backbone: Backbone,
        cond: Conditioning,
        noise: Tensor,
        generators: Generators,
        iteration: int,
    ) -> Trajectory:
        """Sample images and record the steps to learn from.

        Called without gradients, except for the first update's images if `keeps_graphs` and the
        scale's `keep_graphs` allow it: the steps may then be returned with their graphs (`kept`).

        Args:
            backbone: the model with its current adapter.
            cond: conditioning of the B images.
            noise: x_1, [B, ...].
            generators: the source of all random choices, one per image.
            iteration: from 0.
        """
        raise NotImplementedError

    def losses(
        self, backbone: Backbone, trajectory: Trajectory, inputs: UpdateInputs, micro_batch: int
    ) -> Iterator[LossPart]:
        """Yield the loss of an update in parts of at most `micro_batch` images.

        The training loop calls `backward` on each part before it asks for the next one.
        """
        raise NotImplementedError

    def compute_advantages(
        self, rewards: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> Tensor:
        """Compute advantages [T, groups, G] from training-scale rewards, [K, groups, G] each.

        A missing reward is NaN in all of the image's rewards. The advantages of the other images
        must be those of the group without this image; the training loop sets its own to 0.
        """
        return next(iter(rewards.values()))[:0]

    def kl_to_base(self, backbone: Backbone, trajectory: Trajectory, number: int) -> float | None:
        """Estimate the KL divergence to the base model on one group of images, for the journal.

        Called in some iterations only, without gradients; it may draw no random numbers.

        Args:
            trajectory: of the group.
            number: of the estimate, from 0.
        """
        return None

    @property
    def needs_reward_gradients(self) -> bool:
        """Whether all rewards have to be differentiable."""
        return False

    @property
    def retains_reward_graphs(self) -> bool:
        """Whether each reward's gradient is taken alone, so that their graphs are all kept."""
        return self.needs_reward_gradients

    @property
    def keeps_graphs(self) -> bool:
        """Whether `losses` can use the rollout's own graphs in the first update.

        The adapter has not changed by then, so that another evaluation would only repeat them.
        """
        return False

    @property
    def shares_start_noise(self) -> bool:
        """Whether the images of a group start from the same noise."""
        return False

    @property
    def nfe_old(self) -> float | None:
        """Mean number of evaluations per image in the rollout; None if the paper gives none."""
        return None

    @property
    def nfe_theta(self) -> int | None:
        """Network evaluations per image with gradients; None as for `nfe_old`."""
        return None

    @property
    def forward_equivalents(self) -> float:
        """Network evaluations per image and iteration, in units of one forward pass.

        An evaluation with gradients counts as three: one forward pass, and twice that for the
        backward pass. All calls of `backbone.velocity` in `rollout` and `losses` count; the
        decoder, the reward models and `kl_to_base` do not. The mean if iterations differ.
        """
        if self.nfe_old is None or self.nfe_theta is None:
            raise NotImplementedError(
                f"{type(self).__name__}: define `forward_equivalents`, "
                "the network evaluations per image and iteration"
            )
        return self.nfe_old + 3 * self.nfe_theta

    def cost(self, group_size: int) -> float:
        """`forward_equivalents` with so many images of each prompt, if it depends on them."""
        return self.forward_equivalents
