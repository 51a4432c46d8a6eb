"""Backbones on small checkpoints, and the images of diffusers' own pipelines as the reference."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

from tafs.common import seeding
from tafs.models import Backbone, catalog, loading, sampling
from tafs.shapes import weights
from tafs.shapes.scenes import IMAGE_SIZE

EMBEDDED = ("shapes-sd3", "shapes-flux")
PROMPTS = ["a red ring left of a blue square", "two crosses"]
STEPS = 4


@dataclass(frozen=True)
class Checkpoint:
    """A pipeline folder, and the settings that its backbone is loaded with."""

    backbone: type[Backbone]
    folder: Path
    settings: dict[str, Any] = field(
        default_factory=lambda: {"resolution": 64, "guidance": 4.0, "max_sequence_length": 16}
    )

    def load(self, **settings: Any) -> Backbone:
        return self.backbone.load(self.folder, **(self.settings | settings))

    def adapted(self, alpha: int = 8, **settings: Any) -> Backbone:
        """With an adapter of rank 4 that changes the network's output."""
        backbone = self.load(**settings)
        backbone.add_lora(4, alpha, seeding.generator(0, "lora"))
        with torch.no_grad():
            for name, parameter in backbone.lora_parameters().items():
                if "lora_B" in name:
                    values = torch.empty(parameter.shape)
                    parameter.copy_(values.normal_(std=0.2, generator=seeding.generator(1, name)))
        return backbone

    def pipeline(self) -> DiffusionPipeline:
        """The plain pipeline, with Euler's method if its own scheduler is a multistep solver."""
        pipeline = DiffusionPipeline.from_pretrained(
            self.folder, dtype=torch.float32, local_files_only=True
        )
        if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            shift = pipeline.scheduler.config.flow_shift
            pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def embedded(name: str) -> Checkpoint:
    """An embedded model, as shipped."""
    shipped = weights.verify(name)
    settings = {"resolution": IMAGE_SIZE, "guidance": 3.0, "max_sequence_length": 10}
    return Checkpoint(catalog.backbones()[loading.pipeline_class(shipped)], shipped, settings)


def noise_for(backbone: Backbone) -> Tensor:
    shape = (len(PROMPTS), *backbone.latent_shape)
    return torch.randn(shape, generator=seeding.generator(0, "start"))


@torch.no_grad()
def our_images(backbone: Backbone) -> Tensor:
    cond = backbone.encode(PROMPTS)
    x_0 = sampling.integrate(
        lambda x, t: backbone.velocity(x, t, cond),
        noise_for(backbone),
        backbone.time_grid(STEPS),
        sampling.ode,
        torch.Generator(),
    )
    return backbone.decode(x_0)


def their_images(backbone: Backbone, pipeline: DiffusionPipeline) -> Tensor:
    """The images of the plain pipeline from the same noise."""
    latents = noise_for(backbone)
    if isinstance(pipeline, FluxPipeline):  # the others pack latents themselves
        latents = pipeline._pack_latents(latents, *latents.shape)
    # SANA's call otherwise rewrites prompts and resolutions.
    off = {"complex_human_instruction": None, "use_resolution_binning": False}
    known = inspect.signature(type(pipeline).__call__).parameters
    return pipeline(
        prompt=PROMPTS,
        num_inference_steps=STEPS,
        sigmas=[1 - n / STEPS for n in range(STEPS)],
        guidance_scale=backbone.guidance,
        height=backbone.resolution,
        width=backbone.resolution,
        latents=latents,
        max_sequence_length=backbone.max_sequence_length,
        output_type="pt",
        **{name: value for name, value in off.items() if name in known},
    ).images
