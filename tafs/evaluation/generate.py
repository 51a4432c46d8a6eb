"""Generates the images that a model is judged on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tafs.common import seeding
from tafs.experiment import run_inputs
from tafs.experiment.specs import PIPELINE, EvalSetting, EvalSpec, RunSpec
from tafs.models import sampling
from tafs.models.base import Backbone
from tafs.runtime import progress
from tafs.runtime.run_dir import RunDir

if TYPE_CHECKING:
    from tafs.models.pipelines import ReferencePipeline

# All models are judged on the same start noise. It differs from the seed of every training run.
EVALUATION_SEED = 1_000_003

Keys = list[tuple[int, int]]  # (prompt, image) of a batch
Images = Iterator[tuple[Keys, Tensor]]
Share = tuple[int, int]  # (n, of): every of-th batch from the n-th on
ALL: Share = (0, 1)


@torch.no_grad()
def sample(
    model: Any,
    texts: Sequence[str],
    setting: EvalSetting,
    batch: int,
    seed: int = EVALUATION_SEED,
    first: int = 0,
    share: Share = ALL,
) -> Images:
    """Generate images in batches; the images of a prompt are adjacent.

    Image i of prompt p has the same start noise in every setting, also in settings with fewer
    images per prompt.

    Args:
        model: a Backbone; a ReferencePipeline if the setting's sampler is PIPELINE.
        texts: the prompts.
        setting: the sampler (not BEST), its steps, and the number of images per prompt.
        batch: images per batch.
        first: the index of the image to start with, the first one of a batch.
        share: the batches to generate, counted from `first`.

    Yields:
        ([(prompt, image)], images [b, 3, H, W] in [0, 1] on the model's device).
    """
    keys = list(itertools.product(range(len(texts)), range(setting.images_per_prompt)))
    starts = range(first, len(keys), batch)[share[0] :: share[1]]
    batches = {n: keys[n : n + batch] for n in starts}
    of = _of_pipeline if setting.sampler == PIPELINE else _of_backbone
    done = first
    for part, images in of(model, texts, setting, seed, batches):
        done += len(part)
        progress.tell(label(setting), done, len(keys))
        yield part, images


def label(setting: EvalSetting) -> str:
    """What the progress of sampling is called."""
    return f"{setting.sampler}, {setting.nfe} steps"


def _of_pipeline(
    model: ReferencePipeline,
    texts: Sequence[str],
    setting: EvalSetting,
    seed: int,
    batches: Mapping[int, Keys],
) -> Images:
    for part in batches.values():
        generators = [seeding.generator(seed, "start", image, p) for p, image in part]
        yield part, model.generate([texts[p] for p, _ in part], generators, setting.nfe)


def _of_backbone(
    model: Backbone,
    texts: Sequence[str],
    setting: EvalSetting,
    seed: int,
    batches: Mapping[int, Keys],
) -> Images:
    shape = (len(texts), *model.latent_shape)
    noise = [
        torch.randn(shape, generator=seeding.generator(seed, "start", image))
        for image in range(setting.images_per_prompt)
    ]
    sampler = sampling.SAMPLERS[setting.sampler]
    grid = sampling.uniform_grid(setting.nfe) if sampler.uniform else model.time_grid(setting.nfe)
    model.prepare([texts[p] for part in batches.values() for p, _ in part])
    for keys in batches.values():
        cond = model.encode([texts[p] for p, _ in keys])
        x_0 = sampling.integrate(
            lambda x, t, c=cond: model.velocity(x, t, c),  # type: ignore[misc]
            torch.stack([noise[image][p] for p, image in keys]).to(model.device),
            grid.to(model.device),
            sampler.step,
            seeding.generators(seed, "step", setting.nfe, images=keys),
        )
        yield keys, model.decode(x_0)


def generate(
    model: Any, texts: Sequence[str], setting: EvalSetting, batch: int, seed: int = EVALUATION_SEED
) -> Tensor:
    """All images of `sample`, [prompts x images_per_prompt, 3, H, W]."""
    return torch.cat([images for _, images in sample(model, texts, setting, batch, seed)])


def load_model(
    run: RunDir,
    spec: RunSpec,
    evaluation: EvalSpec,
    iteration: int | None,
    waiting: Sequence[nn.Module] = (),
) -> Any:
    """The run's model after a number of training iterations.

    Args:
        iteration: of a snapshot; None: the final model, or the untrained one of a base run.
        waiting: see `Backbone`.
    """
    model = run_inputs.asset_source(spec).model(spec.backbone, evaluation.resolution)
    if isinstance(model, Backbone):
        model.waiting = waiting
    if spec.trained:
        model.load_adapter(run.verified(iteration))
    return model
