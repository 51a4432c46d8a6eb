"""Stable Diffusion 3's architecture (SD3.5-M and the embedded shapes-sd3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tafs.backbones.base import ATTENTION, TIMESTEPS, Backbone, Conditioning


class SD3Backbone(Backbone):
    """SD3Transformer2DModel with two CLIP text encoders and a T5."""

    lora_targets = ATTENTION

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.transformer.config.in_channels, self.latent_size, self.latent_size)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        guided = self.guidance > 1
        embeds, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=guided,
            max_sequence_length=self.max_sequence_length,
        )
        if not guided:
            return Conditioning(embeds, pooled)
        return Conditioning(embeds, pooled, Conditioning(negative, negative_pooled))

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        if cond.negative is None:
            return self._network(x_t, t, cond.embeds, cond.pooled)
        embeds = torch.cat([cond.negative.embeds, cond.embeds])
        pooled = torch.cat([cond.negative.pooled, cond.pooled])
        both = self._network(torch.cat([x_t, x_t]), torch.cat([t, t]), embeds, pooled)
        without, with_prompt = both.chunk(2)
        return without + self.guidance * (with_prompt - without)

    def _network(self, x_t: Tensor, t: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        output = self.transformer(
            hidden_states=x_t.to(self.transformer.dtype),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=t * TIMESTEPS,
            return_dict=False,
        )
        return output[0].float()
