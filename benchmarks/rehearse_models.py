"""The models of benchmarks/rehearse.py, with random weights.

Backbones, text encoders and reward models have the configurations that are published with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip

import diffusers
import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Qwen3Config,
    Qwen3ForCausalLM,
    SwinConfig,
    T5Config,
    T5EncoderModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tafs.data.geneval_rows import CLASSES, COLORS
from tafs.data.prompts import Prompt
from tafs.experiment import Plan
from tafs.models import architectures, catalog, flops
from tafs.models.architectures import (
    CLIP_TOKENS,
    FLUX2_KLEIN_BASE_4B,
    FLUX_DEV,
    SD35_MEDIUM,
    Architecture,
)
from tafs.models.conditioning import Conditioning
from tafs.rewards import registry
from tafs.rewards.clip import CLIPScore, PickScore
from tafs.rewards.detector import ColorClassifier, GenEval, Mask2FormerDetector
from tafs.rewards.hpsv2 import HPSv2
from tafs.rewards.metrics import Reward
from tafs.rewards.registry import RewardSet

MODELS = {"flux": "flux-dev", "sd3": "sd35-medium", "klein": "flux2-klein-base-4b"}


@dataclass(frozen=True)
class Encoder:
    """A text encoder, and the number of tokens of a prompt."""

    name: str
    kind: Any
    config: Any
    tokens: int


@dataclass(frozen=True)
class Size:
    """All models that are built, and the images' resolution in pixels."""

    resolution: int
    backbones: Mapping[str, Architecture]
    encoders: Mapping[str, Sequence[Encoder]]  # by backbone
    rewards: Mapping[str, Mapping[str, Any]]  # CLIPConfig's arguments, by the reward's name
    hpsv2: Mapping[str, Any]  # open_clip's arguments
    detector: Mask2FormerConfig  # of GenEval, beside the CLIP of `rewards`


def _clip(
    act: str,
    projection: int,
    text: tuple[int, int, int],
    vision: tuple[int, int, int],
    image: tuple[int, int] = (224, 14),
) -> dict[str, Any]:
    """Arguments of CLIPConfig; towers are (width, layers, heads), `image` is (side, patch)."""

    def tower(width: int, layers: int, heads: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "projection_dim": projection,
            "hidden_act": act,
        }

    pixels = dict(zip(("image_size", "patch_size"), image, strict=True))
    return {
        "text_config": tower(*text),
        "vision_config": tower(*vision) | pixels,
        "projection_dim": projection,
    }


def _open_clip(
    projection: int,
    text: tuple[int, int, int],
    vision: tuple[int, int, int],
    image: tuple[int, int] = (224, 14),
) -> dict[str, Any]:
    """Arguments of open_clip's CLIP; as for `_clip`, with the width of a head in `vision`."""
    side = {"image_size": image[0], "patch_size": image[1]}
    return {
        "embed_dim": projection,
        "vision_cfg": dict(zip(("width", "layers", "head_width"), vision, strict=True)) | side,
        "text_cfg": dict(zip(("width", "layers", "heads"), text, strict=True)),
    }


def _detector(swin: Mapping[str, Any], **sizes: int) -> Mask2FormerConfig:
    stages = [f"stage{n}" for n in range(1, 5)]
    backbone = SwinConfig(window_size=7, out_features=stages, **swin)
    return Mask2FormerConfig(
        backbone_config=backbone, id2label=dict(enumerate(CLASSES)), num_queries=100, **sizes
    )


def _clip_text(name: str, kind: Any, act: str, width: int, layers: int, heads: int) -> Encoder:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    config = CLIPTextConfig(
        num_hidden_layers=layers, num_attention_heads=heads, hidden_act=act, **sizes
    )
    return Encoder(name, kind, config, CLIP_TOKENS)


def _t5(tokens: int, width: int, layers: int, heads: int, hidden: int) -> Encoder:
    config = T5Config(
        d_model=width,
        num_layers=layers,
        num_heads=heads,
        d_ff=hidden,
        feed_forward_proj="gated-gelu",
    )
    return Encoder("T5-XXL", T5EncoderModel, config, tokens)


