"""The damage panel: how different a model's images are, and statistics of their pixels.

Both are of the samples that runs keep, one image of each prompt: the Vendi score, which falls if
images of different prompts become alike, and the means of `tafs.rewards.statistics.PANEL`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tafs.report import stats
from tafs.report.figures import image_grid
from tafs.report.page.content import interval, number
from tafs.report.page.sprites import kept_prompts
from tafs.report.page.systems import Systems
from tafs.report.results import LoadedTable
from tafs.rewards import statistics
from tafs.rewards.metrics import METRICS
from tafs.shapes import weights

SIDE = 16  # of the pixel features

Statistic = Callable[[torch.Tensor], torch.Tensor]
Features = Callable[[np.ndarray], np.ndarray]  # uint8 [n, H, W, 3] -> [n, d]


def of_tables(systems: Systems, tables: Sequence[LoadedTable]) -> dict[str, dict[str, Any]]:
    """By table: the scores of each system at few steps with its own sampler, seed by seed.

    Raises:
        ValueError: a run has no samples, or not those of the setting; names the file.
    """
    embedded = any(table.results[0].spec.assets.assets == "shapes" for table in tables)
    features, what = (
        (_clip(), "embedded CLIP") if embedded else (_pixels, f"{SIDE} x {SIDE} pixels")
    )
    return {
        table.spec.name: {
            "nfe": table.spec.few_nfe,
            "images": len(kept_prompts(table.results[0])),
            "features": what,
            "charts": _charts(table, systems, features),
        }
        for table in tables
    }


def _charts(table: LoadedTable, systems: Systems, features: Features) -> list[dict[str, Any]]:
    """The Vendi score and the panel's statistics of each system, a chart each."""
    kept = {
        systems.key(system): [
            image_grid.samples(
                result,
                f"{system.spec.sampler}-{table.spec.few_nfe}",
                list(kept_prompts(result)),
            )
            for result in system.results
        ]
        for system in table.distinct
    }
    found = [_chart("Vendi score", kept, lambda images: statistics.vendi_score(features(images)))]
    for name, statistic in statistics.PANEL.items():
        metric = METRICS[name]
        mean = partial(_mean, statistic, metric.factor)
        found.append(_chart(f"{metric.title}, {metric.unit}", kept, mean))
    return found


def _mean(statistic: Statistic, factor: float, images: np.ndarray) -> float:
    """The mean of a statistic over images, on the shown scale."""
    return factor * float(np.mean([float(statistic(_tensor(one[None]))) for one in images]))


def _chart(
    title: str, kept: dict[str, list[np.ndarray]], score: Callable[[np.ndarray], float]
) -> dict[str, Any]:
    found = {}
    for name, seeds in kept.items():
        scores = [score(images) for images in seeds]
        # One value per seed: the interval is Student's t over the seeds.
        mean = stats.mean_interval(np.reshape(scores, (-1, 1, 1)), [""])
        found[name] = {"seeds": list(map(number, scores)), "mean": interval(mean)}
    return {"title": title, "systems": found}


def _clip() -> Features:
    """Embeddings by the embedded CLIP."""
    from tafs.shapes import scorers  # its import takes seconds, and other scales do not need it

    encoder = scorers.DualEncoder.load(weights.verify("clip")).eval()

    @torch.inference_mode()
    def embed(images: np.ndarray) -> np.ndarray:
        return np.asarray(encoder.embed_images(_tensor(images)), dtype=float)

    return embed


def _pixels(images: np.ndarray) -> np.ndarray:
    """Colours in [-1, 1], averaged over a grid of SIDE x SIDE cells."""
    small = [functional.adaptive_avg_pool2d(_tensor(one[None]), SIDE) for one in images]
    return np.asarray(2 * torch.cat(small).flatten(1) - 1)


def _tensor(images: np.ndarray) -> torch.Tensor:
    """[n, 3, H, W] in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
