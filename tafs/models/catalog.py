"""The models that are trained or compared, as data: models.yaml beside this file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

FILE = Path(__file__).parent / "models.yaml"

Pipeline = Literal[
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "SanaPipeline",
    "SanaSprintPipeline",
    "HiDreamImagePipeline",
]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,63}$")]  # dots part the names of runs
Resource = Annotated[str, Field(pattern=r"^[a-z][a-z0-9.-]{0,63}$")]  # of resources.yaml
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*\.safetensors$")]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Adapter(_Strict):
    """A LoRA for the pipeline's transformer, merged into its weights."""

    resource: Resource
    file: FileName
    scale: Annotated[float, Field(gt=0)]


class Model(_Strict):
    """One entry of models.yaml; its comments say what each key is."""

    title: str
    short: str = ""
    world: Literal["shapes", "hub"] = "hub"
    resource: Resource
    pipeline: Pipeline
    lora: Adapter | None = None
    text_encoder: Resource | None = None
    trainable: bool = False
    steps: Count
    guidance: Annotated[float, Field(ge=0)]
    max_sequence_length: Count
    resolution: Count | None = None
    arguments: dict[str, Any] = {}
    licence: str

    @property
    def resources(self) -> tuple[str, ...]:
        """The folders that it needs, the pipeline's own first."""
        lora = self.lora.resource if self.lora else None
        return tuple(name for name in (self.resource, lora, self.text_encoder) if name)

    def settings(self) -> dict[str, Any]:
        """What run.json says of it: all that decides its images, but for a base model's steps."""
        left_out = {"title", "short", "world", "licence"} | ({"steps"} if self.trainable else set())
        return self.model_dump(mode="json", exclude=left_out)


class _Models(BaseModel):
    models: dict[Name, Model]


@cache
def read(path: Path = FILE) -> dict[str, Model]:
    """Every model by name, in the file's order.

    Raises:
        config.ConfigError: one line that names the file, the model and the key.
    """
    from tafs.common import yaml_files

    try:
        return _Models(models=yaml_files.load_yaml(path, dict)).models
    except ValidationError as error:
        problem = yaml_files.first_problem(error, _known_keys(error)).replace("models.", "", 1)
        raise yaml_files.ConfigError(f"{path}: {problem}") from None


def _known_keys(error: ValidationError) -> list[str]:
    """What is allowed where the first unknown key stands."""
    unknown = (p["loc"] for p in error.errors() if p["type"] == "extra_forbidden")
    inside_lora = "lora" in next(unknown, ())[2:-1]
    return list((Adapter if inside_lora else Model).model_fields)
