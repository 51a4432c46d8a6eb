"""Evaluation: `python -m tafs.evaluation.evaluate RUN_DIR` generates, scores and writes the run's long table.

Every run is judged on the same held-out prompts with the same start noise; the steps' noise of the
annealed sampler comes from a stream of its own. scores.parquet has a row per (iteration, sampler,
nfe, prompt, image, metric); samples.safetensors keeps the first image of the first prompts of each
tag, for every setting of the final model. Where a metric's model is behind a server, all images go
into images.zip, which `tafs.evaluation.served` reads.

What has been judged is kept in RUN_DIR/.judged every few minutes, so that a job that is killed or
near its time limit is continued; it is deleted once the tables, or the server, have read the rest.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from tafs.common import errors
from tafs.data.prompts import Prompt, first_of_each
from tafs.evaluation import image_archive
from tafs.evaluation.generate import Setting, load_model, sample
from tafs.evaluation.scores import PartialScores, write
from tafs.rewards import golden
from tafs.rewards.registry import RewardSet
from tafs.runtime import main as main_
from tafs.runtime import run_dir
from tafs.runtime.deadline import Deadline
from tafs.runtime.progress import Reporter

KEEP_S = 300.0  # of work that a kill may cost


def evaluate(run: run_dir.RunDir) -> None:
    """Write the run's scores and samples, and its images where a server has to judge them.

    Raises:
        FileNotFoundError: a trained run has no adapter yet, or not one of its snapshots; names it.
        ValueError: the adapter or a snapshot is not what training has written; names it.
        failures.RunFailed: a reward does not pass its golden scores.
        failures.ToBeContinued: the job's time is over; what has been judged is kept.
    """
    description, evaluation = run.description, run.evaluation
    if run.trained:
        run.forget_training()
    prompts, measured = run.test_prompts(), run.world.metrics(description["prompts"])
    metrics = run.world.rewards(measured, strict_geneval=True)
    if run.world.golden_scores is not None:
        digests = {name: run.world.reward_digest(name) for name in measured}
        golden.verify(metrics.rewards, digests, run.world.golden_scores, run.world.device)
    settings = [Setting(**setting) for setting in evaluation["settings"]]
    reporter = Reporter(run.folder, "evaluate", sum(s.nfe for s in settings))
    fingerprint = run.judging_fingerprint()
    found: list[PartialScores] = []
    worked = False  # a job without time would be continued for ever
    with Deadline.from_environment() as deadline:
        for iteration, group in itertools.groupby(settings, lambda setting: setting.iteration):
            after = description["iterations"] if iteration is None else iteration
            model = None
            for setting in group:
                judged = PartialScores(run, setting, after, fingerprint)
                if judged.done < len(prompts) * setting.images_per_prompt:
                    if worked and deadline.expired:
                        raise errors.ToBeContinued(
                            f"saved before {judged.folder.name}, to be continued: {deadline.expired}"
                        )
                    worked = True
                    model = model or load_model(run, iteration)
                    score_setting(run, model, metrics, prompts, setting, judged, deadline)
                found.append(judged)
                name, parts = next(iter(judged.scores.items()))
                mean = torch.cat(parts).mean()
                reporter.advance(f"{setting.name}  {name} {mean:.3g}", setting.nfe)
    write(run, prompts, settings, found, measured)
    totals = {kind: sum(judged.seconds[kind] for judged in found) for kind in found[0].seconds}
    print(json.dumps({"evaluated": run.name, "seconds": totals}))
    reporter.finish()


def score_setting(
    run: run_dir.RunDir,
    model: Any,
    metrics: RewardSet,
    prompts: Sequence[Prompt],
    setting: Setting,
    judged: PartialScores,
    deadline: Deadline,
) -> None:
    """Sample and score the images of a setting that are not judged yet.

    Raises:
        failures.ToBeContinued: the job's time is over; what has been judged is kept.
    """
    shown = set(first_of_each(prompts, run_dir.SAMPLES_PER_TAG))
    texts, batch = [prompt.text for prompt in prompts], run.evaluation["batch"]
    batches = sample(model, texts, setting, batch, first=judged.done)
    total = len(prompts) * setting.images_per_prompt
    while judged.done < total:
        file = judged.folder / f"{judged.done}.zip" if run.evaluation["server"] else None
        with image_archive.writing(file) if file is not None else nullcontext() as archive:
            begun = time.monotonic()
            while True:  # one batch at least, or a job without time would be continued for ever
                clock = time.perf_counter()
                part, drawn = next(batches)
                sampled = time.perf_counter()
                scores = metrics.score(drawn, [prompts[p] for p, _ in part])
                judged.add(metrics.report(scores))
                judged.seconds["sample"] += sampled - clock
                judged.seconds["reward"] += time.perf_counter() - sampled
                for (p, image), pixels in zip(part, image_archive.pixels(drawn), strict=True):
                    if image == 0 and p in shown:
                        judged.first[p] = pixels
                    if archive is not None:
                        key = image_archive.Key(
                            judged.after, setting.sampler, setting.nfe, p, image
                        )
                        archive.add(key, pixels)
                deadline.tick()
                due = time.monotonic() - begun >= KEEP_S
                if due or judged.done == total or deadline.expired:
                    break
        judged.save(file)
        if deadline.expired and judged.done < total:
            raise errors.ToBeContinued(
                f"saved after {judged.done} of {total} images of {judged.folder.name}, "
                f"to be continued: {deadline.expired}"
            )


def main() -> None:
    main_.run_stage("evaluate", evaluate)


if __name__ == "__main__":
    main()