def _encoders(
    clip_l: tuple[int, int, int],
    clip_g: tuple[int, int, int],
    t5: tuple[int, int, int, int],
    qwen: Mapping[str, int],
) -> dict[str, Sequence[Encoder]]:
    """The text encoders of each backbone; CLIP's and T5's sizes are (width, layers, heads, ...)."""
    projected = CLIPTextModelWithProjection
    return {
        "flux": (
            _clip_text("CLIP-L", CLIPTextModel, "quick_gelu", *clip_l),
            _t5(FLUX_DEV.tokens, *t5),
        ),
        "sd3": (
            _clip_text("CLIP-L", projected, "quick_gelu", *clip_l),
            _clip_text("CLIP-G", projected, "gelu", *clip_g),
            _t5(SD35_MEDIUM.tokens - CLIP_TOKENS, *t5),
        ),
        "klein": (
            Encoder(
                "Qwen3-4B",
                Qwen3ForCausalLM,
                Qwen3Config(tie_word_embeddings=True, use_cache=False, **qwen),
                FLUX2_KLEIN_BASE_4B.tokens,
            ),
        ),
    }


def _tiny(architecture: Architecture, latents: Mapping[str, float], **network: Any) -> Architecture:
    common = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}
    if "pooled_projection_dim" in architecture.transformer:
        common["pooled_projection_dim"] = 32
    return replace(
        architecture,
        transformer={**architecture.transformer, **common, **network},
        vae=architectures.vae(channels=(8, 8), layers=1, groups=4, latents=latents),
        tokens=8,
    )


