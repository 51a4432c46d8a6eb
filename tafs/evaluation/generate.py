"""generate."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tafs.common import seeding
from tafs.models import sampling
from tafs.runtime import run_dir

# One seed for all: methods are compared on the same prompts and noise. It is no training seed.
EVALUATION_SEED = 1_000_003


PIPELINE = "pipeline"  # the sampler of models that are compared as they are


@dataclass(frozen=True)
class Setting:
    """One way of sampling a model, and on how many images of a prompt it is judged."""

    sampler: str
    nfe: int
    images_per_prompt: int
    iteration: int | None = None  # a snapshot's; None: the final model

    @property
    def name(self) -> str:
        return f"{self.sampler}-{self.nfe}"


@torch.no_grad()
def sample(
    model: Any,
    texts: Sequence[str],
    setting: Setting,
    batch: int,
    seed: int = EVALUATION_SEED,
    first: int = 0,
) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
    """Images in batches, a prompt's images in a row.

    The start noise of image i of prompt p is the same in every setting of a backbone, also where a
    setting draws fewer images of a prompt.

    Args:
        model: a Backbone, or a ReferencePipeline where the setting's sampler is the pipeline's own.
        first: the image to begin with, a batch's first.

    Yields:
        ([(prompt, image)], images [b, 3, H, W] in [0, 1] on the model's device).
    """
    keys = list(itertools.product(range(len(texts)), range(setting.images_per_prompt)))
    if setting.sampler == PIPELINE:
        for low in range(first, len(keys), batch):
            part = keys[low : low + batch]
            generators = [seeding.generator(seed, "start", image, p) for p, image in part]
            yield part, model.generate([texts[p] for p, _ in part], generators, setting.nfe)
        return
    shape = (len(texts), *model.latent_shape)
    noise = [
        torch.randn(shape, generator=seeding.generator(seed, "start", image))
        for image in range(setting.images_per_prompt)
    ]
    # Euler walks the model's own grid; annealed sampling is defined on the uniform one (Eq. 4).
    uniform = setting.sampler == "anneal"
    grid = sampling.uniform_grid(setting.nfe) if uniform else model.time_grid(setting.nfe)
    model.prepare(texts)
    for low in range(first, len(keys), batch):
        part = keys[low : low + batch]
        cond = model.encode([texts[p] for p, _ in part])
        x_0 = sampling.integrate(
            lambda x, t, c=cond: model.velocity(x, t, c),  # type: ignore[misc]
            torch.stack([noise[image][p] for p, image in part]).to(model.device),
            grid.to(model.device),
            sampling.SAMPLERS[setting.sampler],
            seeding.generator(seed, "step", setting.nfe, low),
        )
        yield part, model.decode(x_0)


def generate(
    model: Any, texts: Sequence[str], setting: Setting, batch: int, seed: int = EVALUATION_SEED
) -> Tensor:
    """All images of `sample` at once, [prompts x images_per_prompt, 3, H, W]."""
    return torch.cat([drawn for _, drawn in sample(model, texts, setting, batch, seed)])


def load_model(run: run_dir.RunDir, iteration: int | None) -> Any:
    """The run's model after an iteration; None: as it was left, or the untrained model."""
    model = run.world.model(run.description["backbone"], run.evaluation["resolution"])
    if run.trained:
        model.load_adapter(run.verified(iteration))
    return model
