"""Evaluation: `python -m tafs.evaluation.evaluate RUN_DIR` generates and scores a run's images.

All runs are judged on the same held-out prompts with the same start noise; the step noise of the
annealed sampler has its own stream. Outputs in RUN_DIR:

- scores.parquet: a row per (iteration, sampler, nfe, prompt, image, metric);
- samples.safetensors: the first image of a few prompts of each tag, for every setting, with the
  prompts' texts;
- samplers.json: the sampler of every number of steps, and what its choice was based on;
- images.json: where all images are, if a server scores them too (`tafs.evaluation.served`).

Scores and these images are saved to RUN_DIR/.eval_state every few minutes, so that a job that was
killed or has reached its time limit continues. The folder is deleted after the report, or the
server's scores, have been written. With `--processes N` as many processes, with a GPU each, share
the batches of every setting (`tafs.evaluation.scoring`); the results are the same.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from tafs.assets.sources import AssetSource
from tafs.common import errors
from tafs.data.prompts import Prompt, first_of_each
from tafs.evaluation import choose, generate, image_archive, scores, scoring
from tafs.evaluation.choose import DEFAULT_SEEDS, Seeds
from tafs.evaluation.scores import PartialScores
from tafs.evaluation.scoring import Scorer, Work
from tafs.experiment import needs, run_inputs
from tafs.experiment.specs import BEST, EvalSpec, RunSpec
from tafs.rewards import golden
from tafs.rewards.registry import RewardSet
from tafs.runtime import memory, receipts
from tafs.runtime.deadline import Deadline
from tafs.runtime.main import arguments, run_stage
from tafs.runtime.progress import Reporter
from tafs.runtime.receipts import Needs
from tafs.runtime.run_dir import SAMPLES_PER_TAG, RunDir

SAVE_EVERY_S = 300.0  # the work that a kill may cost


def evaluate(run: RunDir, deadline: Deadline | None = None, processes: int = 1) -> None:
    """Write the run's scores and samples, and its images if a server scores them too.

    Args:
        processes: share the work.

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
    metrics = _metrics(spec, evaluation)
    own = needs.evaluation(run, spec, evaluation)
    with scoring.scorer(functools.partial(_local, run.folder), processes) as scorer:
        seconds = judge(run, own, scorer, metrics, deadline=deadline)
    print(json.dumps({"evaluated": run.name, "seconds": seconds}))


def _metrics(spec: RunSpec, evaluation: EvalSpec) -> tuple[str, ...]:
    """The metrics that this evaluation computes."""
    source = run_inputs.asset_source(spec)
    return source.metrics(spec.prompts, evaluation.optional_metrics)


def _local(folder: Path) -> scoring.Local:
    """A run's rewards and models in this process."""
    run = RunDir(folder)
    spec, evaluation = run_inputs.run_spec(run), run_inputs.eval_spec(run)
    source = run_inputs.asset_source(spec)
    rewards = verified_rewards(source, _metrics(spec, evaluation))
    load = functools.partial(generate.load_model, run, spec, evaluation, waiting=rewards.networks)
    return scoring.Local(rewards, load)


def verified_rewards(source: AssetSource, metrics: Sequence[str]) -> RewardSet:
    """Load the metrics' models as evaluations use them; check or store their golden scores.

    Raises:
        RunFailed: a reward does not reproduce its golden scores.
    """
    rewards = source.rewards(metrics, strict_geneval=True)
    if source.golden_scores is not None:
        digests = {name: source.reward_digest(name) for name in metrics}
        golden.record(rewards.rewards, digests, source.golden_scores, source.device)
    return rewards


def judge(
    run: RunDir,
    own: Needs,
    scorer: Scorer,
    metrics: Sequence[str],
    *,
    seeds: Seeds = DEFAULT_SEEDS,
    deadline: Deadline | None = None,
) -> dict[str, float]:
    """Write the scores and samples of the run that run.json and evaluation.json describe.

    Args:
        own: what the scores depend on.
        scorer: of the metrics and the run's models.
        seeds: of the noise, and of the choice of the sampler.

    Returns:
        The seconds that choosing samplers, sampling and scoring took, of all processes together.

    Raises:
        ToBeContinued: as for `evaluate`.
    """
    spec, evaluation = run_inputs.run_spec(run), run_inputs.eval_spec(run)
    settings = run_inputs.memory_settings(spec, evaluation)
    with memory.fitting(run, "evaluate", evaluation.batch, spec.backbone, settings) as batch:
        return _judge(run, own, scorer, metrics, batch, seeds, deadline or Deadline())


