"""Anti-aliased renderer: signed distances in pixels, linear coverage over one pixel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tafs.shapes.scenes import BACKGROUND, COLORS, IMAGE_SIZE, MAX_GLYPHS, SHAPES, Scene

RING_WIDTH = 0.45  # share of the radius
CROSS_WIDTH = 0.36  # half width of an arm, share of the radius
SQUARE_SIDE = 0.92  # half side, share of the radius
TRIANGLE_SCALE = 1.12  # circumradius, share of the radius
# Area of each shape with radius 1, from which the detector computes the radius.
UNIT_AREA = {
    "circle": np.pi,
    "square": 4 * SQUARE_SIDE**2,
    "triangle": 3 * np.sqrt(3) / 4 * TRIANGLE_SCALE**2,
    "cross": 8 * CROSS_WIDTH - 4 * CROSS_WIDTH**2,
    "ring": np.pi * (1 - (1 - RING_WIDTH) ** 2),
}


def signed_distance(shape: str, dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    """Distance to the outline in pixels, negative inside.

    Args:
        shape: one of SHAPES.
        dx, dy: offset from the centroid in pixels, with y pointing down.
        r: radius in pixels.
    """
    if shape == "circle":
        return torch.hypot(dx, dy) - r
    if shape == "ring":
        half = 0.5 * RING_WIDTH * r
        return (torch.hypot(dx, dy) - (r - half)).abs() - half
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - SQUARE_SIDE * r
    if shape == "cross":
        arm = CROSS_WIDTH * r
        vertical = torch.maximum(dx.abs() - arm, dy.abs() - r)
        horizontal = torch.maximum(dx.abs() - r, dy.abs() - arm)
        return torch.minimum(vertical, horizontal)
    if shape == "triangle":
        # Pointing up; the three edges are at the inradius, half the circumradius.
        inradius = 0.5 * TRIANGLE_SCALE * r
        slanted = 0.5 * np.sqrt(3) * dx.abs() - 0.5 * dy
        return torch.maximum(dy, slanted) - inradius
    raise ValueError(f"unknown shape {shape!r} (available: {', '.join(SHAPES)})")


def coverage(shape: Tensor, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Share of each pixel that is covered by a glyph.

    Args:
        shape: indices of SHAPES, [N].
        x, y, r: centroids and radii in pixels, [N].

    Returns:
        [N, IMAGE_SIZE, IMAGE_SIZE] in [0, 1].
    """
    grid = torch.arange(IMAGE_SIZE, dtype=x.dtype) + 0.5
    out = torch.empty(len(x), IMAGE_SIZE, IMAGE_SIZE, dtype=x.dtype)
    for index, name in enumerate(SHAPES):
        rows = (shape == index).nonzero().squeeze(1)
        dx, dy = torch.broadcast_tensors(
            grid[None, None, :] - x[rows, None, None], grid[None, :, None] - y[rows, None, None]
        )
        distance = signed_distance(name, dx, dy, r[rows, None, None])
        out[rows] = (0.5 - distance).clamp(0, 1)
    return out


def render(scenes: Sequence[Scene]) -> Tensor:
    """Images of the scenes, [N, 3, IMAGE_SIZE, IMAGE_SIZE] in [0, 1], float32."""
    background = torch.tensor(BACKGROUND).view(1, 3, 1, 1)
    images = background.repeat(len(scenes), 1, IMAGE_SIZE, IMAGE_SIZE)
    palette = torch.tensor(list(COLORS.values()))
    names = list(COLORS)
    for layer in range(MAX_GLYPHS):
        drawn = [(i, s[layer]) for i, s in enumerate(scenes) if len(s) > layer]
        if not drawn:
            break
        rows = torch.tensor([i for i, _ in drawn])
        glyphs = [g for _, g in drawn]
        alpha = coverage(
            torch.tensor([SHAPES.index(g.shape) for g in glyphs]),
            torch.tensor([g.x for g in glyphs]),
            torch.tensor([g.y for g in glyphs]),
            torch.tensor([g.r for g in glyphs]),
        )[:, None]
        color = palette[[names.index(g.color) for g in glyphs]].view(-1, 3, 1, 1)
        images[rows] = images[rows] * (1 - alpha) + color * alpha
    return images
