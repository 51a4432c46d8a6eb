"""Evaluation: `python -m tafs.evaluate RUN_DIR` generates, scores and writes the run's long table.

Every run is judged on the same held-out prompts with the same start noise; the steps' noise of the
annealed sampler comes from a stream of its own. scores.parquet has a row per (iteration, sampler,
nfe, prompt, image, metric); samples.safetensors keeps the first image of the first prompts of each
tag, for every setting of the final model. Where a metric's model is behind a server, all images go
into images.zip, which `tafs.judge` reads.

What has been judged is kept in RUN_DIR/.judged every few minutes, so that a job that is killed or
near its time limit is continued; it is deleted once the tables, or the server, have read the rest.
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

from tafs import checkpoint, failures, images, rundir, sampling, seeding
from tafs.budget import Budget
from tafs.digest import sha256
from tafs.progress import Reporter
from tafs.prompts import Prompt, first_of_each
from tafs.rewards import canary
from tafs.rewards.registry import RewardSet

# One seed for all: methods are compared on the same prompts and noise. It is no training seed.
EVALUATION_SEED = 1_000_003
PIPELINE = "pipeline"  # the sampler of models that are compared as they are
KEEP_S = 300.0  # of work that a kill may cost


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
        model: a Backbone, or a Zoo where the setting's sampler is the pipeline's own.
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


class Judged:
    """What is known of a setting's images so far, on the disk too.

    Args:
        fingerprint: of all that decides the scores.
    """

    def __init__(self, run: rundir.RunDir, setting: Setting, after: int, fingerprint: str) -> None:
        self.folder = run.judged / f"{setting.name}-{after}"
        self.after = after  # iterations of training
        self._fingerprint = fingerprint
        state = checkpoint.load(self.folder, fingerprint, self._lacks)
        self.done = 0 if state is None else state.iteration  # images
        kept = {} if state is None else state.tensors
        self.scores = {n[7:]: [t] for n, t in kept.items() if n.startswith("scores/")}
        self.first = {int(n[6:]): t for n, t in kept.items() if n.startswith("first/")}
        self.archives: dict[str, str] = {} if state is None else state.values["archives"]
        self.seconds: dict[str, float] = (
            {"sample": 0.0, "reward": 0.0} if state is None else state.values["seconds"]
        )

    def add(self, scores: Mapping[str, Tensor]) -> None:
        """A batch's, [b] each."""
        for name, values in scores.items():
            self.scores.setdefault(name, []).append(values.cpu())
        self.done += len(values)

    def save(self, archive: Path | None) -> None:
        """Keep it, and the archive of the images since the last time."""
        if archive is not None:
            self.archives[archive.name] = sha256(archive)
        tensors = {f"scores/{name}": torch.cat(parts) for name, parts in self.scores.items()}
        tensors |= {f"first/{prompt}": pixels for prompt, pixels in self.first.items()}
        values = {"archives": self.archives, "seconds": self.seconds}
        checkpoint.save(self.folder, self._fingerprint, self.done, tensors, values)

    def _lacks(self, state: checkpoint.State) -> str:
        for name, digest in state.values["archives"].items():
            file = self.folder / name
            if not file.is_file() or sha256(file) != digest:
                return f"{name} is damaged"
        return ""


