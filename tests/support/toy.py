"""A flow model with two-dimensional latents, whose adapter is an affine shift of the images."""

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tafs.assets.sources import AssetSettings
from tafs.common import seeding
from tafs.data import prompts
from tafs.data.plugins.shapes import FOLDER
from tafs.evaluation.scoring import Scored, Work
from tafs.experiment.schema import Lora
from tafs.experiment.specs import RunSpec, TrainingSpec
from tafs.methods import GroupRelative, PolicyGradient
from tafs.methods.registry import method_class
from tafs.models import Conditioning
from tafs.rewards.metrics import Metric
from tafs.rewards.registry import Reward, RewardSet
from tafs.runtime import gpus
from tafs.runtime.distributed import ALONE, Processes
from tafs.training.trainer import Trainer


def streams(count: int, seed: int = 0) -> seeding.Generators:
    """Return the generators of `count` images."""
    return seeding.generators(seed, "test", images=[(image,) for image in range(count)])


class ToyBackbone:
    """x0_hat = x_t / 2 + weight t + bias; weight and bias are the adapter."""

    latent_shape = (2,)
    device = torch.device("cpu")
    compiled = False

    def __init__(self) -> None:
        self.active = True

    def prepare(self, prompts: Sequence[str]) -> None:
        """Do nothing: there are no text encoders."""

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


class ToyReward(Reward):
    """A reward of two-dimensional latents, which would be refused as images."""

    def score(self, images: Tensor, image_prompts: Sequence[prompts.Prompt]) -> Tensor:
        return self.scorer(images, image_prompts)


def toy_rewards(names: Sequence[str] = ("clip",)) -> RewardSet:
    """Return rewards that are coordinates of the image: the first reward the first, and so on."""
    metrics = [Metric(name, name, "score", digits=3, differentiable=True) for name in names]
    return RewardSet(
        [ToyReward(metric, lambda images, _, n=n: images[:, n]) for n, metric in enumerate(metrics)]
    )


def call_of(run: Trainer, image: int, step: int = 0) -> tuple[int, int]:
    """Return the call of a reward, within an iteration, that scores an image, and its row."""
    scored = len(run.method.scored_steps()) if isinstance(run.method, GroupRelative) else 1
    chunk, row = divmod(image, run.micro_batch)
    return chunk * scored + step, row


def spoil(run: Trainer, values: Mapping[tuple[int, int], float], name: str = "clip") -> None:
    """Make a reward return these values at the given (call, row); calls count from now on."""

    def spoiled(reward: Reward) -> Reward:
        calls = itertools.count()

        def score(images: Tensor, image_prompts: Sequence[prompts.Prompt]) -> Tensor:
            call = next(calls)
            scores = reward.score(images, image_prompts).clone()
            for (of, row), value in values.items():
                if of == call:
                    scores[row] = value
            return scores

        return dataclasses.replace(reward, scorer=score)

    run.rewards.rewards = tuple(
        spoiled(reward) if reward.name == name else reward for reward in run.rewards.rewards
    )


def toy_trainer(spec: RunSpec, processes: Processes = ALONE) -> Trainer:
    """The trainer of a toy run, on the embedded training prompts."""
    known = prompts.read(FOLDER / "train.jsonl")
    backbone: Any = ToyBackbone()
    return Trainer(spec, backbone, toy_rewards(list(spec.rewards)), known, processes)


def toy_run(
    method: str,
    *,
    rewards: Mapping[str, float] | None = None,
    training: Mapping[str, int] | None = None,
    **hyperparameters: Any,
) -> RunSpec:
    """A toy run, which trains in seconds; `training` replaces fields of `TrainingSpec`."""
    policy = issubclass(method_class(method), PolicyGradient)
    clipping = {"clip_range": 0.2} if policy else {}
    settings = {
        "iterations": 30,
        "prompts_per_iteration": 4,
        "group_size": 16,
        "micro_batch": 32,
        "checkpoint_every": 5,
    }
    return RunSpec(
        name=f"{method}.toy",
        variant=method,
        method=method,
        title=method,
        task="toy",
        prompts="shapes",
        backbone="toy",
        model={},
        seed=0,
        scale="toy",
        assets=AssetSettings(
            assets="shapes", lock="", device="cpu", dtype="float32", gradient_checkpointing=False
        ),
        resolution=1,
        training=TrainingSpec(**{**settings, **(training or {})}, lora=Lora(rank=1, alpha=1)),
        rewards=dict(rewards or {"clip": 1.0}),
        hyperparameters={"learning_rate": 0.02, **clipping, **hyperparameters},
        sampler="ode",
    )


def exhausted() -> None:
    """What a model that does not fit on a GPU does when it is loaded."""
    raise torch.OutOfMemoryError("CUDA out of memory")


class Seeing:
    """Scores a batch by the GPUs that its process sees."""

    def score(self, work: Work, share: tuple[int, int]) -> Iterator[Scored]:
        for _ in range(work.batches)[share[0] :: share[1]]:
            yield Scored([], {}, {}, [os.environ[gpus.VARIABLE].encode()], {})
