"""The choice of the sampler and grid that a model is judged with at a number of steps.

Every model, trained or not, is judged with the best of the same samplers. The choice is made on
training prompts with noise of its own, so it does not favour the held-out prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tafs.common import errors
from tafs.data.prompts import Prompt
from tafs.evaluation import generate
from tafs.evaluation.scores import PartialScores
from tafs.evaluation.scoring import Scorer, Work
from tafs.experiment.specs import EvalSpec
from tafs.rewards.metrics import METRICS
from tafs.runtime.deadline import Deadline

# Differs from the seeds of trainings and of the images that models are judged on.
VALIDATION_SEED = 1_000_007


class Seeds(NamedTuple):
    """The seeds of an evaluation's noise."""

    images: int = generate.EVALUATION_SEED  # that models are judged on
    validation: int = VALIDATION_SEED  # of the prompts and noise that samplers are chosen on


DEFAULT_SEEDS = Seeds()


def validation_prompts(
    known: Sequence[Prompt], count: int, seed: int = VALIDATION_SEED
) -> list[Prompt]:
    """`count` training prompts, the same for every run; all if there are fewer."""
    if count >= len(known):
        return list(known)
    drawn = np.random.default_rng(seed).choice(len(known), count, replace=False)
    return [known[i] for i in sorted(drawn)]


def choose(
    scorer: Scorer,
    prompts: Sequence[Prompt],
    evaluation: EvalSpec,
    partial: PartialScores,
    deadline: Deadline,
    seed: int = VALIDATION_SEED,
) -> None:
    """Choose the sampler of a setting's images, and save the choice.

    The scores of each sampler are saved, so that a later job continues after the last one.

    Args:
        scorer: of the evaluation.
        prompts: for validation.
        partial: its `sampler` and `qualities` are set.
        deadline: of this job.
        seed: of the images' noise.

    Raises:
        ToBeContinued: the job's time is nearly over, or a signal asked it to stop.
    """
    if len(evaluation.samplers) == 1:
        partial.sampler = evaluation.samplers[0]
        return
    scores, worked = partial.validation, False
    for sampler in evaluation.samplers:
        if sampler in scores:
            continue
        # At least one, as in `evaluate`; otherwise a job with no time left requeues forever.
        if worked and deadline.expired:
            partial.save(None)
            raise errors.ToBeContinued(
                f"saved the choice of the sampler of {partial.folder.name}, to be continued: "
                f"{deadline.expired}"
            )
        worked = True
        changes = {"sampler": sampler, "images_per_prompt": 1}
        setting = partial.setting.model_copy(update=changes)
        parts = []
        for scored in scorer.score(Work(setting, prompts, evaluation.batch, seed)):
            parts.append(scored.scores)
            partial.seconds["choose"] += sum(scored.seconds.values())
            deadline.tick()
        scores[sampler] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    partial.qualities = found = quality(scores)
    partial.sampler = max(found, key=lambda sampler: found[sampler])
    partial.save(None)


def quality(scores: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """The mean over metrics of each sampler's mean score, in units of a common scale.

    A metric's scale is its standard deviation over the images of all samplers. Prompts whose score
    is missing for a sampler are left out for all.

    Args:
        scores: by sampler and metric, [images] each.
    """
    gains: dict[str, list[float]] = {sampler: [] for sampler in scores}
    for metric in next(iter(scores.values())):
        every = torch.stack([scores[sampler][metric].double() for sampler in scores])
        every = every[:, every.isfinite().all(dim=0)]
        if not every.numel():  # no image has scores of all samplers
            continue
        spread = every.std(correction=0)
        if spread == 0:
            continue
        sign = 1.0 if METRICS[metric].higher_is_better else -1.0
        for sampler, values in zip(scores, every, strict=True):
            gains[sampler].append(float(sign * values.mean() / spread))
    return {sampler: float(np.mean(values)) if values else 0.0 for sampler, values in gains.items()}
