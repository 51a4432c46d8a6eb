"""The models that are compared as they are: models.yaml -> a diffusers pipeline -> images.

Their images come from the pipeline's own call with its own scheduler.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tafs.models.catalog import Model

# What `ReferencePipeline.generate` gives every pipeline itself.
GIVEN = (
    "prompt",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "max_sequence_length",
    "generator",
    "output_type",
)


class ReferencePipeline:
    """One loaded model."""

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
        """Read a model; `folders` are its resources' by name.

        Raises:
            FileNotFoundError: a resource has no folder, or the folder lacks a file; names it.
            ValueError: the folder holds another pipeline than the model's, or the pipeline takes
                none of its `arguments`; names them.
        """
        for name in model.resources:
            if name not in folders:
                raise FileNotFoundError(f"{name}: {model.title} needs this resource's folder")
        folder = folders[model.resource]
        _check_kind(folder, model.pipeline)
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

    @torch.no_grad()
    def generate(
        self,
        texts: Sequence[str],
        generators: Sequence[torch.Generator],
        steps: int | None = None,
    ) -> Tensor:
        """Images of the prompts, [len(texts), 3, resolution, resolution] in [0, 1], float32.

        Args:
            texts: prompts, an image each.
            steps: by default the model's own number.
            generators: of each image its own, from which all of its noise is drawn.

        Raises:
            ValueError: the numbers of prompts and generators differ, or the pipeline draws at
                other resolutions only; names it.
        """
        if len(texts) != len(generators):
            raise ValueError(f"{len(texts)} prompts and {len(generators)} generators")
        _draw_noise_from(self.pipeline.scheduler, list(generators))
        images = self.pipeline(
            list(texts),
            height=self.resolution,
            width=self.resolution,
            num_inference_steps=steps or self.model.steps,
            guidance_scale=self.model.guidance,
            max_sequence_length=self.model.max_sequence_length,
            generator=list(generators),
            output_type="pt",
            **self.model.arguments,
        ).images
        height, width = images.shape[-2:]
        if (height, width) != (self.resolution, self.resolution):
            raise ValueError(
                f"resolution: {self.model.title} draws {width} x {height} where {self.resolution} "
                f"is asked; set it to {width}"
            )
        return images.float()


def _check_kind(folder: Path, kind: str) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{index}: not found; {folder} is no diffusers pipeline folder")
    found = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    if found != kind:
        raise ValueError(f"{index}: holds a {found!r} where models.yaml says {kind!r}")


def _check_arguments(model: Model) -> None:
    known = inspect.signature(getattr(diffusers, model.pipeline).__call__).parameters
    for name in model.arguments:
        if name not in known or name in GIVEN:
            raise ValueError(f"arguments: {name!r} cannot be set for a {model.pipeline}")


def _fourth_text_encoder(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """HiDream-I1's Llama, which its own folder names but does not hold."""
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config}: not found; {folder} holds no text encoder")
    return {
        "text_encoder_4": LlamaForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            # The pipeline asks for its attention maps, which only this implementation returns.
            attn_implementation="eager",
        ),
        "tokenizer_4": PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True),
    }


def _merge(pipeline: Any, file: Path, scale: float) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such adapter")
    pipeline.load_lora_weights(
        file.parent, weight_name=file.name, local_files_only=True, use_safetensors=True
    )
    pipeline.fuse_lora(components=["transformer"], lora_scale=scale)
    pipeline.unload_lora_weights()


def _draw_noise_from(scheduler: Any, generators: list[torch.Generator]) -> None:
    """Let the scheduler's steps draw from the images' generators.

    Not every pipeline hands them on; HiDream-I1-Fast's noise would come from the global generator.
    """
    step = type(scheduler).step
    if "generator" in inspect.signature(step).parameters:
        scheduler.step = functools.partial(step, scheduler, generator=generators)
