"""Protocols: how any checkpoint is judged, pinned by a SHA-256.

A protocol is a YAML file of tafs/evaluation/protocols/, or any other, or a plug-in of an installed
package (entry-point group `tafs.protocols`): the path of such a file, or its content. Its SHA-256
is that of its values with every default filled in, of the prompts, and of the weights behind the
metrics. Neither comments, order, `title` and `batch` nor the file's name and place change it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tafs.assets import lockfile, sources
from tafs.assets.sources import AssetSettings, AssetSource
from tafs.common.plugins import Group
from tafs.common.yaml_files import ConfigError, first_problem, load_yaml, suggestion
from tafs.data import prompts
from tafs.data.prompt_sets import FROM_FILES, Assets, prompt_set
from tafs.data.prompts import Prompt
from tafs.evaluation import choose
from tafs.evaluation.choose import Seeds
from tafs.experiment import needs
from tafs.experiment.schema import JUDGE, Count, Finite, Name, Prompts, Sampler, Seed, Text
from tafs.experiment.specs import BEST, PIPELINE, EvalSetting, EvalSpec, TrajectorySpec
from tafs.models import quantization
from tafs.models.catalog import ClassName
from tafs.models.quantization import Quantization
from tafs.rewards.metrics import METRICS

FOLDER = Path(__file__).parent / "protocols"
ENDINGS = (".yaml", ".yml")
UNPINNED = ("title", "batch")  # keys that decide no image
PLUGINS = Group(kind="protocol", attribute="PROTOCOL")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Guided(_Strict):
    """What a pipeline class is called with."""

    guidance: Annotated[Finite, Field(ge=0)]
    max_sequence_length: Count


class Content(_Strict):
    """The keys of a protocol's file; tafs/evaluation/protocols/shapes.yaml explains them."""

    title: Text = ""
    assets: Assets
    dtype: Literal["float32", "bfloat16"]
    quantize: Quantization = Field(default="none", exclude_if=lambda chosen: chosen == "none")
    prompts: Prompts
    prompts_per_tag: Count | None = None
    images_per_prompt: Count
    metrics: Annotated[dict[Name, str], Field(min_length=1)]
    nfe: Count
    samplers: Annotated[tuple[Sampler, ...], Field(min_length=1)]
    validation_prompts: Count
    pipelines: Annotated[dict[ClassName, Guided], Field(min_length=1)]
    resolution: Count
    batch: Count
    seed: Seed
    validation_seed: Seed


