"""The metric `ocr`: the score of a text, the pinned models, and signs that they read."""

from __future__ import annotations

import shutil
import socket
from importlib import metadata
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from tafs.data.prompts import Prompt
from tafs.rewards import metrics, ocr

TEXTS = st.text("ab1", max_size=6)


@pytest.mark.parametrize(
    ("recognised", "required", "expected"),
    [
        ("stone", "stone", 1),
        ("ST ONE", "stone", 1),
        ("a stone.", "stone", 1),  # inside a longer text
        ("store", "stone", 0.8),
        ("tone", "stone", 0.8),
        ("sstonne", "stone", 0.6),
        ("", "stone", 0),
        ("quite another text", "stone", 0),
    ],
)
def test_a_text_scores_as_in_flow_grpo(recognised, required, expected):
    assert ocr.score(recognised, required) == pytest.approx(expected)


def test_the_required_text_is_quoted_and_neither_spaces_nor_case_count():
    assert ocr.required_text('A "New York" sign, not "Boston"') == "newyork"
    assert ocr.required_text("New York") == "newyork"


@given(TEXTS, TEXTS, TEXTS)
def test_the_edit_distance_is_a_metric_between_the_lengths(a, b, c):
    distance = ocr.edit_distance(a, b)
    assert distance == ocr.edit_distance(b, a)
    assert (distance == 0) == (a == b)
    assert abs(len(a) - len(b)) <= distance <= max(len(a), len(b))
    assert distance <= ocr.edit_distance(a, c) + ocr.edit_distance(c, b)


def sign(text: str) -> torch.Tensor:
    """A sign, [3, 192, 256]."""
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    image = Image.new("RGB", (256, 192), (200, 220, 180))
    draw = ImageDraw.Draw(image)
    draw.multiline_text((20, 40), text, (20, 20, 90), ImageFont.truetype(font, 44))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def test_the_detector_finds_the_lines_of_a_sign_without_a_network(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    reward = metrics.plugin("ocr").build("cpu", Path)
    prompts = [Prompt(f'a sign that says "{text}"', {}) for text in ("Hello 24", "HELP", "Exit")]
    scores = reward.score(torch.stack([sign("HELLO\n24"), sign("HELD"), sign("")]), prompts)
    assert scores.tolist() == [1, 0.75, 0]


def test_other_versions_and_altered_models_are_refused_with_the_remedy(tmp_path, monkeypatch):
    folder = tmp_path / "models"
    folder.mkdir()
    for name, _ in (ocr.DETECTOR, ocr.RECOGNISER):
        shutil.copy(ocr.models() / name, folder)
    with (folder / ocr.RECOGNISER[0]).open("ab") as file:
        file.write(b"x")
    with monkeypatch.context() as patch:
        patch.setattr(ocr, "models", lambda: folder)
        with pytest.raises(ValueError, match=r"rec_small.onnx is missing or altered; reinstall"):
            ocr.OCR()
    with monkeypatch.context() as patch:
        patch.setattr(ocr, "VERSION", "3.9.0")
        message = r"rapidocr 3.10.0 is installed.*; run `pip install rapidocr==3.9.0`"
        with pytest.raises(ValueError, match=message):
            ocr.OCR()

    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(ValueError, match=r"rapidocr is not installed; run `pip install 'tafs\[oc"):
        ocr.OCR()
