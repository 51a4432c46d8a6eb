"""A flow model small enough to know everything about: 2-d latents, an affine estimate."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tafs.data import prompts
from tafs.data.plugins.shapes import FOLDER
from tafs.methods.policy_gradient import PolicyGradient
from tafs.methods.registry import method_class
from tafs.models.base import Conditioning
from tafs.rewards.metrics import Metric
from tafs.rewards.registry import Reward, RewardSet
from tafs.runtime.distributed import ALONE, Processes
from tafs.training.trainer import Trainer


class ToyBackbone:
    """x0_hat = x_t / 2 + shift(t): the adapter learns where the images lie."""

    latent_shape = (2,)
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.active = True

    def prepare(self, prompts: Sequence[str]) -> None:
        """There is nothing to encode."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(torch.zeros(len(prompts), 1, 1), torch.zeros(len(prompts), 1))

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        shift = self.weight * t[:, None] + self.bias if self.active else 0.0
        return (x_t - (x_t / 2 + shift)) / t[:, None]

    def decode(self, x_0: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return x_0

    def time_grid(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1)

    def add_lora(self, rank: int, alpha: int, generator: torch.Generator) -> None:
        self.weight, self.bias = (nn.Parameter(torch.zeros(2)) for _ in range(2))

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight, "bias": self.bias}

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.active = False
        try:
            yield
        finally:
            self.active = True


def toy_rewards(names: Sequence[str] = ("clip",)) -> RewardSet:
    """Larger is better: the first coordinate of the image, then the second."""
    return RewardSet(
        [
            Reward(
                Metric(name, name, "score", digits=3, differentiable=True),
                lambda images, _, n=n: images[:, n],
            )
            for n, name in enumerate(names)
        ]
    )


def call_of(run: Trainer, image: int, step: int = 0) -> tuple[int, int]:
    """Which call of a reward in an iteration scores an image of this process, and in which row."""
    scored = len(run.method.scored_steps()) if isinstance(run.method, PolicyGradient) else 1
    chunk, row = divmod(image, run.micro_batch)
    return chunk * scored + step, row


def spoil(run: Trainer, values: Mapping[tuple[int, int], float], name: str = "clip") -> None:
    """Let a reward return these values in the given (call, row), counted from now on."""

    def spoiled(reward: Reward) -> Reward:
        calls = itertools.count()

        def score(images: Tensor, image_prompts: Sequence[prompts.Prompt]) -> Tensor:
            call = next(calls)
            scores = reward.score(images, image_prompts).clone()
            for (of, row), value in values.items():
                if of == call:
                    scores[row] = value
            return scores

        return dataclasses.replace(reward, score=score)

    run.rewards.rewards = tuple(
        spoiled(reward) if reward.name == name else reward for reward in run.rewards.rewards
    )


def toy_trainer(description: dict, processes: Processes = ALONE) -> Trainer:
    """A toy run's training, on the embedded world's prompts."""
    known = prompts.read(FOLDER / "train.jsonl")
    backbone: Any = ToyBackbone()
    rewards = toy_rewards(list(description["rewards"]))
    return Trainer(description, backbone, rewards, known, processes)


def toy_run(method: str, **hyperparameters: object) -> dict:
    """The description of a toy run: seconds of work."""
    policy = issubclass(method_class(method), PolicyGradient)
    clipping = {"clip_range": 0.2} if policy else {}
    return {
        "name": f"{method}.toy",
        "method": method,
        "seed": 0,
        "rewards": {"clip": 1.0},
        "hyperparameters": {"learning_rate": 0.02, **clipping, **hyperparameters},
        "settings": {
            "world": "shapes",
            "iterations": 30,
            "prompts_per_iteration": 4,
            "group_size": 16,
            "micro_batch": 32,
            "checkpoint_every": 5,
            "lora": {"rank": 1, "alpha": 1},
        },
    }
