"""The models that are only judged: models.yaml -> a diffusers pipeline -> images.

A model is data: which pipeline, with which adapter and text encoder, called how. Its images come
from the pipeline's own call with its own scheduler.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import diffusers
import torch
from diffusers import DiffusionPipeline
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from tafs.config import ConfigError, Count, first_problem, load_yaml

Pipeline = Literal[
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "SanaPipeline",
    "SanaSprintPipeline",
    "HiDreamImagePipeline",
]
# Of a model and of a resource, a folder: "sana-1.5".
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9.-]{0,63}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*\.safetensors$")]
# What `Zoo.generate` gives every pipeline itself.
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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Adapter(_Strict):
    """A LoRA for the pipeline's transformer, merged into its weights."""

    resource: Name
    file: FileName
    scale: Annotated[float, Field(gt=0)]


class Model(_Strict):
    """One entry of models.yaml; its comments say what each key is."""

    title: str
    resource: Name
    pipeline: Pipeline
    lora: Adapter | None = None
    text_encoder: Name | None = None
    steps: Count
    guidance: Annotated[float, Field(ge=0)]
    max_sequence_length: Count
    arguments: dict[str, Any] = {}
    licence: str

    @property
    def resources(self) -> tuple[str, ...]:
        """The folders that it needs, the pipeline's own first."""
        lora = self.lora.resource if self.lora else None
        return tuple(name for name in (self.resource, lora, self.text_encoder) if name)


class _Models(BaseModel):
    models: dict[Name, Model]


def read(path: Path) -> dict[str, Model]:
    """The models of models.yaml by name, in its order.

    Raises:
        ConfigError: one line that names the file, the key and the remedy.
    """
    try:
        return _Models(models=load_yaml(path, dict)).models
    except ValidationError as error:
        problem = first_problem(error, _known_keys(error)).replace("models.", "", 1)
        raise ConfigError(f"{path}: {problem}") from None


def _known_keys(error: ValidationError) -> list[str]:
    """What is allowed where the first unknown key stands."""
    unknown = (p["loc"] for p in error.errors() if p["type"] == "extra_forbidden")
    inside_lora = "lora" in next(unknown, ())[2:-1]
    return list((Adapter if inside_lora else Model).model_fields)


class Zoo:
    """One loaded model."""

    def __init__(self, model: Model, pipeline: DiffusionPipeline) -> None:
        self.model = model
        self.pipeline = pipeline

    @classmethod
    def load(
        cls,
        model: Model,
        folders: Mapping[str, Path],
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
        return cls(model, pipeline.to(device))

    @torch.no_grad()
    def generate(
        self, texts: Sequence[str], resolution: int, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Images of the prompts, [len(texts), 3, resolution, resolution] in [0, 1], float32.

        Args:
            texts: prompts, an image each.
            resolution: in pixels.
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
            height=resolution,
            width=resolution,
            num_inference_steps=self.model.steps,
            guidance_scale=self.model.guidance,
            max_sequence_length=self.model.max_sequence_length,
            generator=list(generators),
            output_type="pt",
            **self.model.arguments,
        ).images
        if images.shape[-2:] != (resolution, resolution):
            height, width = images.shape[-2:]
            raise ValueError(
                f"resolution: {self.model.title} draws {width} x {height} where {resolution} is "
                f"asked; set it to {width}"
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
    pipeline.load_lora_weights(file.parent, weight_name=file.name, local_files_only=True)
    pipeline.fuse_lora(components=["transformer"], lora_scale=scale)
    pipeline.unload_lora_weights()


def _draw_noise_from(scheduler: Any, generators: list[torch.Generator]) -> None:
    """Let the scheduler's steps draw from the images' generators.

    Not every pipeline hands them on; HiDream-I1-Fast's noise would come from the global generator.
    """
    step = type(scheduler).step
    if "generator" in inspect.signature(step).parameters:
        scheduler.step = functools.partial(step, scheduler, generator=generators)
