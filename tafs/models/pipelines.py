"""Models that are compared as published: their own diffusers pipelines with their schedulers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tafs.common.torchvision_patch  # noqa: F401  # isort: skip
import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tafs.models import adapters
from tafs.models.catalog import Model
from tafs.models.loading import pipeline_class

# The arguments of a pipeline's call that `ReferencePipeline.generate` sets itself, besides those of
# `_of_entry`.
GIVEN = ("prompt", "height", "width", "num_inference_steps", "generator", "output_type")


class ReferencePipeline:
    """A loaded model of the catalogue that is only sampled."""

    def __init__(self, model: Model, pipeline: DiffusionPipeline, resolution: int) -> None:
        self.model = model
        self.pipeline = pipeline
        self.resolution = resolution  # of the images, in pixels

    @classmethod
    def load(
        cls,
        model: Model,
        folders: Mapping[str, Path],
        *,
        resolution: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> Self:
        """Load a model.

        Args:
            model: the catalogue's entry.
            folders: the folders of its resources, by name.
            resolution: of the images, in pixels.
            device, dtype: of all modules.

        Raises:
            FileNotFoundError: a resource has no folder, or the folder lacks a file; names it.
            ValueError: the folder holds another pipeline than the entry says, or the pipeline does
                not take an argument of the entry; names it.
        """
        for name in model.resources:
            if name not in folders:
                raise FileNotFoundError(
                    f"{name}: {model.title} needs this resource; add it to resources.yaml"
                )
        folder = folders[model.resource]
        if (found := pipeline_class(folder)) != model.pipeline:
            raise ValueError(
                f"{folder / 'model_index.json'}: holds a {found!r}, but `pipeline` of "
                f"{model.title} is {model.pipeline!r}; correct the entry"
            )
        _check_arguments(model)
        components = {}
        if model.text_encoder:
            components = _fourth_text_encoder(folders[model.text_encoder], dtype)
        pipeline = DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, **components
        )
        if model.lora:
            _merge(pipeline, folders[model.lora.resource] / model.lora.file, model.lora.scale)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.vae.enable_slicing()
        return cls(model, pipeline.to(device), resolution)

    def load_adapter(self, file: Path) -> None:
        """Load an adapter that `adapters.write` wrote; it stays separate. See `adapters.attach`."""
        adapters.restore_precision(self.pipeline, file, adapters.attach(self.pipeline, file))

    @torch.no_grad()
    def generate(
        self,
        texts: Sequence[str],
        generators: Sequence[torch.Generator],
        steps: int | None = None,
    ) -> Tensor:
        """Generate an image per prompt, [len(texts), 3, resolution, resolution] in [0, 1].

        Args:
            texts: the prompts.
            generators: one per image, the source of all of its noise.
            steps: the number of steps; by default that of the catalogue.

        Raises:
            ValueError: the numbers of prompts and generators differ, or the pipeline generates
                images of another resolution.
        """
        if len(texts) != len(generators):
            raise ValueError(f"{len(texts)} prompts and {len(generators)} generators")
        _draw_noise_from(self.pipeline.scheduler, list(generators))
        images = self.pipeline(
            prompt=list(texts),
            height=self.resolution,
            width=self.resolution,
            num_inference_steps=steps or self.model.steps,
            generator=list(generators),
            output_type="pt",
            **_of_entry(self.model),
            **self.model.arguments,
        ).images
        height, width = images.shape[-2:]
        if (height, width) != (self.resolution, self.resolution):
            raise ValueError(
                f"resolution: {self.model.title} generates {width} x {height} pixels instead of "
                f"{self.resolution}; set its `resolution` to {width}"
            )
        return images.float()


def _of_entry(model: Model) -> dict[str, Any]:
    """Guidance and length of prompts as arguments of the pipeline's call, unless they are null."""
    named = {
        model.guidance_argument: model.guidance,
        "max_sequence_length": model.max_sequence_length,
    }
    return {name: value for name, value in named.items() if value is not None}


def _check_arguments(model: Model) -> None:
    pipeline = getattr(diffusers, model.pipeline, None)
    if pipeline is None:
        raise ValueError(f"pipeline: diffusers has no {model.pipeline!r}; correct {model.title}")
    known = inspect.signature(pipeline.__call__).parameters
    for name in GIVEN:
        if name not in known:
            raise ValueError(
                f"pipeline: a {model.pipeline} takes no {name!r}, which {model.title} needs"
            )
    entry = _of_entry(model)
    for name in entry:
        if name not in known:
            key = "max_sequence_length" if name == "max_sequence_length" else "guidance"
            like = ("length",) if key == name else ("guidance", "cfg")
            others = ", ".join(other for other in known if any(part in other for part in like))
            remedy = "" if key == name else " or `guidance_argument` to one of these names"
            raise ValueError(
                f"{key}: a {model.pipeline} takes no {name!r} (similar: {others or 'none'}); set "
                f"`{key}` of {model.title} to null{remedy}"
            )
    for name in model.arguments:
        if name not in known or name in GIVEN or name in entry:
            raise ValueError(f"arguments: {name!r} cannot be set for a {model.pipeline}")


def _fourth_text_encoder(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Load the Llama of HiDream-I1, which its pipeline folder names but does not hold."""
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config}: not found; {folder} does not hold a text encoder")
    return {
        "text_encoder_4": LlamaForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            # The pipeline needs attention maps, which only this implementation returns.
            attn_implementation="eager",
        ),
        # Some repositories of this model pad on the left, Meta's own on the right.
        "tokenizer_4": PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True, padding_side="right"
        ),
    }


def _merge(pipeline: Any, file: Path, scale: float) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: adapter not found; download its resource again")
    pipeline.load_lora_weights(
        file.parent, weight_name=file.name, local_files_only=True, use_safetensors=True
    )
    pipeline.fuse_lora(components=["transformer"], lora_scale=scale)
    pipeline.unload_lora_weights()


def _draw_noise_from(scheduler: Any, generators: list[torch.Generator]) -> None:
    """Make the scheduler's steps draw from the images' generators.

    Some pipelines do not pass them on: HiDream-I1-Fast would draw from the global generator.
    """
    step = type(scheduler).step
    if "generator" in inspect.signature(step).parameters:
        scheduler.step = functools.partial(step, scheduler, generator=generators)
