"""Evaluation: `python -m tafs.evaluate RUN_DIR` generates, scores and writes the run's long table.

Every run is judged on the same held-out prompts with the same start noise; the steps' noise of the
annealed sampler comes from a stream of its own. scores.parquet has a row per (iteration, sampler,
nfe, prompt, image, metric); samples.safetensors keeps each prompt's first image of every setting of
the final model.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

from tafs import checkpoint, rundir, sampling, seeding
from tafs.backbones.base import Backbone
from tafs.progress import Reporter
from tafs.prompts import Prompt
from tafs.rewards import METRICS, registry

# One seed for all: methods are compared on the same prompts and noise. It is no training seed.
EVALUATION_SEED = 1_000_003


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
def generate(
    backbone: Backbone,
    texts: list[str],
    setting: Setting,
    batch: int,
    seed: int = EVALUATION_SEED,
) -> Tensor:
    """Images [prompts x images_per_prompt, 3, H, W] in [0, 1], a prompt's images in a row.

    The start noise of image i of prompt p is the same in every setting, also where a setting draws
    fewer images of a prompt.
    """
    per_prompt = setting.images_per_prompt
    step = sampling.SAMPLERS[setting.sampler]
    # Euler walks the model's own grid; annealed sampling is defined on the uniform one (Eq. 4).
    uniform = setting.sampler == "anneal"
    grid = sampling.uniform_grid(setting.nfe) if uniform else backbone.time_grid(setting.nfe)
    grid = grid.to(backbone.device)
    shape = (len(texts), *backbone.latent_shape)
    noise = torch.stack(
        [
            torch.randn(shape, generator=seeding.generator(seed, "start", image))
            for image in range(per_prompt)
        ],
        dim=1,
    ).flatten(0, 1)
    cond = backbone.encode(texts).repeat_interleave(per_prompt)
    parts = []
    for low in range(0, len(noise), batch):
        part = slice(low, low + batch)
        part_cond = cond[part]
        x_0 = sampling.integrate(
            lambda x, t, c=part_cond: backbone.velocity(x, t, c),  # type: ignore[misc]
            noise[part].to(backbone.device),
            grid,
            step,
            seeding.generator(seed, "step", setting.nfe, low),
        )
        parts.append(backbone.decode(x_0))
    return torch.cat(parts)


def evaluate(run: rundir.RunDir) -> None:
    """Write the run's scores and samples.

    Raises:
        FileNotFoundError: a trained run has no adapter yet, or not one of its snapshots; names it.
    """
    description, evaluation = run.description, run.evaluation
    world = description["settings"]["world"]
    prompts = rundir.test_prompts(world, evaluation["prompts"])
    metrics = registry.load(METRICS, world, strict_geneval=True)
    settings = [Setting(**setting) for setting in evaluation["settings"]]
    reporter = Reporter(run.folder, "evaluate", sum(s.nfe for s in settings))
    tables: list[pd.DataFrame] = []
    samples: dict[str, Tensor] = {}
    clock = time.perf_counter
    seconds = {"sample": 0.0, "reward": 0.0}
    for iteration, group in itertools.groupby(settings, lambda setting: setting.iteration):
        backbone = load_model(run, iteration)
        for setting in group:
            owners = [prompt for prompt in prompts for _ in range(setting.images_per_prompt)]
            start = clock()
            images = generate(backbone, [p.text for p in prompts], setting, evaluation["batch"])
            sampled = clock()
            scores = metrics.report(metrics.score(images, owners))
            seconds["sample"] += sampled - start
            seconds["reward"] += clock() - sampled
            tables += _long(scores, prompts, setting, description["iterations"])
            if iteration is None:
                first = images[:: setting.images_per_prompt].permute(0, 2, 3, 1)
                samples[setting.name] = (first * 255).round().byte().contiguous()
            geneval = scores["geneval"].mean().item()
            reporter.advance(f"{setting.name}  geneval {geneval:.2f}", setting.nfe)
    table = pd.concat(tables, ignore_index=True)
    for name in ("seed", "method", "run"):
        table.insert(0, name, run.name if name == "run" else description[name])
    table = table.astype({n: "category" for n in ("run", "method", "tag", "sampler", "metric")})
    checkpoint.atomic_write(run.scores, lambda path: table.to_parquet(path, index=False))
    checkpoint.atomic_write(run.samples, lambda path: save_file(samples, path))
    print(json.dumps({"evaluated": run.name, "seconds": seconds}))
    reporter.finish()


def load_model(run: rundir.RunDir, iteration: int | None) -> Backbone:
    """The run's model after an iteration; None: as it was left, or the base model."""
    backbone = rundir.load_backbone(run.description)
    if run.trained:
        backbone.load_adapter(run.adapter if iteration is None else run.snapshot(iteration))
    return backbone


def _long(
    scores: dict[str, Tensor], prompts: Sequence[Prompt], setting: Setting, final: int
) -> list[pd.DataFrame]:
    """A setting's scores [prompts x images], a row each."""
    images = setting.images_per_prompt
    axes = {
        "prompt": [i for i in range(len(prompts)) for _ in range(images)],
        "tag": [prompt.tag for prompt in prompts for _ in range(images)],
        "image": list(range(images)) * len(prompts),
        "iteration": final if setting.iteration is None else setting.iteration,
        "sampler": setting.sampler,
        "nfe": setting.nfe,
    }
    return [
        pd.DataFrame({**axes, "metric": metric, "value": values.double().numpy()})
        for metric, values in scores.items()
    ]


def main() -> None:
    rundir.run_stage("evaluate", evaluate)


if __name__ == "__main__":
    main()
