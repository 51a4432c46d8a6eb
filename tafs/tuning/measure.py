"""What a trial is worth: a training with one seed, and its gain over the base model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tafs.common import errors, files
from tafs.data import prompts
from tafs.evaluation import generate
from tafs.experiment import RunSpec, needs, run_inputs
from tafs.experiment.schema import Evaluation
from tafs.experiment.specs import EvalSetting
from tafs.runtime import journal, receipts
from tafs.runtime.run_dir import RunDir
from tafs.training import train

VALIDATION_PROMPTS = 96
IMAGES_PER_PROMPT = 2


def objective(gains: Sequence[float]) -> float:
    """The mean of the seeds' gains minus its standard error."""
    return statistics.fmean(gains) - standard_error(gains)


def standard_error(gains: Sequence[float]) -> float:
    """The standard error of the mean; NaN of fewer than two gains."""
    return statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan


def score(trial: RunSpec, evaluation: Evaluation, adapter: Path | None = None) -> float:
    """The mean total reward on training prompts, with the best of the evaluation's samplers.

    Args:
        adapter: of the trained model; None: the untrained model.
    """
    source = run_inputs.asset_source(trial)
    backbone = source.model(trial.backbone, trial.resolution)
    if adapter is not None:
        backbone.load_adapter(adapter)
    rng = np.random.default_rng(trial.seed)
    drawn = prompts.draw(source.prompts(trial.prompts, "train"), VALIDATION_PROMPTS, rng)
    texts = [prompt.text for prompt in drawn]
    repeated = [p for p in drawn for _ in range(IMAGES_PER_PROMPT)]
    rewards = source.rewards(list(trial.rewards))
    backbone.waiting = rewards.networks

    def total(sampler: str) -> float:
        setting = EvalSetting(
            sampler=sampler, nfe=evaluation.few_nfe, images_per_prompt=IMAGES_PER_PROMPT
        )
        drawn = generate.generate(backbone, texts, setting, evaluation.batch, trial.seed)
        scores = rewards.score(drawn, repeated)
        return float(sum(weight * scores[name].mean() for name, weight in trial.rewards.items()))

    return max(map(total, evaluation.samplers))


def is_trained(run: RunDir, trial: RunSpec) -> bool:
    """Whether the folder's adapter was trained with the present settings and method."""
    receipt = receipts.read(run.folder, "train")
    if receipt is None or receipt.missing(run.folder):
        return False
    return not receipts.differences(receipt.needs, needs.training(trial))


def measure(trial: RunSpec, folder: Path, evaluation: Evaluation, base: float) -> dict[str, float]:
    """Train a trial with one seed, or continue it; return its gain and time per iteration.

    Args:
        folder: holds the run folder.
        base: the base model's score with the same seed.

    Raises:
        RunFailed: a loss, a reward or the score is not finite; names the run.
    """
    run = RunDir(folder / trial.name)
    files.atomic_text(run.folder / "run.json", trial.to_json())
    with run.alone("train"):
        if not is_trained(run, trial):
            train.train(run)
        run.clear_state()
    gain = score(trial, evaluation, run.adapter) - base
    if not math.isfinite(gain):
        raise errors.RunFailed(f"{run.folder}: the rewards of its images are not finite")
    seconds = [record["seconds"]["total"] for record in journal.iterations(run.journal)]
    return {"gain": gain, "iteration_s": statistics.median(seconds)}
