"""Text accuracy (Flow-GRPO, Liu et al., 2025, arXiv 2505.05470): edit distance of the read text.

PP-OCRv6 reads the image; the score is 1 - min(edit distance, length) / length of the text that the
prompt has in double quotes. Spaces and case do not count.
"""

from __future__ import annotations

from tafs.rewards.metrics import Folder, Metric, Reward, RewardPlugin

PACKAGE, VERSION = "rapidocr", "3.10.0"
METRIC = Metric(
    name="ocr",
    title="OCR",
    unit="text accuracy (%)",
    digits=1,
    factor=100,
    limits=(0, 100),
    quotes=True,
    version=f"PP-OCRv6 small of {PACKAGE} {VERSION}",
)


def build(device: str, folder: Folder) -> Reward:
    from tafs.rewards.ocr import OCR

    return Reward(METRIC, OCR())


REWARD = RewardPlugin(METRIC, build)