def _judge(
    run: RunDir,
    own: Needs,
    scorer: Scorer,
    metrics: Sequence[str],
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
        for setting in settings:
            after = spec.iterations if setting.iteration is None else setting.iteration
            scored = PartialScores(run, setting, after, own)
            drawn = [one for one in found if one.has_images_of(setting, after)]
            if drawn and not evaluation.served:  # a server scores the images of each setting
                scored.adopt(drawn[0])
            if scored.done < len(prompts) * setting.images_per_prompt:
                # Score at least one batch; otherwise a job with no time left requeues forever.
                if worked and deadline.expired:
                    line = f"saved before {scored.folder.name}, to be continued"
                    raise errors.ToBeContinued(f"{line}: {deadline.expired}")
                worked = True
                if setting.sampler != BEST:
                    scored.sampler = setting.sampler
                elif not scored.sampler:
                    seed = seeds.validation
                    choose.choose(scorer, validation, evaluation, scored, deadline, seed)
                score_setting(scorer, prompts, evaluation, scored, deadline, seeds.images)
            found.append(scored)
            name, parts = next(iter(scored.scores.items()))
            mean = torch.cat(parts).mean()
            reporter.advance(f"{setting.name}  {name} {mean:.3g}", setting.nfe)
    with receipts.replacing(run.folder, "evaluate", own, [run.scores, run.samples, run.samplers]):
        scores.write(run, spec, prompts, found, metrics)
    reporter.finish()
    return {kind: sum(scored.seconds[kind] for scored in found) for kind in found[0].seconds}


def score_setting(
    scorer: Scorer,
    prompts: Sequence[Prompt],
    evaluation: EvalSpec,
    partial: PartialScores,
    deadline: Deadline,
    seed: int = generate.EVALUATION_SEED,
) -> None:
    """Generate and score the images of a setting that have no scores yet.

    Args:
        scorer: of the evaluation.
        partial: the scores so far, to which the others are added.
        deadline: of this job; near it, the scores are saved and ToBeContinued is raised.
        seed: of the images' noise.
    """
    setting = partial.setting
    work = Work(
        setting.model_copy(update={"sampler": partial.sampler}),
        prompts,
        evaluation.batch,
        seed,
        first=partial.done,
        shown=frozenset(first_of_each(prompts, SAMPLES_PER_TAG)),
        encoded=evaluation.served,
    )
    batches = scorer.score(work)
    while partial.done < work.total:
        file = partial.folder / f"{partial.done}.zip" if evaluation.served else None
        with image_archive.writing(file) if file is not None else nullcontext() as archive:
            begun = time.monotonic()
            for scored in batches:
                partial.add(scored.scores)
                partial.first |= scored.shown
                for kind, seconds in scored.seconds.items():
                    partial.seconds[kind] += seconds
                if archive is not None:
                    for (p, image), encoded in zip(scored.keys, scored.files, strict=True):
                        place = (partial.after, setting.sampler, setting.nfe, p, image)
                        archive.add(image_archive.Key(*place), encoded)
                deadline.tick()
                due = time.monotonic() - begun >= SAVE_EVERY_S
                if due or partial.done == work.total or deadline.expired:
                    break
        partial.save(file)
        if deadline.expired and partial.done < work.total:
            raise errors.ToBeContinued(
                f"saved after {partial.done} of {work.total} images of {partial.folder.name}, "
                f"to be continued: {deadline.expired}"
            )


def main() -> None:
    parser = arguments("evaluate")
    parser.add_argument("--processes", type=int, default=1, help="number that share the work")
    options = parser.parse_args()
    if options.processes < 1:
        parser.error("--processes must be at least 1")
    run_stage("evaluate", functools.partial(evaluate, processes=options.processes), options)


if __name__ == "__main__":
    main()
