"""Stable Diffusion 3's architecture (SD3.5-M and the embedded shapes-sd3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tafs.models.base import ATTENTION, TIMESTEPS, Backbone, Conditioning


class SD3Backbone(Backbone):
    """SD3Transformer2DModel with two CLIP text encoders and a T5.

    With a guidance above 1 the empty prompt's velocity is computed in the same batch.

    `time_grid` is what diffusers makes of `sigmas` = 1, (N - 1) / N, ..., 1 / N, as for FLUX.1; the
    grid of its StableDiffusion3Pipeline called without sigmas ends in a step from about 0.009.
    """

    lora_targets = ATTENTION

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.transformer_blocks)

    @property
    def patch_size(self) -> int:
        return self.transformer.config.patch_size

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.transformer.config.in_channels, self.latent_size, self.latent_size)

    @property
    def negative_prompt(self) -> str | None:
        return "" if self.guidance > 1 else None

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Conditioning(embeds, pooled)

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
