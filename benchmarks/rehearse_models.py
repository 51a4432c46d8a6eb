"""The models of benchmarks/rehearse.py: backbones and reward models with random weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip

import diffusers
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tafs.experiment import Plan
from tafs.models import architectures, catalog, flops
from tafs.models.architectures import FLUX_DEV, SD35_MEDIUM, Architecture
from tafs.models.conditioning import Conditioning
from tafs.rewards import registry
from tafs.rewards.clip import CLIPScore, PickScore
from tafs.rewards.registry import RewardSet


@dataclass(frozen=True)
class Size:
    """All models that are built, and the images' resolution in pixels."""

    resolution: int
    backbones: Mapping[str, Architecture]
    rewards: Mapping[str, Mapping[str, Any]]  # CLIPConfig's arguments, by the reward's name


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


def _tiny(architecture: Architecture, latents: Mapping[str, float], **network: Any) -> Architecture:
    common = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}
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
        backbones={"flux": FLUX_DEV, "sd3": SD35_MEDIUM},
        rewards={
            "pickscore": _clip("gelu", 1024, (1024, 24, 16), (1280, 32, 16)),
            "clip": _clip("quick_gelu", 768, (768, 12, 12), (1024, 24, 16)),
        },
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
        },
        rewards={
            "pickscore": _clip("gelu", 32, (32, 2, 2), (32, 2, 2), (32, 16)),
            "clip": _clip("quick_gelu", 32, (32, 2, 2), (32, 2, 2), (32, 16)),
        },
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
    role: str, size: Size, plan: Plan, device: torch.device, *, checkpointing: bool = False
) -> Rehearsed:
    """A backbone as `Backbone.load` gives it, with an adapter, on random weights."""
    scale = plan.config.active
    backbone: Rehearsed = flops.build(
        size.backbones[role],
        catalog.read()[scale.model_roles[role]],
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


REWARDS: dict[str, type[RandomClip]] = {"pickscore": RandomPickScore, "clip": RandomClip}


def reward_models(names: Sequence[str], size: Size, device: torch.device) -> RewardSet:
    return registry.load(names, lambda name: REWARDS[name](size.rewards[name], device).reward())
