"""Evaluation: `python -m tafs.evaluation.evaluate RUN_DIR` generates and scores a run's images.

All runs are judged on the same held-out prompts with the same start noise; the step noise of the
annealed sampler has its own stream. Outputs in RUN_DIR:

- scores.parquet: a row per (iteration, sampler, nfe, prompt, image, metric);
- samples.safetensors: the first image of a few prompts of each tag, for every setting of the final
  model, with the prompts' texts;
- samplers.json: the sampler of every number of steps, and what its choice was based on;
- images.zip: all images, if a server scores them too (`tafs.evaluation.served`).

Scores are saved to RUN_DIR/.eval_state every few minutes, so that a job that was killed or has
reached its time limit continues. The folder is deleted after the report, or the server's scores,
have been written.
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
from tafs.evaluation import choose, generate, image_archive, scores
from tafs.evaluation.scores import PartialScores
from tafs.experiment import needs, run_inputs
from tafs.experiment.specs import BEST, EvalSpec
from tafs.rewards import golden
from tafs.rewards.registry import RewardSet
from tafs.runtime import receipts
from tafs.runtime.deadline import Deadline
from tafs.runtime.main import run_stage
from tafs.runtime.progress import Reporter
from tafs.runtime.run_dir import SAMPLES_PER_TAG, RunDir

SAVE_EVERY_S = 300.0  # the work that a kill may cost


def evaluate(run: RunDir, deadline: Deadline | None = None) -> None:
    """Write the run's scores and samples, and its images if a server scores them too.

    Raises:
        FileNotFoundError: a trained run has no adapter, or a snapshot is missing; names it.
        ValueError: the adapter or a snapshot is not the one that training wrote; names it.
        RunFailed: a reward does not reproduce its golden scores.
        ToBeContinued: the job's time is nearly over, or a signal asked it to stop; the scores so
            far are saved.
    """
    spec, evaluation = run_inputs.run_spec(run), run_inputs.eval_spec(run)
    if spec.trained:
        run.forget_training()
    source = run_inputs.asset_source(spec)
    prompts, metrics = run_inputs.test_prompts(spec, evaluation), source.metrics(spec.prompts)
    rewards = source.rewards(metrics, strict_geneval=True)
    if source.golden_scores is not None:
        digests = {name: source.reward_digest(name) for name in metrics}
        golden.verify(rewards.rewards, digests, source.golden_scores, source.device)
    settings = evaluation.settings
    known = source.prompts(spec.prompts, "train")
    validation = choose.validation_prompts(known, evaluation.validation_prompts)
    reporter = Reporter(run.folder, "evaluate", sum(s.nfe for s in settings))
    own = needs.evaluation(run, spec, evaluation)
    found: list[PartialScores] = []
    worked = False
    with deadline or Deadline() as deadline:
        for iteration, group in itertools.groupby(settings, lambda setting: setting.iteration):
            after = spec.iterations if iteration is None else iteration
            model = None
            for setting in group:
                partial = PartialScores(run, setting, after, own)
                drawn = [one for one in found if one.has_images_of(setting, after)]
                if drawn and not evaluation.served:  # a server scores the images of each setting
                    partial.adopt(drawn[0])
                if partial.done < len(prompts) * setting.images_per_prompt:
                    # Score at least one batch; otherwise a job with no time left requeues forever.
                    if worked and deadline.expired:
                        line = f"saved before {partial.folder.name}, to be continued"
                        raise errors.ToBeContinued(f"{line}: {deadline.expired}")
                    worked = True
                    model = model or generate.load_model(run, spec, evaluation, iteration)
                    if setting.sampler != BEST:
                        partial.sampler = setting.sampler
                    elif not partial.sampler:
                        choose.choose(model, rewards, validation, evaluation, partial, deadline)
                    score_setting(model, rewards, prompts, evaluation, partial, deadline)
                found.append(partial)
                name, parts = next(iter(partial.scores.items()))
                mean = torch.cat(parts).mean()
                reporter.advance(f"{setting.name}  {name} {mean:.3g}", setting.nfe)
    with receipts.replacing(run.folder, "evaluate", own, [run.scores, run.samples, run.samplers]):
        scores.write(run, spec, prompts, found, metrics)
    totals = {kind: sum(partial.seconds[kind] for partial in found) for kind in found[0].seconds}
    print(json.dumps({"evaluated": run.name, "seconds": totals}))
    reporter.finish()


def score_setting(
    model: Any,
    rewards: RewardSet,
    prompts: Sequence[Prompt],
    evaluation: EvalSpec,
    partial: PartialScores,
    deadline: Deadline,
) -> None:
    """Generate and score the images of a setting that have no scores yet.

    Args:
        model: the model of the setting's iteration.
        partial: the scores so far, to which the others are added.
        deadline: of this job; near it, the scores are saved and ToBeContinued is raised.
    """
    setting = partial.setting
    shown = set(first_of_each(prompts, SAMPLES_PER_TAG))
    texts = [prompt.text for prompt in prompts]
    sampled_by = setting.model_copy(update={"sampler": partial.sampler})
    batches = generate.sample(model, texts, sampled_by, evaluation.batch, first=partial.done)
    total = len(prompts) * setting.images_per_prompt
    while partial.done < total:
        file = partial.folder / f"{partial.done}.zip" if evaluation.served else None
        with image_archive.writing(file) if file is not None else nullcontext() as archive:
            begun = time.monotonic()
            while True:
                clock = time.perf_counter()
                keys, images = next(batches)
                sampled = time.perf_counter()
                found = rewards.score(images, [prompts[p] for p, _ in keys])
                partial.add(rewards.report(found))
                partial.seconds["sample"] += sampled - clock
                partial.seconds["reward"] += time.perf_counter() - sampled
                for (p, image), pixels in zip(keys, image_archive.pixels(images), strict=True):
                    if image == 0 and p in shown:
                        partial.first[p] = pixels
                    if archive is not None:
                        place = (partial.after, setting.sampler, setting.nfe, p, image)
                        archive.add(image_archive.Key(*place), pixels)
                deadline.tick()
                due = time.monotonic() - begun >= SAVE_EVERY_S
                if due or partial.done == total or deadline.expired:
                    break
        partial.save(file)
        if deadline.expired and partial.done < total:
            raise errors.ToBeContinued(
                f"saved after {partial.done} of {total} images of {partial.folder.name}, "
                f"to be continued: {deadline.expired}"
            )


def main() -> None:
    run_stage("evaluate", evaluate)


if __name__ == "__main__":
    main()
