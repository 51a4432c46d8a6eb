"""How different a model's images are: the Vendi score of the samples that runs keep.

exp of the entropy of the eigenvalues of K / n, where K holds the cosines of all pairs of n images'
features (Friedman and Dieng, 2023, arXiv 2210.02410): 1 if all images are alike, n if no two are.
A run keeps one image of each prompt, so the score falls if images of different prompts become
alike. Beside it, the means of three statistics of single images: a model that is trained too far
often loses edges and colours, or exaggerates them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import entr
from torch.nn import functional

from tafs.report import stats
from tafs.report.figures import image_grid
from tafs.report.page.content import interval, number
from tafs.report.page.sprites import kept_prompts
from tafs.report.page.systems import Systems
from tafs.report.results import LoadedTable
from tafs.shapes import scorers, weights

SIDE = 16  # of the pixel features

EDGE = 0.1  # the least difference of neighbours' brightness, which is in [0, 1], that is an edge
LEVELS = 8  # of each colour channel, for the entropy
LUMA = (0.299, 0.587, 0.114)  # of R, G and B (ITU-R BT.601)

Features = Callable[[np.ndarray], np.ndarray]  # uint8 [n, H, W, 3] -> [n, d]


def edge_density(image: np.ndarray) -> float:
    """The share of neighbouring pixels whose brightness differs by EDGE; uint8 [H, W, 3]."""
    brightness = image / 255 @ np.asarray(LUMA)
    steps = [np.abs(np.diff(brightness, axis=axis)).ravel() for axis in (0, 1)]
    return float((np.concatenate(steps) >= EDGE).mean())


def colour_entropy(image: np.ndarray) -> float:
    """The entropy of the pixels' colours in LEVELS ** 3 bins, bits; uint8 [H, W, 3]."""
    levels = image.reshape(-1, 3).astype(int) * LEVELS // 256
    bins = levels @ np.array([LEVELS**2, LEVELS, 1])
    shares = np.bincount(bins) / len(bins)
    return float(entr(shares).sum() / np.log(2))


def saturation(image: np.ndarray) -> float:
    """The mean of HSV's saturation, between 0 and 1; uint8 [H, W, 3]."""
    high, low = image.max(-1).astype(float), image.min(-1)
    return float(((high - low) / np.maximum(high, 1)).mean())


STATISTICS = {
    "Edge density": edge_density,
    "Colour entropy, bits": colour_entropy,
    "Saturation": saturation,
}


def vendi_score(features: np.ndarray) -> float:
    """The effective number of different rows, between 1 and n, of features [n, d]; none is zero."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    # K is unit unit^T, so the eigenvalues of K / n are these squares.
    shares = np.linalg.svd(unit, compute_uv=False) ** 2 / len(unit)
    return float(np.exp(entr(shares).sum()))


def of_tables(systems: Systems, tables: Sequence[LoadedTable]) -> dict[str, dict[str, Any]]:
    """By table and measure: each system at few steps with its own sampler, seed by seed.

    The measures are the Vendi score and the means of STATISTICS over the kept images.

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
            "measures": _measured(table, systems, features),
        }
        for table in tables
    }


def _measured(table: LoadedTable, systems: Systems, features: Features) -> dict[str, Any]:
    """{measure: {system: its seeds' values and their mean with an interval}}."""
    found: dict[str, dict[str, Any]] = {"Vendi score": {}, **{name: {} for name in STATISTICS}}
    for system in table.distinct:
        setting = f"{system.spec.sampler}-{table.spec.few_nfe}"
        shown = [
            image_grid.samples(result, setting, list(kept_prompts(result)))
            for result in system.results
        ]
        values = {"Vendi score": [vendi_score(features(images)) for images in shown]} | {
            name: [float(np.mean([statistic(image) for image in images])) for images in shown]
            for name, statistic in STATISTICS.items()
        }
        for name, seeds in values.items():
            # One value per seed: the interval is Student's t over the seeds.
            mean = stats.mean_interval(np.reshape(seeds, (-1, 1, 1)), [""])
            record = {"seeds": list(map(number, seeds)), "mean": interval(mean)}
            found[name][systems.key(system)] = record
    return found


def _clip() -> Features:
    """Embeddings by the embedded CLIP."""
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
