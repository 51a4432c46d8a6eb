"""CLIP score and PickScore, both transformers' CLIPModel."""

from __future__ import annotations

from pathlib import Path

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import torch
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from tafs.rewards import learned
from tafs.rewards.metrics import METRICS

WEIGHTS = ("config.json", "model.safetensors")
PROCESSOR = ("preprocessor_config.json", "tokenizer_config.json")


class CLIPScore(learned.DualEncoder):
    """CLIP's cosine of image and caption (Hessel et al., 2021, arXiv 2104.08718).

    `folder` holds the model; `processor`, by default the same, image processor and tokenizer.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged; names it and the remedy.
    """

    metric = METRICS["clip"]

    def __init__(
        self, folder: Path, device: torch.device | str = "cpu", *, processor: Path | None = None
    ) -> None:
        processor = processor or folder
        learned.require(self.name, *(folder / file for file in WEIGHTS))
        learned.require(self.name, *(processor / file for file in PROCESSOR))
        model = learned.pretrained(self.name, CLIPModel, folder)
        pixels = CLIPImageProcessor.from_pretrained(processor, local_files_only=True)
        self.side = int(pixels.size["shortest_edge"])
        self.crop = int(pixels.crop_size["height"])
        self.tokenizer = CLIPTokenizer.from_pretrained(processor, local_files_only=True)
        self.length = model.config.text_config.max_position_embeddings
        known, read = len(self.tokenizer), model.config.text_config.vocab_size
        if known != read:
            reason = f"the tokenizer has {known} tokens, the model reads {read}"
            raise learned.damaged(self.name, processor, reason)
        super().__init__(model, pixels.image_mean, pixels.image_std, device)

    def tokenize(self, text: str) -> Tensor:
        encoded = self.tokenizer(
            text,
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        )
        return encoded.input_ids[0]

    def resize(self, images: Tensor) -> Tensor:
        images = learned.resize_shorter_side(images, self.side)
        top, left = ((n - self.crop) // 2 for n in images.shape[-2:])
        return images[..., top : top + self.crop, left : left + self.crop]

    def embed_images(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def embed_captions(self, captions: Tensor) -> Tensor:
        # Attention is causal and the end token is read, so padding has no effect.
        return self.model.get_text_features(input_ids=captions).pooler_output


class PickScore(CLIPScore):
    """PickScore v1: the cosine times the learned temperature (Kirstain et al., arXiv 2305.01569).

    The training scale is divided by 26, as in Flow-GRPO. `processor` is the folder of
    laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
    """

    metric = METRICS["pickscore"]

    def __init__(self, folder: Path, processor: Path, device: torch.device | str = "cpu") -> None:
        super().__init__(folder, device, processor=processor)
        # Its logarithm in bfloat16 would be wrong by up to 1/64, and all scores by 1.6 %.
        self.temperature = self.model.logit_scale.exp()

    def match(self, pixels: Tensor, captions: Tensor, owner: Tensor) -> Tensor:
        cosine = super().match(pixels, captions, owner)
        return self.temperature * cosine / self.metric.scale
