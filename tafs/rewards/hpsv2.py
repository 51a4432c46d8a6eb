"""HPSv2.1 (Wu et al., 2023, arXiv 2306.09341) computed with open_clip.

The model is open_clip's ViT-H-14 with other weights: same parameters, same tokens. The `hpsv2`
package is not needed to score; the tests use it as the reference for parity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import torch
from torch import Tensor

from tafs.rewards import learned
from tafs.rewards.metrics import METRICS

# Widths of an attention head in open_clip's ViT-H-14, which the weights' shapes do not determine.
VISION_HEAD_WIDTH, TEXT_HEAD_WIDTH = 80, 64


class HPSv2(learned.DualEncoder):
    """The cosine of HPSv2.1, with hpsv2's preprocessing: longer side to 224, black borders.

    Raises:
        FileNotFoundError, ValueError: the file is missing or damaged; names it and the remedy.
    """

    metric = METRICS["hpsv2"]

    def __init__(self, file: Path, device: torch.device | str = "cpu") -> None:
        import open_clip

        try:
            state = learned.read_state(self.name, file)["state_dict"]
            settings = architecture(state)
        except KeyError as error:
            raise learned.damaged(self.name, file, f"it has no {error}") from None
        model = open_clip.CLIP(**settings)
        learned.fill(self.name, model, state, file)
        self.side = settings["vision_cfg"]["image_size"]
        self.tokenizer = open_clip.SimpleTokenizer(
            context_length=settings["text_cfg"]["context_length"]
        )
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        super().__init__(model, mean, std, device)

    def tokenize(self, text: str) -> Tensor:
        return self.tokenizer(text)[0]

    def resize(self, images: Tensor) -> Tensor:
        return learned.resize_longer_side(images, self.side)

    def embed_images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def embed_captions(self, captions: Tensor) -> Tensor:
        return self.model.encode_text(captions)


def architecture(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """open_clip's model settings, inferred from the shapes of its weights.

    Raises:
        KeyError: a weight of the architecture is missing.
    """
    width, _, _, patch = state["visual.conv1.weight"].shape
    tokens = len(state["visual.positional_embedding"]) - 1  # one is the class token
    vocabulary, text_width = state["token_embedding.weight"].shape
    return {
        "embed_dim": state["text_projection"].shape[1],
        "vision_cfg": {
            "image_size": math.isqrt(tokens) * patch,
            "layers": learned.count_layers(state, "visual.transformer.resblocks"),
            "width": width,
            "head_width": VISION_HEAD_WIDTH,
            "patch_size": patch,
        },
        "text_cfg": {
            "context_length": len(state["positional_embedding"]),
            "vocab_size": vocabulary,
            "width": text_width,
            "heads": text_width // TEXT_HEAD_WIDTH,
            "layers": learned.count_layers(state, "transformer.resblocks"),
        },
    }
