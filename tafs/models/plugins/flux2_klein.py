"""FLUX.2 [klein] (Black Forest Labs, 2026): FLUX.2-klein-base-4B."""

from __future__ import annotations

import math
from collections.abc import Sequence

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import torch
from torch import Tensor, nn

from tafs.models import ATTENTION, Backbone, Conditioning, ModelPlugin
from tafs.models.sampling import shifted


class Flux2KleinBackbone(Backbone):
    """Flux2Transformer2DModel with layers of a Qwen3, and classifier-free guidance.

    Latents are the pipeline's: 2 x 2 patches as channels, normalised with the autoencoder's
    batch-norm statistics. A model that is distilled for few steps has no guidance.
    """

    @property
    def lora_targets(self) -> Sequence[str]:
        """All projections of attention, as in diffusers' training script for this model.

        A single block computes queries, keys and values, and attention's output, in one product
        each with its feed-forward layer, so the adapter changes that layer too. The output's name
        also ends those of lists in the double blocks, so each is named in full.
        """
        single = range(len(self.transformer.single_transformer_blocks))
        outputs = [f"single_transformer_blocks.{n}.attn.to_out" for n in single]
        return (*ATTENTION, "attn.to_qkv_mlp_proj", *outputs)

    @property
    def negative_prompt(self) -> str | None:
        return "" if self.guidance > 1 and not self.pipeline.config.is_distilled else None

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    @property
    def patch_size(self) -> int:
        return 2

    @property
    def latent_shape(self) -> tuple[int, ...]:
        side = self.latent_size // self.patch_size
        return (self.transformer.config.in_channels, side, side)

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts),
            device=self.pipeline.text_encoder.device,
            max_sequence_length=self.max_sequence_length,
        )
        return Conditioning(embeds, embeds.new_zeros(len(prompts), 0))

    def network(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        # All images have the same positions, so those of the first suffice.
        text_ids = self.pipeline._prepare_text_ids(cond.embeds[:1])[0]
        image_ids = self.pipeline._prepare_latent_ids(x_t[:1])[0]
        output = self.transformer(
            hidden_states=self.pipeline._pack_latents(x_t.to(self.transformer.dtype)),
            encoder_hidden_states=cond.embeds,
            timestep=t,  # this network multiplies it by 1000 itself
            txt_ids=text_ids.to(x_t.device),
            img_ids=image_ids.to(x_t.device),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).reshape(x_t.shape).float()

    def scaled(self, x_0: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, variance = (
            statistics.float()[:, None, None]
            for statistics in (vae.bn.running_mean, vae.bn.running_var)
        )
        latents = x_0 * (variance + vae.config.batch_norm_eps).sqrt() + mean
        unpatchified: Tensor = self.pipeline._unpatchify_latents(latents)
        return unpatchified

    def time_grid(self, steps: int) -> Tensor:
        """Return a uniform grid shifted as the pipeline does for these tokens and steps."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        if not self.pipeline.scheduler.config.use_dynamic_shifting:
            return super().time_grid(steps)
        _, height, width = self.latent_shape
        mu = compute_empirical_mu(height * width, steps)
        return shifted(torch.linspace(1, 0, steps + 1), math.exp(mu))


PLUGIN = ModelPlugin(backbones={"Flux2KleinPipeline": Flux2KleinBackbone})
