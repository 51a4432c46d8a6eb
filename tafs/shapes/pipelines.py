"""Untrained pipelines of the embedded base models, in the layouts of published ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTokenizer, T5Tokenizer

from tafs.models.plugins.flux import FluxBackbone
from tafs.models.plugins.sd3 import SD3Backbone
from tafs.shapes import text, vae
from tafs.shapes.scenes import IMAGE_SIZE

SETTINGS: Any = {
    "resolution": IMAGE_SIZE,
    "guidance": 1.0,
    "max_sequence_length": text.MAX_TOKENS,
}
SHIFT = 3.0  # time shift of the sampling grid towards noise; Stable Diffusion 3's


def scheduler(name: str) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a base model."""
    if name.endswith("-sd3"):
        return FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    # Like FLUX.1-dev: the shift depends on the number of image tokens.
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_image_seq_len=9,
        max_image_seq_len=4096,
        base_shift=math.log(SHIFT),
        max_shift=math.log(SHIFT) + 1,
    )


Tokenizers = Callable[[], tuple[CLIPTokenizer, T5Tokenizer]]


def tokenizers() -> tuple[CLIPTokenizer, T5Tokenizer]:
    """The tokenizers of the shapes' captions."""
    return text.clip_tokenizer(), text.t5_tokenizer()


def build_sd3(
    autoencoder: AutoencoderKL,
    width: int = 128,
    layers: int = 5,
    tokenizers: Tokenizers = tokenizers,
) -> SD3Backbone:
    """An untrained pipeline in Stable Diffusion 3's layout around a trained autoencoder."""
    tokenizer, t5_tokenizer = tokenizers()
    latent_size = IMAGE_SIZE // 2 ** (len(autoencoder.config.block_out_channels) - 1)
    transformer = SD3Transformer2DModel(
        sample_size=latent_size,
        patch_size=1,
        in_channels=vae.LATENT_CHANNELS,
        out_channels=vae.LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=text.T5_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * text.CLIP_WIDTH,
        pos_embed_max_size=latent_size,
        qk_norm="rms_norm",
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler("shapes-sd3"),
        vae=autoencoder,
        text_encoder=text.clip_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=text.clip_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=text.t5_encoder(t5_tokenizer),
        tokenizer_3=t5_tokenizer,
    )
    return SD3Backbone(pipeline, **SETTINGS)


def build_flux(
    autoencoder: AutoencoderKL,
    width: int = 128,
    layers: int = 5,
    single_layers: int = 4,
    tokenizers: Tokenizers = tokenizers,
) -> FluxBackbone:
    """An untrained pipeline in FLUX.1's layout around a trained autoencoder."""
    tokenizer, t5_tokenizer = tokenizers()
    transformer = FluxTransformer2DModel(
        in_channels=4 * vae.LATENT_CHANNELS,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=text.T5_WIDTH,
        pooled_projection_dim=text.CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=scheduler("shapes-flux"),
        vae=autoencoder,
        text_encoder=text.clip_text_encoder(tokenizer, projected=False),
        tokenizer=tokenizer,
        text_encoder_2=text.t5_encoder(t5_tokenizer),
        tokenizer_2=t5_tokenizer,
    )
    return FluxBackbone(pipeline, **SETTINGS)
