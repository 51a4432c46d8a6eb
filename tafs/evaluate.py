"""Evaluation: `python -m tafs.evaluate RUN_DIR` generates, scores and writes the run's long table.

Every run is judged on the same held-out prompts with the same start noise; the steps' noise of the
annealed sampler comes from a stream of its own. scores.parquet has a row per (sampler, nfe, prompt,
image, metric); samples.safetensors keeps each prompt's first image of every setting.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

from tafs import checkpoint, rundir, sampling, seeding
from tafs.backbones.base import Backbone
from tafs.progress import Reporter
from tafs.rewards import METRICS, registry

# One seed for all: methods are compared on the same prompts and noise. It is no training seed.
EVALUATION_SEED = 1_000_003


@dataclass(frozen=True)
class Setting:
    """One way of sampling a model, and on how many images of a prompt it is judged."""

    sampler: str
    nfe: int
    images_per_prompt: int

    @property
    def name(self) -> str:
        return f"{self.sampler}-{self.nfe}"


def settings_of(run: rundir.RunDir) -> list[Setting]:
    """The tables' settings with both samplers, the curve's with the method's own one, and the base
    model's full steps. The curve's points are judged on fewer images: they only draw a line."""
    description = run.description
    evaluation = description["settings"]["evaluation"]
    full, curve = evaluation["images_per_prompt"], evaluation["curve_images_per_prompt"]
    found = [
        Setting(sampler, nfe, full)
        for sampler in sampling.SAMPLERS
        for nfe in evaluation["table_nfe"]
    ]
    own = description["sampler"]
    others = [nfe for nfe in evaluation["curve_nfe"] if nfe not in evaluation["table_nfe"]]
    found += [Setting(own, nfe, curve) for nfe in others]
    if not run.trained:
        found.append(Setting("ode", evaluation["base_nfe"], full))
    return found


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
        FileNotFoundError: a trained run has no adapter yet; names it.
    """
    description = run.description
    evaluation = description["settings"]["evaluation"]
    backbone = rundir.load_backbone(description)
    if run.trained:
        backbone.load_adapter(run.adapter)
    world = description["settings"]["world"]
    prompts = rundir.test_prompts(world, evaluation["prompts"])
    metrics = registry.load(METRICS, world, strict_geneval=True)
    settings = settings_of(run)
    reporter = Reporter(run.folder, "evaluate", sum(s.nfe for s in settings))
    tables: list[pd.DataFrame] = []
    samples: dict[str, Tensor] = {}
    clock = time.perf_counter
    seconds = {"sample": 0.0, "reward": 0.0}
    for setting in settings:
        per_prompt = setting.images_per_prompt
        owners = [prompt for prompt in prompts for _ in range(per_prompt)]
        start = clock()
        images = generate(backbone, [p.text for p in prompts], setting, evaluation["batch"])
        sampled = clock()
        scores = metrics.report(metrics.score(images, owners))
        seconds["sample"] += sampled - start
        seconds["reward"] += clock() - sampled
        for metric, values in scores.items():
            tables.append(
                pd.DataFrame(
                    {
                        "prompt": [i for i in range(len(prompts)) for _ in range(per_prompt)],
                        "tag": [prompt.tag for prompt in owners],
                        "image": list(range(per_prompt)) * len(prompts),
                        "sampler": setting.sampler,
                        "nfe": setting.nfe,
                        "metric": metric,
                        "value": values.double().numpy(),
                    }
                )
            )
        first = images[::per_prompt].permute(0, 2, 3, 1)
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


def main() -> None:
    rundir.run_stage("evaluate", evaluate)


if __name__ == "__main__":
    main()
