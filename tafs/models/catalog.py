"""The catalogue: all models that are trained or compared, from models.yaml and from plug-ins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tafs.common import yaml_files
from tafs.common.plugins import Group
from tafs.data.prompt_sets import Assets
from tafs.models.base import Backbone

FILE = Path(__file__).parent / "models.yaml"
GUIDANCE = "guidance_scale"  # what most pipelines call it

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,63}$")]  # dots separate parts of run names
Resource = Annotated[str, Field(pattern=r"^[a-z][a-z0-9.-]{0,63}$")]  # of resources.yaml
ClassName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*\.safetensors$")]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Adapter(_Strict):
    """A LoRA adapter that is merged into the transformer's weights."""

    resource: Resource
    file: FileName
    scale: Annotated[float, Field(gt=0)]


class Model(_Strict):
    """One entry of models.yaml; the comments there explain the keys."""

    title: str
    short: str = ""
    assets: Assets = "hub"
    resource: Resource
    pipeline: ClassName
    lora: Adapter | None = None
    text_encoder: Resource | None = None
    trainable: bool = False
    steps: Count
    guidance: Annotated[float, Field(ge=0)] | None
    # Left out where it is the usual one, so that earlier results stay what they are.
    guidance_argument: str = Field(default=GUIDANCE, exclude_if=lambda name: name == GUIDANCE)
    max_sequence_length: Count | None
    resolution: Count | None = None
    arguments: dict[str, Any] = {}
    licence: str

    @model_validator(mode="after")
    def _trained_as_given(self) -> Model:
        if self.trainable and None in (self.guidance, self.max_sequence_length):
            raise ValueError("guidance, max_sequence_length: training needs numbers, not null")
        return self

    @property
    def conditioning(self) -> tuple[float, int]:
        """(guidance, max_sequence_length) of a model that a backbone samples.

        Raises:
            ValueError: one of them is null; names the model.
        """
        if self.guidance is None or self.max_sequence_length is None:
            raise ValueError(
                f"guidance, max_sequence_length: {self.title} needs numbers for its backbone, not "
                "null"
            )
        return self.guidance, self.max_sequence_length

    @property
    def resources(self) -> tuple[str, ...]:
        """The resources that the model needs, its pipeline's first."""
        lora = self.lora.resource if self.lora else None
        return tuple(name for name in (self.resource, lora, self.text_encoder) if name)

    def settings(self) -> dict[str, Any]:
        """Return what run.json records: all that decides its images.

        A trainable model's `steps` are left out: runs set their own.
        """
        left_out = {"title", "short", "assets", "licence", *(["steps"] if self.trainable else [])}
        return self.model_dump(mode="json", exclude=left_out)


class _Models(BaseModel):
    models: dict[Name, Model]


@dataclass(frozen=True)
class ModelPlugin:
    """What a model plug-in adds: the object PLUGIN of its module.

    Args:
        models: entries of the catalogue, by name: a YAML file with the keys of models.yaml, or
            its content.
        backbones: the classes that train pipelines, by the name of the diffusers pipeline class.
    """

    models: Path | Mapping[str, Any] = field(default_factory=dict)
    backbones: Mapping[str, type[Backbone]] = field(default_factory=dict)


PLUGINS = Group(kind="model", attribute="PLUGIN", package="tafs.models.plugins")


def plugins() -> dict[str, ModelPlugin]:
    """Import all model plug-ins and return them by name.

    Raises:
        ValueError: a plug-in cannot be imported or its PLUGIN is not a `ModelPlugin`; names it.
    """
    found = {name: PLUGINS.load(name) for name in PLUGINS.names()}
    for name, plugin in found.items():
        if not isinstance(plugin, ModelPlugin):
            raise ValueError(
                f"model plug-in {name!r}: PLUGIN in {PLUGINS.source(name)} is not a "
                "tafs.models.ModelPlugin; create one there"
            )
    return found


@cache
def backbones() -> dict[str, type[Backbone]]:
    """Return the backbone classes by the name of the diffusers pipeline class that they train.

    Raises:
        ValueError: as for `plugins`, or two plug-ins train the same pipeline class; names both.
    """
    found: dict[str, type[Backbone]] = {}
    for name, plugin in plugins().items():
        for pipeline, backbone in plugin.backbones.items():
            other = found.setdefault(pipeline, backbone)
            if other is not backbone:
                raise ValueError(
                    f"{pipeline} has two backbones, {other.__module__}.{other.__name__} and "
                    f"{backbone.__module__}.{backbone.__name__} of the model plug-in {name!r}; "
                    "remove one of them"
                )
    return found


@cache
def read() -> dict[str, Model]:
    """Return all models by name: those of models.yaml in its order, then those of plug-ins.

    Raises:
        ValueError: an entry is wrong or defined twice, or a plug-in is broken; names it.
    """
    models = read_file(FILE)
    source = dict.fromkeys(models, str(FILE))
    for name, plugin in plugins().items():
        if isinstance(plugin.models, Path):
            where, found = str(plugin.models), read_file(plugin.models)
        else:
            where = f"{PLUGINS.source(name)}: models"
            found = _parse(plugin.models, where)
        for key in found:
            if key in models:
                raise yaml_files.ConfigError(
                    f"{where}: {key!r} is also defined in {source[key]}; rename one of them"
                )
            source[key] = where
        models |= found
    for key, model in models.items():
        if model.trainable and model.pipeline not in backbones():
            raise yaml_files.ConfigError(
                f"{source[key]}: {key}.trainable: no backbone trains a {model.pipeline} "
                f"(available: {', '.join(sorted(backbones()))}); write one with "
                "`python -m tafs.models.template`"
            )
    return models


def read_file(path: Path) -> dict[str, Model]:
    """Return the models of one YAML file, in the file's order.

    Raises:
        ConfigError: the file is not such a catalogue; one line that names the file and the key.
    """
    return _parse(yaml_files.load_yaml(path, dict), str(path))


def _parse(content: Mapping[str, Any], where: str) -> dict[str, Model]:
    try:
        return _Models(models=dict(content)).models
    except ValidationError as error:
        problem = yaml_files.first_problem(error, _Models).replace("models.", "", 1)
        raise yaml_files.ConfigError(f"{where}: {problem}") from None
