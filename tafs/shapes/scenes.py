"""Scenes: up to four coloured glyphs that do not touch and satisfy a GenEval row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

IMAGE_SIZE = 24  # pixels, both sides
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.10, 0.30, 0.95),
    "yellow": (1.00, 0.80, 0.00),
    "black": (0.05, 0.05, 0.05),
}
BACKGROUND = (1.0, 1.0, 1.0)
RELATIONS = ("left of", "right of", "above", "below")
MARGIN = 0.5  # pixels between a glyph and the border
MAX_GLYPHS = 4


@dataclass(frozen=True)
class Layout:
    """How large the glyphs are and how close they may be, in pixels."""

    radius: tuple[float, float]  # smallest and largest
    gap: float  # between two glyphs


# Models learn from roomy scenes first. In dense scenes glyphs have more free places, and a blurred
# sample joins them, so that few sampling steps are worse than many.
LAYOUTS = {"roomy": Layout((3.0, 4.0), 2.6), "dense": Layout((2.6, 4.0), 2.0)}


@dataclass(frozen=True)
class Glyph:
    """One shape; `x`, `y` is its centroid and `r` its radius, in pixels.

    The radius is half of a square's side, and the outer radius of a ring.
    """

    shape: str
    color: str
    x: float
    y: float
    r: float


Scene = tuple[Glyph, ...]


def sample_scene(row: Mapping[str, Any], rng: np.random.Generator, layout: str = "dense") -> Scene:
    """Draw a random scene that satisfies a GenEval row; `layout` is a key of LAYOUTS."""
    named: list[tuple[str, str]] = []
    relation: str | None = None
    for item in row["include"]:
        color = item.get("color")
        for _ in range(item["count"]):
            named.append((item["class"], color or str(rng.choice(list(COLORS)))))
        if "position" in item:
            relation = item["position"][0]
    while True:
        glyphs = _place(named, relation, rng, LAYOUTS[layout])
        if glyphs is not None:
            return glyphs


def _place(
    named: list[tuple[str, str]],
    relation: str | None,
    rng: np.random.Generator,
    layout: Layout,
) -> Scene | None:
    """Place the glyphs at random; None if there is no free place for one of them."""
    glyphs: list[Glyph] = []
    for shape, color in named:
        r = float(rng.uniform(*layout.radius))
        low, high = r + MARGIN, IMAGE_SIZE - r - MARGIN
        for _ in range(20):
            x, y = (float(v) for v in rng.uniform(low, high, 2))
            free = all(max(abs(x - g.x), abs(y - g.y)) >= r + g.r + layout.gap for g in glyphs)
            if free and (relation is None or not glyphs or _holds(relation, (x, y), glyphs[0])):
                glyphs.append(Glyph(shape, color, x, y, r))
                break
        else:
            return None
    # The drawing order must not depend on the order in the caption.
    return tuple(glyphs[i] for i in rng.permutation(len(glyphs)))


def _holds(relation: str, at: tuple[float, float], other: Glyph) -> bool:
    """Whether the relation holds and its axis has the larger offset."""
    dx, dy = at[0] - other.x, at[1] - other.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    sign = -1 if relation in ("left of", "above") else 1
    return sign * along > abs(across)
