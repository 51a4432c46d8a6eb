"""Parameters and FLOPs of a network, counted without its weights.

The network is built on the `meta` device from its configuration: that of a pipeline folder, or the
published one of a model that is not downloaded. Prompt embeddings are random, with the shapes that
the text encoders would give them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tafs.common import seeding
from tafs.models import catalog
from tafs.models.architectures import Architecture
from tafs.models.base import Backbone
from tafs.models.conditioning import Conditioning
from tafs.models.plugins.flux import FluxBackbone
from tafs.models.plugins.sd3 import SD3Backbone

META = torch.device("meta")


# -- backbones without text encoders ---------------------------------------------------------------


class Textless(Backbone):
    """A backbone with random prompt embeddings instead of text encoders."""

    def __init__(self, pipeline: Any, *, tokens: int, **settings: Any) -> None:
        super().__init__(pipeline, **settings)
        self.tokens = tokens

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        settings, batch = self.transformer.config, len(prompts)
        where: dict[str, Any] = {"device": self.device, "dtype": self.transformer.dtype}
        return Conditioning(
            torch.randn(batch, self.tokens, settings.joint_attention_dim, **where),
            torch.randn(batch, settings.pooled_projection_dim, **where),
        )


class TextlessFlux(Textless, FluxBackbone):
    """FLUX.1."""


class TextlessSD3(Textless, SD3Backbone):
    """Stable Diffusion 3.5."""


Kind = TypeVar("Kind", bound=Textless)
CLASSES: dict[str, type[Textless]] = {
    "FluxPipeline": TextlessFlux,
    "StableDiffusion3Pipeline": TextlessSD3,
}
# By pipeline class: the network's class, the pipeline's, and the components that are left out.
PARTS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "FluxPipeline": (
        FluxTransformer2DModel,
        FluxPipeline,
        ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    ),
    "StableDiffusion3Pipeline": (
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
        (
            *("text_encoder", "text_encoder_2", "text_encoder_3"),
            *("tokenizer", "tokenizer_2", "tokenizer_3"),
        ),
    ),
}


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Create modules directly on the device and in this precision inside the `with` block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def build(
    kind: type[Kind],
    architecture: Architecture,
    model: catalog.Model,
    *,
    resolution: int,
    dtype: torch.dtype,
    device: torch.device,
    lora_rank: int | None,
) -> Kind:
    """Build a backbone like `Backbone.load`, with untrained weights.

    Args:
        kind: a class of `CLASSES`, or a subclass of one.
        architecture: the configuration of all modules.
        model: the catalogue's entry.
        resolution: of the images, in pixels.
        dtype: of the network's weights.
        device: of all modules.
        lora_rank: the rank of the adapter to attach; None: no adapter.
    """
    transformer, pipeline, left_out = PARTS[model.pipeline]
    with made_on(device, dtype):
        network = transformer(**architecture.transformer)
    for buffer in network.buffers():  # diffusers creates them in float32
        buffer.data = buffer.to(dtype)
    with made_on(device, torch.float32):
        decoder = AutoencoderKL(**architecture.vae)
    components = {
        "transformer": network,
        "vae": decoder.to(memory_format=torch.channels_last),
        "scheduler": FlowMatchEulerDiscreteScheduler(**architecture.scheduler),
    }
    backbone = kind(
        pipeline(**components, **dict.fromkeys(left_out)),
        tokens=architecture.tokens,
        resolution=resolution,
        guidance=model.guidance,
        max_sequence_length=model.max_sequence_length,
    )
    if lora_rank is not None:
        backbone.add_lora(lora_rank, lora_rank, seeding.generator(0, "lora"))
        network.to(device)  # on the meta device, the adapter's weights are created elsewhere
    return backbone


# -- counts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """The size of a network, and the FLOPs of one evaluation of one image with guidance."""

    parameters: int  # without the adapter
    adapter: int  # parameters of the adapter
    forward: float  # FLOPs of the forward pass
    trained: float  # FLOPs of forward and backward pass, with gradients for the adapter only


def describe(backbone: Textless) -> Network:
    """Count parameters and FLOPs of a backbone on the `meta` device.

    There, the count does not depend on the attention kernel or on gradient checkpointing.
    """
    adapter = sum(p.numel() for p in backbone.lora_parameters().values())
    everything = sum(p.numel() for p in backbone.transformer.parameters())
    return Network(
        everything - adapter, adapter, forward(backbone), forward(backbone, backward=True)
    )


def forward(backbone: Textless, *, backward: bool = False) -> float:
    """Return the FLOPs of one evaluation of one image, optionally with the backward pass."""
    one = backbone.embed([""])
    cond: Conditioning = one if backbone.negative_prompt is None else replace(one, negative=one)
    x: Tensor = torch.empty(1, *backbone.latent_shape, device=META)
    t = torch.empty(1, device=META)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        velocity = backbone.velocity(x, t, cond)
        if backward:
            velocity.sum().backward()
    return float(counter.get_total_flops())
