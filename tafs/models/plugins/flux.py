"""FLUX.1 (Black Forest Labs, 2024): FLUX.1-dev and the embedded shapes-flux."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tafs.models import ATTENTION, Backbone, Conditioning, ModelPlugin
from tafs.models.sampling import shifted


class FluxBackbone(Backbone):
    """FluxTransformer2DModel with a CLIP text encoder and a T5; the guidance is a network input.

    Latents have the shape [B, channels, height, width]; `network` packs 2 x 2 patches into tokens.
    """

    lora_targets = ATTENTION

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    @property
    def patch_size(self) -> int:
        return 2

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.transformer.config.in_channels // 4, self.latent_size, self.latent_size)

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            device=self.pipeline.text_encoder.device,
            max_sequence_length=self.max_sequence_length,
        )
        return Conditioning(embeds, pooled)

    def network(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        batch, channels, height, width = x_t.shape
        device, dtype = x_t.device, self.transformer.dtype
        image_ids = self.pipeline._prepare_latent_image_ids(
            batch, height // 2, width // 2, device, dtype
        )
        guided = self.transformer.config.guidance_embeds
        output = self.transformer(
            hidden_states=self.pipeline._pack_latents(
                x_t.to(dtype), batch, channels, height, width
            ),
            encoder_hidden_states=cond.embeds,
            pooled_projections=cond.pooled,
            timestep=t,  # this network multiplies it by 1000 itself
            guidance=torch.full_like(t, self.guidance) if guided else None,
            txt_ids=torch.zeros(cond.embeds.shape[1], 3, device=device, dtype=dtype),
            img_ids=image_ids,
            return_dict=False,
        )[0]
        unpacked = self.pipeline._unpack_latents(
            output, self.resolution, self.resolution, self.pipeline.vae_scale_factor
        )
        return unpacked.float()

    def time_grid(self, steps: int) -> Tensor:
        """Return a uniform grid shifted as the scheduler does for this number of image tokens."""
        config = self.pipeline.scheduler.config
        if not config.use_dynamic_shifting:
            return super().time_grid(steps)
        tokens = (self.latent_size // self.patch_size) ** 2
        slope = (config.max_shift - config.base_shift) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
        return shifted(torch.linspace(1, 0, steps + 1), math.exp(mu))


PLUGIN = ModelPlugin(backbones={"FluxPipeline": FluxBackbone})
