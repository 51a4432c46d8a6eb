"""Evaluation: `python -m tafs.evaluation.evaluate RUN_DIR` generates and scores a run's images.

All runs are judged on the same held-out prompts with the same start noise; the step noise of the
annealed sampler has its own stream. Outputs in RUN_DIR:

- scores.parquet: a row per (iteration, sampler, nfe, prompt, image, metric);
- samples.safetensors: the first image of a few prompts of each tag, for every setting, with the
  prompts' texts;
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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from tafs.assets.sources import AssetSource
from tafs.common import errors
from tafs.data.prompts import Prompt, first_of_each
from tafs.evaluation import choose, generate, image_archive, scores
from tafs.evaluation.choose import DEFAULT_SEEDS, Seeds
from tafs.evaluation.scores import PartialScores
from tafs.experiment import needs, run_inputs
from tafs.experiment.specs import BEST, EvalSpec
from tafs.rewards import golden
from tafs.rewards.registry import RewardSet
from tafs.runtime import memory, receipts
from tafs.runtime.deadline import Deadline
from tafs.runtime.main import run_stage
from tafs.runtime.progress import Reporter
from tafs.runtime.receipts import Needs
from tafs.runtime.run_dir import SAMPLES_PER_TAG, RunDir

SAVE_EVERY_S = 300.0  # the work that a kill may cost


def evaluate(run: RunDir, deadline: Deadline | None = None) -> None:
    """Write the run's scores and samples, and its images if a server scores them too.

    Raises:
        FileNotFoundError: a trained run has no adapter, or a snapshot is missing; names it.
        ValueError: the adapter or a snapshot is not the one that training wrote; names it.
        RunFailed: a reward does not reproduce its golden scores.
        ToBeContinued: the job's time is nearly over, or a signal asked it to stop; the scores so
            far are saved. Or the GPU's memory did not suffice; smaller batches continue them.
    """
    spec, evaluation = run_inputs.run_spec(run), run_inputs.eval_spec(run)
    if spec.trained:
        run.forget_training()
    source = run_inputs.asset_source(spec)
    rewards = verified_rewards(source, source.metrics(spec.prompts))
    own = needs.evaluation(run, spec, evaluation)

    def load(iteration: int | None) -> Any:
        return generate.load_model(run, spec, evaluation, iteration)

    seconds = judge(run, own, rewards, load, deadline=deadline)
    print(json.dumps({"evaluated": run.name, "seconds": seconds}))


def verified_rewards(source: AssetSource, metrics: Sequence[str]) -> RewardSet:
    """Load the metrics' models as evaluations use them, and check their golden scores.

    Raises:
        RunFailed: a reward does not reproduce its golden scores.
    """
    rewards = source.rewards(metrics, strict_geneval=True)
    if source.golden_scores is not None:
        digests = {name: source.reward_digest(name) for name in metrics}
        golden.verify(rewards.rewards, digests, source.golden_scores, source.device)
    return rewards


def judge(
    run: RunDir,
    own: Needs,
    rewards: RewardSet,
    load: Callable[[int | None], Any],
    *,
    seeds: Seeds = DEFAULT_SEEDS,
    deadline: Deadline | None = None,
) -> dict[str, float]:
    """Write the scores and samples of the run that run.json and evaluation.json describe.

    Args:
        own: what the scores depend on.
        load: iteration -> the model after it (None: the final one), when its images are needed.
        seeds: of the noise, and of the choice of the sampler.

    Returns:
        The seconds that choosing samplers, sampling and scoring took.

    Raises:
        ToBeContinued: as for `evaluate`.
    """
    with memory.fitting(run, "evaluate", run_inputs.eval_spec(run).batch) as batch:
        return _judge(run, own, rewards, load, batch, seeds, deadline or Deadline())


def _judge(
    run: RunDir,
    own: Needs,
    rewards: RewardSet,
    load: Callable[[int | None], Any],
    batch: int,
    seeds: Seeds,
    deadline: Deadline,
) -> dict[str, float]:
    spec = run_inputs.run_spec(run)
    evaluation = run_inputs.eval_spec(run).model_copy(update={"batch": batch})
    prompts, settings = run_inputs.test_prompts(spec, evaluation), evaluation.settings
    known = run_inputs.asset_source(spec).prompts(spec.prompts, "train")
    validation = choose.validation_prompts(known, evaluation.validation_prompts, seeds.validation)
    reporter = Reporter(run.folder, "evaluate", sum(s.nfe for s in settings))
    found: list[PartialScores] = []
    worked = False
    with deadline:
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
                    model = model or load(iteration)
                    if setting.sampler != BEST:
                        partial.sampler = setting.sampler
                    elif not partial.sampler:
                        choose.choose(
                            model,
                            rewards,
                            validation,
                            evaluation,
                            partial,
                            deadline,
                            seeds.validation,
                        )
                    score_setting(
                        model, rewards, prompts, evaluation, partial, deadline, seeds.images
                    )
                found.append(partial)
                name, parts = next(iter(partial.scores.items()))
                mean = torch.cat(parts).mean()
                reporter.advance(f"{setting.name}  {name} {mean:.3g}", setting.nfe)
    with receipts.replacing(run.folder, "evaluate", own, [run.scores, run.samples, run.samplers]):
        scores.write(run, spec, prompts, found, rewards.names)
    reporter.finish()
    return {kind: sum(partial.seconds[kind] for partial in found) for kind in found[0].seconds}


def score_setting(
    model: Any,
    rewards: RewardSet,
    prompts: Sequence[Prompt],
    evaluation: EvalSpec,
    partial: PartialScores,
    deadline: Deadline,
    seed: int = generate.EVALUATION_SEED,
) -> None:
    """Generate and score the images of a setting that have no scores yet.

    Args:
        model: the model of the setting's iteration.
        partial: the scores so far, to which the others are added.
        deadline: of this job; near it, the scores are saved and ToBeContinued is raised.
        seed: of the images' noise.
    """
    setting = partial.setting
    shown = set(first_of_each(prompts, SAMPLES_PER_TAG))
    texts = [prompt.text for prompt in prompts]
    sampled_by = setting.model_copy(update={"sampler": partial.sampler})
    batches = generate.sample(
        model, texts, sampled_by, evaluation.batch, seed=seed, first=partial.done
    )
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
