"""The models that are trained or compared, as data: models.yaml beside this file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

FILE = Path(__file__).parent / "models.yaml"

Name = Annotated[str, Field(pattern="^[a-z][a-z0-9._-]{0,63}$")]  # of an entry of resources.yaml


class Lora(BaseModel):
    """A distilled model's adapter on its base model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    resource: Name
    file: str
    scale: float = 1.0


class Model(BaseModel):
    """How a model is sampled, as its card says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    world: Literal["shapes", "hub"] = "hub"
    resource: Name  # of resources.yaml, or an embedded model
    pipeline: str  # diffusers' class
    lora: Lora | None = None
    text_encoder: Name | None = None  # a resource that the pipeline's own folder lacks
    trainable: bool = False  # a backbone drives it; others are compared as they are
    steps: Annotated[int, Field(ge=1)]
    guidance: float
    max_sequence_length: Annotated[int, Field(ge=1)]
    licence: str

    def settings(self, steps: int | None = None) -> dict[str, Any]:
        """What run.json says of it; `steps` replaces its own."""
        return {
            "guidance": self.guidance,
            "max_sequence_length": self.max_sequence_length,
            "steps": steps or self.steps,
            "trainable": self.trainable,
        }


@cache
def read(path: Path = FILE) -> dict[str, Model]:
    """Every model by name.

    Raises:
        config.ConfigError: one line that names the file, the model and the key.
    """
    from tafs import config

    raw = config.load_yaml(path, dict)
    try:
        return TypeAdapter(dict[Name, Model]).validate_python(raw)
    except ValidationError as error:
        problem = config.first_problem(error, list(Model.model_fields))
        raise config.ConfigError(f"{path}: {problem}") from None
