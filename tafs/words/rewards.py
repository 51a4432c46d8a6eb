"""The published recogniser on images that are one line of text each."""

from __future__ import annotations

from dataclasses import replace

from tafs.rewards.metrics import METRICS, Reward
from tafs.rewards.ocr import OCR

# The renderer makes letters half as wide as they are designed, so an image is shown twice as wide
# as high; 48 pixels is the height of the recogniser's input.
LINE = (48, 96)


def ocr() -> Reward:
    """The reward `ocr` without the detector, since the text fills the image.

    Raises:
        ValueError: as for `OCR`.
    """
    metric = METRICS["ocr"]
    return Reward(replace(metric, version=f"{metric.version}, recogniser only"), OCR(LINE))