def evaluate(run: rundir.RunDir) -> None:
    """Write the run's scores and samples, and its images where a server has to judge them.

    Raises:
        FileNotFoundError: a trained run has no adapter yet, or not one of its snapshots; names it.
        ValueError: the adapter or a snapshot is not what training has written; names it.
        failures.RunFailed: a reward does not pass its canary.
        failures.ToBeContinued: the job's time is over; what has been judged is kept.
    """
    description, evaluation = run.description, run.evaluation
    if run.trained:
        run.forget_training()
    prompts, measured = run.test_prompts(), run.world.metrics(description["prompts"])
    metrics = run.world.rewards(measured, strict_geneval=True)
    if run.world.canary is not None:
        digests = {name: run.world.reward_digest(name) for name in measured}
        canary.verify(metrics.rewards, digests, run.world.canary, run.world.device)
    settings = [Setting(**setting) for setting in evaluation["settings"]]
    reporter = Reporter(run.folder, "evaluate", sum(s.nfe for s in settings))
    fingerprint = run.judging_fingerprint()
    found: list[Judged] = []
    worked = False  # a job without time would be continued for ever
    with Budget.from_environment() as budget:
        for iteration, group in itertools.groupby(settings, lambda setting: setting.iteration):
            after = description["iterations"] if iteration is None else iteration
            model = None
            for setting in group:
                judged = Judged(run, setting, after, fingerprint)
                if judged.done < len(prompts) * setting.images_per_prompt:
                    if worked and budget.spent:
                        raise failures.ToBeContinued(
                            f"saved before {judged.folder.name}, to be continued: {budget.spent}"
                        )
                    worked = True
                    model = model or load_model(run, iteration)
                    judge(run, model, metrics, prompts, setting, judged, budget)
                found.append(judged)
                name, parts = next(iter(judged.scores.items()))
                mean = torch.cat(parts).mean()
                reporter.advance(f"{setting.name}  {name} {mean:.3g}", setting.nfe)
    write(run, prompts, settings, found, measured)
    totals = {kind: sum(judged.seconds[kind] for judged in found) for kind in found[0].seconds}
    print(json.dumps({"evaluated": run.name, "seconds": totals}))
    reporter.finish()


def judge(
    run: rundir.RunDir,
    model: Any,
    metrics: RewardSet,
    prompts: Sequence[Prompt],
    setting: Setting,
    judged: Judged,
    budget: Budget,
) -> None:
    """Sample and score the images of a setting that are not judged yet.

    Raises:
        failures.ToBeContinued: the job's time is over; what has been judged is kept.
    """
    shown = set(first_of_each(prompts, rundir.SAMPLES_PER_TAG))
    texts, batch = [prompt.text for prompt in prompts], run.evaluation["batch"]
    batches = sample(model, texts, setting, batch, first=judged.done)
    total = len(prompts) * setting.images_per_prompt
    while judged.done < total:
        file = judged.folder / f"{judged.done}.zip" if run.evaluation["server"] else None
        with images.writing(file) if file is not None else nullcontext() as archive:
            begun = time.monotonic()
            while True:  # one batch at least, or a job without time would be continued for ever
                clock = time.perf_counter()
                part, drawn = next(batches)
                sampled = time.perf_counter()
                scores = metrics.score(drawn, [prompts[p] for p, _ in part])
                judged.add(metrics.report(scores))
                judged.seconds["sample"] += sampled - clock
                judged.seconds["reward"] += time.perf_counter() - sampled
                for (p, image), pixels in zip(part, images.pixels(drawn), strict=True):
                    if image == 0 and p in shown:
                        judged.first[p] = pixels
                    if archive is not None:
                        key = images.Key(judged.after, setting.sampler, setting.nfe, p, image)
                        archive.add(key, pixels)
                budget.lap()
                due = time.monotonic() - begun >= KEEP_S
                if due or judged.done == total or budget.spent:
                    break
        judged.save(file)
        if budget.spent and judged.done < total:
            raise failures.ToBeContinued(
                f"saved after {judged.done} of {total} images of {judged.folder.name}, "
                f"to be continued: {budget.spent}"
            )


def write(
    run: rundir.RunDir,
    prompts: Sequence[Prompt],
    settings: Sequence[Setting],
    found: Sequence[Judged],
    measured: Sequence[str],
) -> None:
    """Put what has been judged in its places."""
    shown = first_of_each(prompts, rundir.SAMPLES_PER_TAG)
    samples = {"prompts": torch.tensor(shown)}
    tables = []
    for setting, judged in zip(settings, found, strict=True):
        scores = {name: torch.cat(judged.scores[name]) for name in measured}
        tables.append(_long(scores, prompts, setting, judged.after))
        if setting.iteration is None:
            samples[setting.name] = torch.stack([judged.first[p] for p in shown])
    if run.evaluation["server"]:
        archives = [judged.folder / name for judged in found for name in judged.archives]
        images.join(archives, run.images)
    write_table(run, run.scores, pd.concat(tables, ignore_index=True))
    checkpoint.atomic_write(run.samples, lambda path: save_file(samples, path))


def load_model(run: rundir.RunDir, iteration: int | None) -> Any:
    """The run's model after an iteration; None: as it was left, or the untrained model."""
    model = run.world.model(run.description["backbone"], run.evaluation["resolution"])
    if run.trained:
        model.load_adapter(run.verified(iteration))
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
