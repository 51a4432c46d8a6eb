"""Text accuracy by PP-OCR, scored as in Flow-GRPO; see `tafs.rewards.plugins.ocr`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from tafs.common.files import sha256
from tafs.data.prompts import Prompt, quoted
from tafs.rewards.plugins.ocr import METRIC, PACKAGE, VERSION

if TYPE_CHECKING:
    from torch import Tensor

# The package's model files, by name, with their SHA-256.
DETECTOR = (
    "PP-OCRv6_det_small.onnx",
    "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f",
)
RECOGNISER = (
    "PP-OCRv6_rec_small.onnx",
    "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884",
)


def required_text(prompt: str) -> str:
    """The text in the first pair of double quotes, or else all of it, normalised."""
    return _normalised(quoted(prompt) or prompt)


def _normalised(text: str) -> str:
    """Without spaces and in lower case, as in Flow-GRPO."""
    return text.replace(" ", "").lower()


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: insertions, deletions and substitutions from `a` to `b`."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def score(recognised: str, required: str) -> float:
    """Flow-GRPO's score of a recognised text, in [0, 1].

    1 - min(edit distance, length) / length with the length of the required text. Both texts are
    without spaces and in lower case, and a required text inside a longer recognised one counts as
    read.

    Args:
        recognised: as the recogniser gives it.
        required: of `required_text`.
    """
    found = _normalised(recognised)
    distance = 0 if required in found else edit_distance(found, required)
    return 1 - min(distance, len(required)) / len(required)


class OCR:
    """The recogniser of the package rapidocr on the CPU, in one thread.

    Args:
        line: (height, width) in pixels that an image is scaled to where all of it is one line of
            text, which needs no detector; None: the detector finds the lines.

    Raises:
        ValueError: the package is missing or has another version, or a model file is altered.
    """

    def __init__(self, line: tuple[int, int] | None = None) -> None:
        folder = models()
        for name, expected in (RECOGNISER,) if line else (DETECTOR, RECOGNISER):
            if not (folder / name).is_file() or sha256(folder / name) != expected:
                raise ValueError(
                    f"reward ocr: {folder / name} is missing or altered; reinstall it with "
                    f"`pip install --force-reinstall {PACKAGE}=={VERSION}`"
                )
        from rapidocr import RapidOCR

        settings: dict[str, Any] = {
            "Global.log_level": "critical",
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            # PaddleOCR 2's, which Flow-GRPO uses: images are not enlarged for the detector.
            "Det.limit_type": "max",
            "Det.limit_side_len": 960,
        }
        if line:
            # The input is not padded to the 320 pixels of longer lines.
            settings["Rec.rec_img_shape"] = [3, *line]
        self.line = line
        self.engine = RapidOCR(params=settings)

    def read(self, image: np.ndarray) -> str:
        """The text of an image, uint8 [H, W, 3] in RGB; its lines are joined."""
        bgr = np.ascontiguousarray(image[..., ::-1])  # as OpenCV reads files
        found: Any = self.engine(bgr, use_det=self.line is None, use_cls=False, use_rec=True)
        return "".join(found.txts or ())

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        images = images.detach().clamp(0, 1)
        if self.line:
            images = functional.interpolate(images, self.line, mode="bilinear")
        pixels = (images * 255).round().to(torch.uint8)
        texts = [self.read(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]
        scores = [score(t, required_text(p.text)) for t, p in zip(texts, prompts, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)


def models() -> Path:
    """The folder of the package's models, without importing it."""
    try:
        found = metadata.distribution(PACKAGE)
        metadata.version("onnxruntime")
    except metadata.PackageNotFoundError as error:
        raise ValueError(
            f"reward ocr: the package {error.name} is not installed; run `pip install 'tafs[ocr]'`"
        ) from None
    if found.version != VERSION:
        raise ValueError(
            f"reward ocr: {PACKAGE} {found.version} is installed, but {METRIC.name} is defined by "
            f"{VERSION}; run `pip install {PACKAGE}=={VERSION}`"
        )
    return Path(str(found.locate_file("rapidocr"))) / "models"
