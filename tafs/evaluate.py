"""Evaluation: `python -m tafs.evaluate RUN_DIR` generates, scores and writes the run's long table.

Every run is judged on the same held-out prompts with the same start noise; the steps' noise of the
annealed sampler comes from a stream of its own. scores.parquet has a row per (iteration, sampler,
nfe, prompt, image, metric); samples.safetensors keeps the first image of the first prompts of each
tag, for every setting of the final model. Where a metric's model is behind a server, all images go
into images.zip, which `tafs.judge` reads.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

from tafs import checkpoint, images, rundir, sampling, seeding
from tafs.progress import Reporter
from tafs.prompts import Prompt, first_of_each
from tafs.rewards import canary

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
    model: Any, texts: Sequence[str], setting: Setting, batch: int, seed: int = EVALUATION_SEED
) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
    """Images in batches, a prompt's images in a row.

    The start noise of image i of prompt p is the same in every setting of a backbone, also where a
    setting draws fewer images of a prompt.

    Args:
        model: a Backbone, or a Zoo where the setting's sampler is the pipeline's own.

    Yields:
        ([(prompt, image)], images [b, 3, H, W] in [0, 1] on the model's device).
    """
    keys = list(itertools.product(range(len(texts)), range(setting.images_per_prompt)))
    if setting.sampler == PIPELINE:
        for low in range(0, len(keys), batch):
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
    for low in range(0, len(keys), batch):
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


def evaluate(run: rundir.RunDir) -> None:
    """Write the run's scores and samples, and its images where a server has to judge them.

    Raises:
        FileNotFoundError: a trained run has no adapter yet, or not one of its snapshots; names it.
        failures.RunFailed: a reward does not pass its canary.
    """
    description, evaluation = run.description, run.evaluation
    prompts, measured = run.test_prompts(), run.world.metrics(description["prompts"])
    metrics = run.world.rewards(measured, strict_geneval=True)
    if run.world.canary is not None:
        digests = {name: run.world.reward_digest(name) for name in measured}
        canary.verify(metrics.rewards, digests, run.world.canary, run.world.device)
    settings = [Setting(**setting) for setting in evaluation["settings"]]
    reporter = Reporter(run.folder, "evaluate", sum(s.nfe for s in settings))
    shown = first_of_each(prompts, rundir.SAMPLES_PER_TAG)
    texts = [prompt.text for prompt in prompts]
    samples = {"prompts": torch.tensor(shown)}
    tables: list[pd.DataFrame] = []
    seconds = {"sample": 0.0, "reward": 0.0}
    with images.writing(run.images) if evaluation["server"] else nullcontext() as archive:
        for iteration, group in itertools.groupby(settings, lambda setting: setting.iteration):
            model = load_model(run, iteration)
            after = description["iterations"] if iteration is None else iteration
            for setting in group:
                columns: dict[str, list[Tensor]] = {}
                first: dict[int, Tensor] = {}
                clock = time.perf_counter()
                for part, drawn in sample(model, texts, setting, evaluation["batch"]):
                    sampled = time.perf_counter()
                    seconds["sample"] += sampled - clock
                    owners = [prompts[p] for p, _ in part]
                    for name, values in metrics.report(metrics.score(drawn, owners)).items():
                        columns.setdefault(name, []).append(values.cpu())
                    clock = time.perf_counter()
                    seconds["reward"] += clock - sampled
                    for (p, image), pixels in zip(part, images.pixels(drawn), strict=True):
                        if image == 0 and p in shown:
                            first[p] = pixels
                        if archive is not None:
                            key = images.Key(after, setting.sampler, setting.nfe, p, image)
                            archive.add(key, pixels)
                scores = {name: torch.cat(parts) for name, parts in columns.items()}
                tables.append(_long(scores, prompts, setting, after))
                if iteration is None:
                    samples[setting.name] = torch.stack([first[p] for p in shown])
                name, values = next(iter(scores.items()))
                reporter.advance(f"{setting.name}  {name} {values.mean():.3g}", setting.nfe)
        write_table(run, run.scores, pd.concat(tables, ignore_index=True))
        checkpoint.atomic_write(run.samples, lambda path: save_file(samples, path))
    print(json.dumps({"evaluated": run.name, "seconds": seconds}))
    reporter.finish()


def load_model(run: rundir.RunDir, iteration: int | None) -> Any:
    """The run's model after an iteration; None: as it was left, or the untrained model."""
    model = run.world.model(run.description["backbone"], run.evaluation["resolution"])
    if run.trained:
        model.load_adapter(run.adapter if iteration is None else run.snapshot(iteration))
    return model


def write_table(run: rundir.RunDir, file: Path, table: pd.DataFrame) -> None:
    """A long table with the run's name, method and seed in front."""
    for name in ("seed", "method", "run"):
        table.insert(0, name, run.name if name == "run" else run.description[name])
    table = table.astype({n: "category" for n in ("run", "method", "tag", "sampler", "metric")})
    checkpoint.atomic_write(file, lambda path: table.to_parquet(path, index=False))


def _long(
    scores: Mapping[str, Tensor], prompts: Sequence[Prompt], setting: Setting, iteration: int
) -> pd.DataFrame:
    """A setting's scores [prompts x images], a row each."""
    count = setting.images_per_prompt
    axes = {
        "prompt": [i for i in range(len(prompts)) for _ in range(count)],
        "tag": [prompt.tag for prompt in prompts for _ in range(count)],
        "image": list(range(count)) * len(prompts),
        "iteration": iteration,
        "sampler": setting.sampler,
        "nfe": setting.nfe,
    }
    return pd.concat(
        pd.DataFrame({**axes, "metric": metric, "value": values.double().numpy()})
        for metric, values in scores.items()
    )


def main() -> None:
    rundir.run_stage("evaluate", evaluate)


if __name__ == "__main__":
    main()
