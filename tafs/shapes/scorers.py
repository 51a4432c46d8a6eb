"""Architectures of the embedded reward models, small versions of the published ones.

`clip`, `pickscore` and `hpsv2` are transformers' CLIPModel, like PickScore. In `imagereward` and
`unifiedreward`, caption tokens attend to image patches, like in BLIP.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from tafs.shapes import text
from tafs.shapes.scenes import IMAGE_SIZE

WIDTH = 64
PATCH = 4
TEMPERATURE = 26.0  # exp(logit_scale), close to PickScore's
GRADES = 5


def vision_config(layers: int = 3) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
        attention_dropout=0.0,
    )


def tokens(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token ids, [B, MAX_TOKENS]."""
    encoded = tokenizer(
        list(captions),
        padding="max_length",
        max_length=text.MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    return encoded.input_ids


class DualEncoder(nn.Module):
    """A CLIPModel whose score is the cosine of image and caption; differentiable in the image."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def build(cls, tokenizer: CLIPTokenizer) -> DualEncoder:
        config = CLIPConfig(
            text_config=text.clip_text_config(tokenizer, WIDTH).to_dict(),
            vision_config=vision_config().to_dict(),
            projection_dim=WIDTH,
            logit_scale_init_value=float(torch.tensor(TEMPERATURE).log()),
        )
        return cls(CLIPModel(config))

    def embed_images(self, images: Tensor) -> Tensor:
        """Embeddings [B, WIDTH] of images [B, 3, H, W] in [0, 1]."""
        return self.model.get_image_features(pixel_values=images * 2 - 1).pooler_output

    def embed(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings of the images and the captions, [B, WIDTH] each."""
        image = self.embed_images(images)
        unique, owner = ids.unique(dim=0, return_inverse=True)  # images of a group share a caption
        caption = self.model.get_text_features(input_ids=unique).pooler_output
        return functional.normalize(image, dim=-1), functional.normalize(caption, dim=-1)[owner]

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Cosines [B] of images [B, 3, H, W] in [0, 1] and token ids [B, L]."""
        image, caption = self.embed(images, ids)
        return (image * caption).sum(-1)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder, safe_serialization=True)

    @classmethod
    def load(cls, folder: Path) -> DualEncoder:
        # For so few tokens, plain attention is faster than a fused kernel.
        return cls(
            CLIPModel.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation="eager",
            )
        )


class FusionScorer(nn.Module):
    """Caption tokens attend to image patches; a small head maps them to `outputs` numbers."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.settings = {"outputs": outputs}
        self.vision = CLIPVisionModel(vision_config())
        self.text = CLIPTextModel(text.clip_text_config(text.clip_tokenizer(), WIDTH))
        layer = nn.TransformerDecoderLayer(
            WIDTH,
            nhead=4,
            dim_feedforward=2 * WIDTH,
            dropout=0.0,
            batch_first=True,
            norm_first=True,
            activation="gelu",
        )
        self.fusion = nn.TransformerDecoder(layer, num_layers=2, norm=nn.LayerNorm(WIDTH))
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, outputs))

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """[B, outputs] for images [B, 3, H, W] in [0, 1] and token ids [B, L]."""
        patches = self.vision(pixel_values=images * 2 - 1).last_hidden_state
        unique, owner = ids.unique(dim=0, return_inverse=True)
        hidden = self.fusion(self.text(input_ids=unique).last_hidden_state[owner], patches)
        return self.head(hidden.mean(1))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.settings) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> FusionScorer:
        model = cls(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        state = load_file(folder / "model.safetensors")
        model.load_state_dict({name: value.float() for name, value in state.items()})
        return model


def grade(logits: Tensor) -> Tensor:
    """Expected grade [B] in [1, GRADES] of logits [B, GRADES]."""
    return logits.softmax(-1) @ torch.arange(1.0, GRADES + 1, device=logits.device)
