"""What a training method is: a frozen dataclass of hyperparameters with three hooks.

`rollout` makes images, `credit` turns their rewards into advantages, `losses` yields what is
differentiated. Policy-gradient methods share all three through `PolicyGradient`; methods that
differentiate the rewards themselves define `rollout` and `losses`.

A method is one file in baselines/ (or tafs/methods/tafs_grpo.py) whose dataclass is called `METHOD`; the
file's name is its name everywhere: in config.yaml, in the graph and in results/.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tafs.models.base import Backbone, Conditioning


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
class UpdateInputs:
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
        self, backbone: Backbone, trajectory: Trajectory, feedback: UpdateInputs, micro_batch: int
    ) -> Iterator[LossPart]:
        """What is differentiated, a micro-batch at a time; the parts add up to the loss."""
        raise NotImplementedError

    def compute_advantages(
        self, rewards: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> Tensor:
        """Training-scale rewards by name, [K, groups, G] each -> advantages [T, groups, G].

        An image that lacks a reward is NaN in all of them; the others' advantages are those of
        their groups without it. The training loop sets its own to 0.
        """
        return next(iter(rewards.values()))[:0]

    def kl_to_base(
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
    def forward_equivalents(self) -> float:
        """Network evaluations per image and iteration, in units of one forward pass.

        One with gradients counts three: forward, and twice that backward. A mean where iterations
        differ. Every call of the backbone's `velocity` in `rollout` and `losses` is counted;
        decoder and reward models are not, nor is `divergence`, which only watches.
        """
        if self.nfe_old is None or self.nfe_theta is None:
            raise NotImplementedError(
                f"{type(self).__name__}: define `forward_equivalents`, "
                "the network evaluations per image and iteration"
            )
        return self.nfe_old + 3 * self.nfe_theta