SIZES = {
    "full": Size(
        resolution=512,
        backbones={"flux": FLUX_DEV, "sd3": SD35_MEDIUM, "klein": FLUX2_KLEIN_BASE_4B},
        encoders=_encoders(
            clip_l=(768, 12, 12),
            clip_g=(1280, 32, 20),
            t5=(4096, 24, 64, 10240),
            qwen={
                "hidden_size": 2560,
                "intermediate_size": 9728,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 151936,
            },
        ),
        rewards={
            "pickscore": _clip("gelu", 1024, (1024, 24, 16), (1280, 32, 16)),
            "clip": _clip("quick_gelu", 768, (768, 12, 12), (1024, 24, 16)),
        },
        hpsv2=_open_clip(1024, (1024, 24, 16), (1280, 32, 80)),
        # Of Swin-S; the other sizes are transformers' own defaults.
        detector=_detector({"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]}),
    ),
    "tiny": Size(  # seconds on a CPU
        resolution=16,
        backbones={
            "flux": _tiny(
                FLUX_DEV,
                architectures.FLUX_LATENTS,
                num_layers=1,
                num_single_layers=2,
                axes_dims_rope=(4, 6, 6),
            ),
            "sd3": _tiny(
                SD35_MEDIUM,
                architectures.SD3_LATENTS,
                num_layers=3,
                caption_projection_dim=32,
                pos_embed_max_size=16,
                dual_attention_layers=(0, 1),
            ),
            "klein": _tiny(
                FLUX2_KLEIN_BASE_4B,
                architectures.FLUX2_LATENTS,
                num_layers=1,
                num_single_layers=2,
                joint_attention_dim=48,
                axes_dims_rope=(4, 4, 4, 4),
            ),
        },
        encoders=_encoders(
            clip_l=(32, 2, 2),
            clip_g=(32, 2, 2),
            t5=(32, 2, 2, 64),
            qwen={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "vocab_size": 320,
            },
        ),
        rewards={
            "pickscore": _clip("gelu", 32, (32, 2, 2), (32, 2, 2), (32, 16)),
            "clip": _clip("quick_gelu", 32, (32, 2, 2), (32, 2, 2), (32, 16)),
        },
        hpsv2=_open_clip(32, (32, 2, 2), (32, 2, 16), (32, 16)),
        detector=_detector(
            {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2]},
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=16,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            dim_feedforward=16,
        ),
    ),
}


class Rehearsed(flops.Textless):
    """A backbone that keeps one adapter for all methods and counts network evaluations."""

    def __init__(self, pipeline: diffusers.DiffusionPipeline, **settings: Any):
        super().__init__(pipeline, **settings)
        self.evaluations: Counter[bool] = Counter()  # of images, by whether they have gradients

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.evaluations[torch.is_grad_enabled()] += len(x_t)
        return super().velocity(x_t, t, cond)

    def add_lora(self, rank: int, alpha: int, generator: torch.Generator) -> None:
        if not self.lora_parameters():
            super().add_lora(rank, alpha, generator)


def build(
    name: str, size: Size, plan: Plan, device: torch.device, *, checkpointing: bool = False
) -> Rehearsed:
    """A backbone as `Backbone.load` gives it, with an adapter, on random weights."""
    scale = plan.config.active
    backbone: Rehearsed = flops.build(
        size.backbones[name],
        catalog.read()[MODELS[name]],
        resolution=size.resolution,
        dtype=getattr(torch, scale.dtype),
        device=device,
        lora_rank=scale.lora.rank,
        kind=Rehearsed,
    )
    if checkpointing:
        for module in (backbone.transformer, backbone.pipeline.vae):
            module.enable_gradient_checkpointing()
    return backbone


class RandomClip(CLIPScore):
    """The CLIP score of a model with random weights, for captions of random tokens."""

    def __init__(self, settings: Mapping[str, Any], device: torch.device) -> None:
        with flops.made_on(device, torch.float32):
            model = CLIPModel(CLIPConfig(**settings))
        self.side = self.crop = settings["vision_config"]["image_size"]
        # CLIPScore's own constructor reads files.
        super(CLIPScore, self).__init__(model, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, device)

    def tokenize(self, text: str) -> Tensor:
        text_config = self.model.config.text_config
        return torch.randint(text_config.vocab_size, (text_config.max_position_embeddings,))


class RandomPickScore(RandomClip, PickScore):
    """PickScore with random weights."""

    def __init__(self, settings: Mapping[str, Any], device: torch.device) -> None:
        super().__init__(settings, device)
        self.temperature = self.model.logit_scale.exp()


class RandomHPSv2(HPSv2):
    """HPSv2 with random weights."""

    def __init__(self, settings: Mapping[str, Any], device: torch.device) -> None:
        import open_clip

        with flops.made_on(device, torch.float32):
            model = open_clip.CLIP(**settings)
        self.side = settings["vision_cfg"]["image_size"]
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        super(HPSv2, self).__init__(model, mean, std, device)

    def tokenize(self, text: str) -> Tensor:
        return torch.randint(self.model.vocab_size, (self.model.context_length,))


class RandomColors(ColorClassifier):
    """CLIP's classifier of colours with random weights."""

    def __init__(self, settings: Mapping[str, Any], device: torch.device) -> None:
        self.clip = RandomClip(settings, device)
        self._weights: dict[str, Tensor] = {}


class RandomDetector(Mask2FormerDetector):
    """GenEval's detector with random weights.

    Nearly every one of its 100 queries is an object, more than in most images.
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        with flops.made_on(device, torch.float32):
            model = Mask2FormerForUniversalSegmentation(size.detector)
        # Confident classes, above the threshold.
        torch.nn.init.normal_(model.class_predictor.weight, std=3.0)
        self.device, self.batch, self.classes = device, 8, CLASSES
        self.model = model.eval().requires_grad_(False).to(device)
        self.colors = RandomColors(size.rewards["clip"], device)


def prompt(number: int) -> Prompt:
    """A prompt that GenEval can judge, with two objects and their colours."""
    objects = [(CLASSES[n % len(CLASSES)], COLORS[n % len(COLORS)]) for n in (number, number + 1)]
    include = [{"class": name, "count": 1, "color": color} for name, color in objects]
    return Prompt(f"prompt {number}", {"tag": "color_attr", "include": include})


def reward_models(names: Sequence[str], size: Size, device: torch.device) -> RewardSet:
    def made(name: str) -> Reward:
        if name == "geneval":
            return GenEval(RandomDetector(size, device), strict=False).reward()
        if name == "hpsv2":
            return RandomHPSv2(size.hpsv2, device).reward()
        kind = {"pickscore": RandomPickScore, "clip": RandomClip}[name]
        return kind(size.rewards[name], device).reward()

    return registry.load(names, made)