@dataclass(frozen=True)
class Protocol:
    """A protocol with the assets that it names."""

    name: str
    content: Content
    source: AssetSource

    @property
    def metrics(self) -> tuple[str, ...]:
        """Its metrics, in the order of METRICS."""
        return tuple(name for name in METRICS if name in self.content.metrics)

    @property
    def served(self) -> tuple[str, ...]:
        """Those of its metrics that a server computes."""
        if self.content.assets != "hub":
            return ()
        return tuple(name for name in self.metrics if METRICS[name].served)

    @property
    def seeds(self) -> Seeds:
        return Seeds(self.content.seed, self.content.validation_seed)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts that images are judged on."""
        found = self.source.prompts(self.content.prompts, "test")
        return [found[i] for i in prompts.first_of_each(found, self.content.prompts_per_tag)]

    @cached_property
    def pinned(self) -> dict[str, Any]:
        """Everything that the SHA-256 covers."""
        values = self.content.model_dump(mode="json", exclude={*UNPINNED, "prompts"})
        train = self.source.prompts(self.content.prompts, "train")
        validated = choose.validation_prompts(
            train, self.content.validation_prompts, self.content.validation_seed
        )
        return {
            "numerics": needs.NUMERICS,
            **values,
            "prompts": prompts.digest(self.prompts),
            "validation": prompts.digest(validated),
            "weights": {name: self.source.reward_digest(name) for name in self.metrics},
        }

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.pinned, sort_keys=True).encode()).hexdigest()

    def eval_spec(self, published_steps: int | None) -> EvalSpec:
        """How a model is judged.

        Args:
            published_steps: of a model that is compared as published, with its own pipeline; None
                for the others, which take the protocol's samplers and steps.
        """
        content = self.content
        sampler, nfe = PIPELINE, published_steps
        if nfe is None:
            sampler = content.samplers[0] if len(content.samplers) == 1 else BEST
            nfe = content.nfe
        images = content.images_per_prompt
        setting = EvalSetting(sampler=sampler, nfe=nfe, images_per_prompt=images)
        return EvalSpec(
            weights=self.source.digests(self.metrics),
            random_weights=tuple(self.source.random(self.metrics)),
            prompts_per_tag=content.prompts_per_tag,
            batch=content.batch,
            full_steps=nfe,
            resolution=content.resolution,
            served=bool(self.served),
            judge=self.served[0] if self.served else JUDGE,
            trajectories=TrajectorySpec(nfe=nfe, prompts=0),
            samplers=content.samplers,
            validation_prompts=content.validation_prompts,
            settings=(setting,),
        )

    def check_versions(self, records: Sequence[dict[str, str]]) -> None:
        """Refuse metrics of other versions than the protocol pins.

        Raises:
            ConfigError: names the metric and both versions.
        """
        for record in records:
            pinned, found = self.content.metrics[record["name"]], record["version"]
            if pinned != found:
                raise ConfigError(
                    f"protocol {self.name}: metrics.{record['name']}: pins the version {pinned!r}, "
                    f"but {found!r} is installed; correct one of them"
                )


def names() -> list[str]:
    """The shipped protocols, and those of installed packages.

    Raises:
        ValueError: two protocols have the same name; names both.
    """
    shipped, others = {file.stem for file in FOLDER.glob("*.yaml")}, PLUGINS.names()
    for name in shipped.intersection(others):
        raise ConfigError(
            f"protocol {name!r} is defined twice, by {FOLDER / name}.yaml and by "
            f"{PLUGINS.source(name)}; rename or uninstall the second"
        )
    return sorted({*shipped, *others})


def read(name: str, assets: AssetSettings | None = None) -> Protocol:
    """Read a protocol.

    Args:
        name: one of `names`, or the path of a file that ends in .yaml.
        assets: where assets are and what they run on; None: on the CPU for the embedded assets,
            and otherwise on a GPU with the lock file in the current folder.

    Raises:
        ConfigError: an unknown protocol, or a wrong value; one line that names the file and key.
    """
    file, values = _values(name)
    try:
        content = Content.model_validate(values, context={"folder": file.parent})
    except ValidationError as error:
        raise ConfigError(f"{file}: {first_problem(error, Content)}") from None
    if assets is None:
        assets = AssetSettings(
            assets=content.assets,
            lock=str(lockfile.LOCK),
            device="cuda" if content.assets == "hub" else "cpu",
            dtype=content.dtype,
            gradient_checkpointing=False,
        )
    if assets.assets != content.assets:
        raise ConfigError(
            f"{file}: assets: {content.assets!r} are not the {assets.assets!r} of the scale; "
            "choose another scale or protocol"
        )
    own = {"dtype": content.dtype, "quantize": content.quantize, "gradient_checkpointing": False}
    label = file.stem if name.endswith(ENDINGS) else name
    found = Protocol(label, content, sources.of(assets.model_copy(update=own)))
    if problem := _problem(found):
        raise ConfigError(f"{file}: {problem}")
    return found


def _values(name: str) -> tuple[Path, Mapping[str, Any]]:
    """(the file that defines a protocol, its values); errors are those of `read`."""
    if name.endswith(ENDINGS):
        found: Any = Path(name)
    elif name not in names():
        raise ConfigError(
            f"--protocol: unknown protocol {name!r}, and not a .yaml file"
            f"{suggestion(name, names())}"
        )
    elif name in PLUGINS.names():
        found = PLUGINS.load(name)
    else:
        found = FOLDER / f"{name}.yaml"
    if isinstance(found, Path):
        return found, load_yaml(found, dict)
    if isinstance(found, Mapping):
        return PLUGINS.source(name), found
    raise ConfigError(
        f"protocol {name!r}: PROTOCOL in {PLUGINS.source(name)} is neither the path of a YAML file "
        "nor its content; define one of them"
    )


def _problem(protocol: Protocol) -> str | None:
    """What the schema cannot see."""
    content = protocol.content
    if missing := quantization.problem(content.quantize):
        return f"quantize: {missing}"
    available = sources.prompt_sets_of(content.assets)
    if content.prompts not in FROM_FILES and content.prompts not in available:
        hint = suggestion(content.prompts, available)
        return f"prompts: unknown prompt set {content.prompts!r}{hint}"
    if problem := sources.prompt_problem(content.prompts, content.assets):
        return f"prompts: {problem}"
    chosen = prompt_set(content.prompts)
    own = {*protocol.source.metrics(content.prompts, METRICS), *protocol.served}
    for name in content.metrics:
        if name not in METRICS:
            return f"metrics: unknown metric {name!r}{suggestion(name, list(METRICS))}"
        key = METRICS[name].metadata
        if key and key not in chosen.metadata:
            return f"metrics.{name}: needs prompts with the metadata {key!r}; choose other prompts"
        if METRICS[name].quotes and not chosen.quotes:
            return f"metrics.{name}: needs a text in double quotes in every prompt; choose others"
        if name not in own:
            return f"metrics.{name}: is not available with the assets {content.assets!r}"
    if len(protocol.served) > 1:
        first, other = protocol.served[:2]
        return (
            f"metrics.{other}: needs a server, as {first} does; a protocol has one, remove either"
        )
    return None
