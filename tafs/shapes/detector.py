"""The exact detector: connected components, nearest palette colour, best glyph template."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from tafs.rewards.geneval import Detection
from tafs.shapes.render import UNIT_AREA, coverage
from tafs.shapes.scenes import BACKGROUND, COLORS, IMAGE_SIZE, SHAPES

FOREGROUND = 0.20  # RGB distance from the background above which a pixel is foreground
MIN_AREA = 8.0  # pixels of coverage; smaller components are ignored
MAX_MISFIT = 0.35  # largest difference from the template, as a share of the glyph's area
MAX_COLOR_DISTANCE = 0.45  # RGB distance to the nearest palette colour

_PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
_COLOR_NAMES = tuple(COLORS)
_AREAS = np.array([UNIT_AREA[s] for s in SHAPES], dtype=np.float32)
# Pixels connect within an image (8-neighbourhood), not across the batch.
_STRUCTURE = np.zeros((3, 3, 3), dtype=bool)
_STRUCTURE[1] = True


def detect(images: Tensor) -> list[list[Detection]]:
    """Find the glyphs of each image.

    Args:
        images: [B, 3, IMAGE_SIZE, IMAGE_SIZE] in [0, 1].

    Returns:
        The detections of each image, most confident first. Components are ignored if their colour
        is far from the palette or they match no template.

    Raises:
        ValueError: the images have another shape.
    """
    if tuple(images.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"reward geneval: images must be [B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], "
            f"not {list(images.shape)}"
        )
    pixels = images.detach().float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    found: list[list[Detection]] = [[] for _ in range(len(pixels))]
    background = np.array(BACKGROUND, dtype=np.float32)
    contrast = np.linalg.norm(pixels - background, axis=-1)  # [B, H, W]
    labels, count = ndimage.label(contrast > FOREGROUND, structure=_STRUCTURE)
    if count == 0:
        return found
    slices = ndimage.find_objects(labels)
    owner = np.array([s[0].start for s in slices])

    # Core colour: the mean of the pixels with at least 80 % of the component's largest contrast.
    index = np.arange(1, count + 1)
    peak = ndimage.maximum(contrast, labels, index)
    flat = labels.ravel()
    inside = flat > 0
    member = flat[inside] - 1
    rgb = pixels.reshape(-1, 3)[inside]
    strength = contrast.ravel()[inside]
    core = strength >= 0.8 * peak[member]
    weight = np.bincount(member[core], minlength=count)
    color = np.stack(
        [np.bincount(member[core], rgb[core, c], minlength=count) / weight for c in range(3)],
        axis=1,
    )
    distance = np.linalg.norm(color[:, None] - _PALETTE[None], axis=-1)  # [count, colours]
    nearest = distance.argmin(1)

    # Coverage of a pixel: its projection onto the line from the background to the core colour.
    axis = color - background
    alpha = ((rgb - background) * axis[member]).sum(1) / (axis**2).sum(1)[member]
    alpha = alpha.clip(0, 1)
    area = np.bincount(member, alpha, minlength=count)
    image, row, column = np.unravel_index(np.flatnonzero(inside), labels.shape)
    x = np.bincount(member, alpha * (column + 0.5), minlength=count) / area
    y = np.bincount(member, alpha * (row + 0.5), minlength=count) / area

    keep = (area >= MIN_AREA) & (distance.min(1) <= MAX_COLOR_DISTANCE)
    kept = np.flatnonzero(keep)
    if len(kept) == 0:
        return found
    # Compare the component alone with each shape of the same area and centroid.
    canvas = np.zeros((len(kept), IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    position = np.full(count, -1)
    position[kept] = np.arange(len(kept))
    on = keep[member]
    canvas[position[member[on]], row[on], column[on]] = alpha[on]
    shapes = np.tile(np.arange(len(SHAPES)), len(kept))
    repeat = np.repeat(kept, len(SHAPES))
    radius = np.sqrt(area[repeat] / _AREAS[shapes])
    template = coverage(
        torch.from_numpy(shapes),
        torch.from_numpy(x[repeat]).float(),
        torch.from_numpy(y[repeat]).float(),
        torch.from_numpy(radius).float(),
    ).numpy()
    difference = np.abs(
        template.reshape(len(kept), len(SHAPES), -1) - canvas.reshape(len(kept), 1, -1)
    )
    misfit = difference.sum(-1) / area[kept, None]
    best = misfit.argmin(1)
    for i, component in enumerate(kept):
        error = float(misfit[i, best[i]])
        if error > MAX_MISFIT:
            continue
        rows, columns = slices[component][1:]
        found[owner[component]].append(
            Detection(
                label=SHAPES[best[i]],
                score=1 - error,
                box=(columns.start, rows.start, columns.stop, rows.stop),
                color=_COLOR_NAMES[nearest[component]],
            )
        )
    for detections in found:
        detections.sort(key=lambda d: -d.score)
    return found
