"""Renderer: up to four capitals or digits in an open font, each in a cell of its own.

A text stands in one of three rows, so that a model that averages over them draws unreadable texts.

The fonts are DejaVu's files that matplotlib ships, whose licence allows any use. Their letters are
narrowed to the cells, so that four of them fill the image.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tafs.shapes.scenes import IMAGE_SIZE

CHARACTERS = string.ascii_uppercase + string.digits
CELLS = 4  # side by side; the first is at the left edge
ROWS = (-4, 0, 4)  # pixels below the middle
FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono-Bold")
COLORS: dict[str, tuple[float, float, float]] = {
    "black": (0.05, 0.05, 0.05),
    "red": (0.80, 0.08, 0.08),
    "green": (0.05, 0.50, 0.15),
    "blue": (0.08, 0.22, 0.85),
}
BACKGROUNDS = ((1.0, 1.0, 1.0), (1.0, 0.96, 0.82), (0.86, 0.93, 1.0))
CAP_HEIGHT = 10.0  # of a letter, in pixels
SCALE = 10  # pixels of the drawn letters per pixel of the image
NARROWING = 0.78  # the mean letter's share of a cell's width
WIDEST = 0.95  # the widest letter's


@dataclass(frozen=True)
class Sign:
    """A text, its font, the name of its colour, the colour of its background, and its row."""

    text: str
    font: str
    color: str
    background: tuple[float, float, float]
    row: int = 0  # of ROWS


def sample_sign(text: str, color: str, rng: np.random.Generator) -> Sign:
    """Draw a font, a background and a row for a text."""
    return Sign(
        text,
        FONTS[rng.integers(len(FONTS))],
        color,
        BACKGROUNDS[rng.integers(len(BACKGROUNDS))],
        ROWS[rng.integers(len(ROWS))],
    )


@cache
def _masks(font: str) -> Tensor:
    """Coverage of every character in every cell, [CHARACTERS, CELLS, IMAGE_SIZE, IMAGE_SIZE]."""
    import matplotlib  # which planning a run does not need

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    side, cell = IMAGE_SIZE * SCALE, IMAGE_SIZE * SCALE / CELLS
    size = 1000
    _, top, _, bottom = ImageFont.truetype(file, size).getbbox("H", anchor="ls")
    drawn_with = ImageFont.truetype(file, round(size * CAP_HEIGHT * SCALE / (bottom - top)))
    sides = [drawn_with.getbbox(c, anchor="ls")[::2] for c in CHARACTERS]
    narrowing = NARROWING * cell / float(np.mean([right - left for left, right in sides]))
    masks = np.empty((len(CHARACTERS), CELLS, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    for index, (character, (left, right)) in enumerate(zip(CHARACTERS, sides, strict=True)):
        letter = Image.new("L", (round(right - left), side))
        baseline = (side + CAP_HEIGHT * SCALE) / 2
        ImageDraw.Draw(letter).text((-left, baseline), character, 255, drawn_with, anchor="ls")
        letter = letter.resize((round(min(narrowing * letter.width, WIDEST * cell)), side))
        for place in range(CELLS):
            canvas = Image.new("L", (side, side))
            canvas.paste(letter, (round((place + 0.5) * cell - letter.width / 2), 0))
            masks[index, place] = np.asarray(canvas.reduce(SCALE), dtype=np.float32) / 255
    return torch.from_numpy(masks)


def render(signs: Sequence[Sign]) -> Tensor:
    """Images of the signs, [N, 3, IMAGE_SIZE, IMAGE_SIZE] in [0, 1], float32."""
    coverage = torch.zeros(len(signs), 1, IMAGE_SIZE, IMAGE_SIZE)
    for image, sign in zip(coverage, signs, strict=True):
        for place, character in enumerate(sign.text):
            image += _masks(sign.font)[CHARACTERS.index(character), place].roll(sign.row, 0)
    coverage.clamp_(max=1)
    color = torch.tensor([COLORS[sign.color] for sign in signs]).view(-1, 3, 1, 1)
    background = torch.tensor([sign.background for sign in signs]).view(-1, 3, 1, 1)
    return background * (1 - coverage) + color * coverage
