"""Simulated annotators: images with known flaws, and annotators with different preferences.

An image shows a scene that may or may not match its caption, degraded by flaws of known size. An
annotator's utility is a weighted sum of five qualities in [0, 1]. It prefers one of two images with
the Bradley-Terry probability of the difference of their utilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tafs.data import prompts
from tafs.rewards.geneval import Detection, geneval_verdict
from tafs.shapes.render import render
from tafs.shapes.scenes import COLORS, IMAGE_SIZE, RELATIONS, SHAPES, Scene, sample_scene

if TYPE_CHECKING:  # model cards need only the tastes, and the import takes seconds
    from diffusers import AutoencoderKL

QUALITIES = ("alignment", "sharpness", "background", "purity", "composition")
NUMBER_RANGE = (1, 4)
TIE = 0.1  # images whose utilities differ by less are equally good


@dataclass(frozen=True)
class Taste:
    """An annotator's weights of the qualities; `temperature` is the noise of its verdicts."""

    alignment: float
    sharpness: float
    background: float
    purity: float
    composition: float
    temperature: float = 0.04

    def utility(self, qualities: Tensor) -> Tensor:
        """Utility [...] of qualities [..., 5] in the order of QUALITIES."""
        weights = torch.tensor([getattr(self, name) for name in QUALITIES])
        return qualities @ (weights / weights.sum())


TASTES = {
    "pickscore": Taste(0.60, 0.25, 0.05, 0.10, 0.00),
    "hpsv2": Taste(0.45, 0.25, 0.10, 0.20, 0.00),
    "imagereward": Taste(0.45, 0.15, 0.15, 0.15, 0.10),
    "unifiedreward": Taste(0.50, 0.20, 0.20, 0.10, 0.00),
}


def boxes(scene: Scene) -> list[Detection]:
    """The scene's true objects in the format of a detector."""
    return [
        Detection(g.shape, 1.0, (g.x - g.r, g.y - g.r, g.x + g.r, g.y + g.r), g.color)
        for g in scene
    ]


