"""The choice of the sampler and grid that a model is judged with at a number of steps.

Every model, trained or not, is judged with the best of the same samplers. The choice is made on
training prompts with noise of its own, so it does not favour the held-out prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tafs.data.prompts import Prompt
from tafs.evaluation import generate
from tafs.experiment.specs import EvalSetting, EvalSpec
from tafs.rewards.metrics import METRICS
from tafs.rewards.registry import RewardSet

# Differs from the seeds of trainings and of the images that models are judged on.
VALIDATION_SEED = 1_000_007


def validation_prompts(known: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` training prompts, the same for every run; all if there are fewer."""
    if count >= len(known):
        return list(known)
    drawn = np.random.default_rng(VALIDATION_SEED).choice(len(known), count, replace=False)
    return [known[i] for i in sorted(drawn)]


def choose(
    model: Any, rewards: RewardSet, prompts: Sequence[Prompt], evaluation: EvalSpec, nfe: int
) -> tuple[str, dict[str, float]]:
    """The best of the evaluation's samplers at `nfe` steps, and the quality of each.

    Args:
        model: a Backbone.
        prompts: for validation.

    Returns:
        (sampler, its and the others' `quality`).
    """
    if len(evaluation.samplers) == 1:
        return evaluation.samplers[0], {}
    texts = [prompt.text for prompt in prompts]
    scores = {}
    for sampler in evaluation.samplers:
        setting = EvalSetting(sampler=sampler, nfe=nfe, images_per_prompt=1)
        parts = [
            rewards.report(rewards.score(images, [prompts[p] for p, _ in keys]))
            for keys, images in generate.sample(
                model, texts, setting, evaluation.batch, seed=VALIDATION_SEED
            )
        ]
        scores[sampler] = {
            name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]
        }
    found = quality(scores)
    return max(found, key=lambda sampler: found[sampler]), found


def quality(scores: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """The mean over metrics of each sampler's mean score, in units of a common scale.

    A metric's scale is its standard deviation over the images of all samplers. Missing scores are
    left out.

    Args:
        scores: by sampler and metric, [images] each.
    """
    gains: dict[str, list[float]] = {sampler: [] for sampler in scores}
    for metric in next(iter(scores.values())):
        every = torch.stack([scores[sampler][metric].double() for sampler in scores])
        spread = every[every.isfinite()].std(correction=0)
        if not spread > 0:
            continue
        sign = 1.0 if METRICS[metric].higher_is_better else -1.0
        for sampler, values in zip(scores, every, strict=True):
            gains[sampler].append(float(sign * values.nanmean() / spread))
    return {sampler: float(np.mean(values)) if values else 0.0 for sampler, values in gains.items()}
