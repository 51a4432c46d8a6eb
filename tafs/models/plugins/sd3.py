"""Stable Diffusion 3 (Esser et al., 2024): SD3.5-M and the embedded shapes-sd3."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tafs.models import ATTENTION, TIMESTEPS, Backbone, Conditioning, ModelPlugin


class SD3Backbone(Backbone):
    """SD3Transformer2DModel with two CLIP text encoders and a T5, and classifier-free guidance.

    `time_grid` equals that of diffusers for `sigmas` = 1, (N - 1) / N, ..., 1 / N. The default grid
    of StableDiffusion3Pipeline differs: it ends with a step from about t = 0.009.
    """

    lora_targets = ATTENTION

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

    def network(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        output = self.transformer(
            hidden_states=x_t.to(self.transformer.dtype),
            encoder_hidden_states=cond.embeds,
            pooled_projections=cond.pooled,
            timestep=t * TIMESTEPS,
            return_dict=False,
        )
        return output[0].float()


PLUGIN = ModelPlugin(backbones={"StableDiffusion3Pipeline": SD3Backbone})