def alter(row: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Change one requirement of a row: a shape, a colour, a count or the relation."""
    include = [dict(item) for item in row["include"]]
    index = int(rng.integers(len(include)))
    item = include[index]
    options = ["shape"]
    options += ["color"] * ("color" in item)
    options += ["count"] * 2 * (row["tag"] == "counting")
    options += ["relation"] * 2 * (row["tag"] == "position")
    change = rng.choice(options)
    if change == "shape":
        taken = {other["class"] for other in include}
        item["class"] = str(rng.choice([s for s in SHAPES if s not in taken]))
    elif change == "color":
        item["color"] = str(rng.choice([c for c in COLORS if c != item["color"]]))
    elif change == "count":
        counts = [n for n in range(NUMBER_RANGE[0], NUMBER_RANGE[1] + 1) if n != item["count"]]
        item["count"] = int(rng.choice(counts))
    else:
        relation, target = include[-1]["position"]
        others = [r for r in RELATIONS if r != relation]
        include[-1]["position"] = [str(rng.choice(others)), target]
    return {**row, "include": include}


def pictures(
    captions: Sequence[prompts.Prompt],
    autoencoder: AutoencoderKL,
    rng: np.random.Generator,
    layout: str = "dense",
) -> tuple[Tensor, Tensor]:
    """Draw an image for each caption, with flaws of known size; `layout` is one of scenes.LAYOUTS.

    Returns:
        Images [N, 3, H, W] in [0, 1], and their qualities [N, 5] in [0, 1], where 1 is flawless.
    """
    scenes, alignment, composition = [], [], []
    for prompt in captions:
        row = dict(prompt.row)
        kind = rng.random()
        if kind < 0.35:
            row = alter(row, rng)
        elif kind < 0.45:
            row = dict(captions[int(rng.integers(len(captions)))].row)
        scene = sample_scene(row, rng, layout)
        verdict = geneval_verdict(boxes(scene), prompt.row)
        scenes.append(scene)
        alignment.append(0.5 * verdict.graded + 0.5 * verdict.correct)
        centre = np.mean([(g.x, g.y) for g in scene], axis=0) - IMAGE_SIZE / 2
        composition.append(1 - np.hypot(*centre) / (IMAGE_SIZE / 2))
    images, flaws = _spoil(render(scenes), rng)
    images = _reconstruct(images, autoencoder, rng)
    aligned = torch.tensor(alignment, dtype=torch.float32)
    composed = torch.tensor(np.array(composition), dtype=torch.float32).clamp(0, 1)
    flawless = [1 - flaws[name] for name in ("blur", "texture", "pale")]
    return images, torch.stack([aligned, *flawless, composed], dim=1)


def spoil_and_reconstruct(
    images: Tensor, autoencoder: AutoencoderKL, rng: np.random.Generator
) -> Tensor:
    """Add random flaws to images [N, 3, H, W] in [0, 1]."""
    return _reconstruct(_spoil(images, rng)[0], autoencoder, rng)


def _amount(count: int, rng: np.random.Generator) -> Tensor:
    """Sizes [count] of a flaw in [0, 1]; half of the images have none."""
    drawn = rng.random(count) * (rng.random(count) < 0.5)
    return torch.tensor(drawn, dtype=torch.float32)


def _spoil(images: Tensor, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Add blur with ghosts, pale colours and a textured background; return images and sizes."""
    count = len(images)
    flaws = {name: _amount(count, rng) for name in ("blur", "texture", "pale")}
    blur, texture, pale = (flaws[n].view(-1, 1, 1, 1) for n in ("blur", "texture", "pale"))
    # Few-step samples blend several scenes, so blurred images are blended too.
    ghost = images[torch.from_numpy(rng.permutation(count))]
    share = 0.45 * blur * torch.from_numpy(rng.random((count, 1, 1, 1))).float()
    images = (1 - share) * images + share * ghost
    kernel = torch.tensor([0.25, 0.5, 0.25])
    kernel = (kernel[:, None] * kernel[None, :]).expand(3, 1, 3, 3)
    soft = images
    for _ in range(3):
        soft = functional.conv2d(functional.pad(soft, (1, 1, 1, 1), "replicate"), kernel, groups=3)
    images = images + blur * (soft - images)
    grey = images.mean(1, keepdim=True)
    images = images + 0.6 * pale * (grey - images)
    images = images + 0.25 * texture * _patterns(count, rng)
    return images.clamp(0, 1), flaws


def _patterns(count: int, rng: np.random.Generator) -> Tensor:
    """Checkerboards, stripes, grain and tints in [-1, 0], since the background is white."""
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    out = np.empty((count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    for i in range(count):
        period = int(rng.integers(1, 4))
        kind = rng.integers(4)
        if kind == 0:
            pattern = ((x // period + y // period) % 2)[None]
        elif kind == 1:
            pattern = ((x if rng.random() < 0.5 else y) // period % 2)[None]
        elif kind == 2:
            pattern = rng.random((3, IMAGE_SIZE, IMAGE_SIZE))
        else:
            pattern = rng.random((3, 1, 1))
        out[i] = -pattern
    return torch.from_numpy(out)


@torch.no_grad()
def _reconstruct(images: Tensor, autoencoder: AutoencoderKL, rng: np.random.Generator) -> Tensor:
    """Pass most images through the autoencoder with slight latent noise, like generated images."""
    parts = []
    for part in images.split(512):
        latents = autoencoder.encode(part * 2 - 1).latent_dist.mode()
        scale = 0.15 / autoencoder.config.scaling_factor
        noise = torch.from_numpy(rng.standard_normal(latents.shape)).float()
        level = torch.from_numpy(rng.random((len(part), 1, 1, 1))).float()
        decoded = autoencoder.decode(latents + scale * level * noise).sample / 2 + 0.5
        plain = torch.from_numpy(rng.random((len(part), 1, 1, 1)) < 0.2)
        parts.append(torch.where(plain, part, decoded.clamp(0, 1)))
    return torch.cat(parts)
