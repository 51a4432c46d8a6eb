"""Parameters and FLOPs of a network, counted without its weights.

The network is built on the `meta` device from its configuration: that of a pipeline folder, or the
published one of a model that is not downloaded. Prompt embeddings are random, with the shapes that
the text encoders would give them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import diffusers
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tafs.common import seeding
from tafs.models import catalog, lora
from tafs.models.architectures import Architecture
from tafs.models.base import Backbone
from tafs.models.conditioning import Conditioning

META = torch.device("meta")


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
            torch.randn(batch, settings.get("pooled_projection_dim", 0), **where),
        )


# The network's and the autoencoder's class, by pipeline class.
NETWORKS: Mapping[str, Any] = {
    "Flux2KleinPipeline": diffusers.Flux2Transformer2DModel,
    "FluxPipeline": diffusers.FluxTransformer2DModel,
    "StableDiffusion3Pipeline": diffusers.SD3Transformer2DModel,
}
AUTOENCODERS: Mapping[str, Any] = {
    "Flux2KleinPipeline": diffusers.AutoencoderKLFlux2,
    "FluxPipeline": diffusers.AutoencoderKL,
    "StableDiffusion3Pipeline": diffusers.AutoencoderKL,
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
    architecture: Architecture,
    model: catalog.Model,
    *,
    resolution: int,
    dtype: torch.dtype,
    device: torch.device,
    lora_rank: int | None,
    kind: type[Textless] = Textless,
) -> Any:
    """Build a backbone like `Backbone.load`, with untrained weights.

    Args:
        architecture: the configuration of all modules.
        model: the catalogue's entry, of a pipeline in `NETWORKS`.
        resolution: of the images, in pixels.
        dtype: of the network's weights.
        device: of all modules.
        lora_rank: the rank of the adapter to attach; None: no adapter.
        kind: a base class of the backbone, besides the one of the pipeline's plug-in.
    """
    pipeline = getattr(diffusers, model.pipeline)
    with made_on(device, dtype):
        network = NETWORKS[model.pipeline](**architecture.transformer)
    for buffer in network.buffers():  # diffusers creates them in float32
        buffer.data = buffer.to(dtype)
    with made_on(device, torch.float32):
        decoder = AUTOENCODERS[model.pipeline](**architecture.vae)
    components = {
        "transformer": network,
        "vae": decoder.to(memory_format=torch.channels_last),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**architecture.scheduler),
    }
    required, _ = pipeline._get_signature_keys(pipeline)
    trained = catalog.backbones()[model.pipeline]
    guidance, length = model.conditioning
    backbone = type(kind.__name__ + trained.__name__, (kind, trained), {})(
        pipeline(**(dict.fromkeys(required) | components)),
        tokens=architecture.tokens,
        resolution=resolution,
        guidance=guidance,
        max_sequence_length=length,
    )
    if lora_rank is not None:
        backbone.add_lora(lora_rank, lora_rank, seeding.generator(0, "lora"))
        network.to(device)  # on the meta device, the adapter's weights are created elsewhere
    return backbone


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
    counting = FlopCounterMode(display=False, custom_mapping=lora.FLOPS)
    with counting as counter, torch.set_grad_enabled(backward):
        velocity = backbone.velocity(x, t, cond)
        if backward:
            velocity.sum().backward()
    return float(counter.get_total_flops())
