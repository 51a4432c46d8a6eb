"""Statistics of images, on images whose values are worked out by hand."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional

from tafs.data.prompts import Prompt
from tafs.rewards import metrics, statistics


def grey(rows: list[list[float]]) -> torch.Tensor:
    """An image of greys, [1, 3, H, W]."""
    return torch.tensor(rows).float().expand(1, 3, len(rows), len(rows[0]))


def coloured(*colours: tuple[float, float, float]) -> torch.Tensor:
    """A row of pixels of these colours, [1, 3, 1, W]."""
    return torch.tensor(colours).float().T[None, :, None]


def published(name: str, images: torch.Tensor) -> list[float]:
    reward = metrics.plugin(name).build("cpu", Path)
    scores = reward.score(images, [Prompt("", {})] * len(images))
    return (reward.metric.factor * reward.report(scores)).tolist()


STEP = [[0.0, 0.0, 1.0, 1.0]] * 3
DOT = [[0.0, 0, 0], [0, 1, 0], [0, 0, 0]]
RED, GREEN, BLUE, WHITE, BLACK = (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0, 0, 0)


@pytest.mark.parametrize(
    ("name", "image", "value"),
    [
        # The gradient is 1/2 in the two middle columns of four.
        ("edge_density", grey(STEP), 50),
        ("edge_density", 0.19 * grey(STEP), 0),
        ("edge_density", 0.21 * grey(STEP), 50),
        ("edge_density", grey([[0.5] * 4] * 3), 0),
        ("colour_entropy", coloured(RED, GREEN, BLUE, WHITE), 2),
        ("colour_entropy", coloured(RED, RED, RED, WHITE), 0.811278),
        ("colour_entropy", coloured(RED, (0.9, 0.1, 0.1)), 0),  # the same of eight levels
        (
            "saturation",
            coloured(RED, WHITE, BLACK, (0.5, 0.25, 0.375)),
            (1 + 0 + 0 + 0.5) / 4 * 100,
        ),
        # The Laplacian is -4 in the middle, 1 beside it and 0 in the corners, with mean 0.
        ("sharpness", grey(DOT), 255**2 * (16 + 4) / 9),
        (
            "sharpness",
            grey([[0.0, 0.25, 0.5, 0.75]] * 4),
            255**2 / 16 / 2,
        ),  # 1/4 and -1/4 at the sides
    ],
)
def test_a_statistic_has_the_value_of_its_definition(name, image, value):
    assert published(name, image) == pytest.approx([value], abs=2e-4)


def test_gpus_filter_in_full_precision(monkeypatch):
    """TF32 rounds a pixel by up to a tenth of an 8-bit level, which the sharpness would count."""
    used, convolve = [], functional.conv2d
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(
        functional,
        "conv2d",
        lambda *given: used.append(torch.backends.cudnn.allow_tf32) or convolve(*given),
    )
    statistics.sharpness(torch.zeros(1, 3, 8, 8))
    assert used == [False] and torch.backends.cudnn.allow_tf32


def test_jpeg_rewards_are_the_size_of_pillows_file_and_its_negative():
    images = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    images[1] = 0.5
    sizes = []
    for image in images:
        file = io.BytesIO()
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(file, format="JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    assert sizes[0] > 2 * sizes[1]
    for name, sign in (("jpeg_compressibility", -1), ("jpeg_incompressibility", 1)):
        assert published(name, images) == pytest.approx(sizes)
        reward = metrics.plugin(name).build("cpu", Path)
        scores = reward.score(images, [Prompt("", {})] * 2)
        assert scores.tolist() == pytest.approx([sign * size for size in sizes])


def test_the_panel_consists_of_metrics_that_evaluations_leave_out_by_default():
    for name in statistics.PANEL:
        assert metrics.METRICS[name].optional
