"""config.yaml -> a list of Runs. Every mistake gives one line that names its key and the remedy."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
BASE = "base"  # the untrained model's place among the methods

Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Count = Annotated[int, Field(ge=1)]


class ConfigError(ValueError):
    """A mistake in config.yaml, in one line."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Lora(_Strict):
    rank: Count
    alpha: Count


class Evaluation(_Strict):
    """Which samplers and step counts a trained model is judged with."""

    images_per_prompt: Count
    prompts: Count | None = None  # the first so many of each task; None takes all
    table_nfe: tuple[Count, ...]  # steps that the tables print, with every sampler
    curve_nfe: tuple[Count, ...]  # steps of the curves, with the method's own sampler
    curve_images_per_prompt: Count
    base_nfe: Count  # the base model's full steps
    batch: Count  # images at once; sampling takes less memory than training


class Scale(_Strict):
    """Which models and budgets; never how."""

    world: Literal["shapes"]
    backbones: tuple[Name, ...]
    iterations: Count
    prompts_per_iteration: Count
    group_size: Annotated[int, Field(ge=2)]
    seeds: tuple[Annotated[int, Field(ge=0)], ...]
    micro_batch: Count
    checkpoint_every: Count
    lora: Lora
    resolution: Count  # of the images, in pixels
    guidance: float = 1.0
    max_sequence_length: Count
    evaluation: Evaluation


class Task(_Strict):
    """Rewards with their weights, on the training scale of each reward."""

    rewards: dict[Name, Annotated[float, Field(gt=0)]]


class Experiment(_Strict):
    """The systems that a table compares."""

    task: Name
    methods: tuple[Name, ...]


class Tuning(_Strict):
    """The search: a grid a method, all of the same size, on a seed that no table uses."""

    task: Name
    seed: Annotated[int, Field(ge=0)]
    grids: dict[Name, dict[Name, tuple[float, ...]]]


class Variant(BaseModel):
    """A method with its hyperparameters, which the method's own file declares and checks."""

    model_config = ConfigDict(extra="allow", frozen=True)
    method: Name | None = None  # the method's file; by default the variant's own name


class Config(_Strict):
    scale: Name
    results: str = "results"
    scales: dict[Name, Scale]
    tasks: dict[Name, Task]
    methods: dict[Name, Variant | None]
    experiments: dict[Name, Experiment]
    tuning: Tuning | None = None

    @property
    def active(self) -> Scale:
        return self.scales[self.scale]


@dataclass(frozen=True)
class Run:
    """One training run, or the evaluation of a base model."""

    name: str
    variant: str  # key in config.yaml's methods, or BASE
    method: str  # the method's file name, or BASE
    title: str
    task: str
    backbone: str
    seed: int
    scale: str
    settings: Mapping[str, Any]  # of the scale
    rewards: Mapping[str, float]
    hyperparameters: Mapping[str, Any]

    @property
    def trained(self) -> bool:
        return self.method != BASE

    def describe(self) -> dict[str, Any]:
        """What run.json holds."""
        from tafs import method as methods

        out: dict[str, Any] = {
            "name": self.name,
            "variant": self.variant,
            "method": self.method,
            "title": self.title,
            "task": self.task,
            "backbone": self.backbone,
            "seed": self.seed,
            "scale": self.scale,
            "settings": dict(self.settings),
            "rewards": dict(self.rewards),
            "hyperparameters": dict(self.hyperparameters),
            "sampler": "ode",
            "nfe_old": None,
            "nfe_theta": None,
            "iterations": 0,
        }
        if self.trained:
            algorithm = methods.create(self.method, dict(self.hyperparameters))
            out |= {
                "sampler": algorithm.evaluation_sampler,
                "nfe_old": algorithm.nfe_old,
                "nfe_theta": algorithm.nfe_theta,
                "iterations": self.settings["iterations"],
            }
        return out


def to_json(value: Mapping[str, Any]) -> str:
    """The one form in which descriptions are written and compared."""
    return json.dumps(value, sort_keys=True)


def fingerprint(description: Mapping[str, Any], *files: Path) -> str:
    """SHA-256 over what decides a run's outcome: its description and its method's source."""
    digest = hashlib.sha256(to_json(description).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


# -- reading -----------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML that refuses duplicate keys and reads 3e-4 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int)):
                raise ConfigError(f"line {key_node.start_mark.line + 1}: {key!r} is no plain key")
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read and check config.yaml; `overrides` replaces top-level keys, such as the scale.

    Raises:
        ConfigError: one line that names the file, the key and the remedy.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    try:
        raw = yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: is not YAML ({_yaml_problem(error)})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds no mapping of keys to values")
    return check({**raw, **(overrides or {})}, str(path))


def check(raw: Mapping[str, Any], source: str = "config.yaml") -> Config:
    """Check a mapping read from config.yaml; see `read`."""
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first_problem(error)}") from None
    problem = _inconsistency(config)
    if problem:
        raise ConfigError(f"{source}: {problem}")
    return config


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or type(error).__name__
    return f"line {mark.line + 1}: {problem}" if mark else str(problem)


def _first_problem(error: ValidationError) -> str:
    """The first mistake as `key.path: what is wrong (remedy)`."""
    problems = error.errors()
    # A misspelt key is both unknown and missing: what was written says more.
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path = ".".join(str(part) for part in first["loc"]).encode("unicode_escape").decode()
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"])
        return f"unknown key {path!r}{_suggestion(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"missing key {path!r}"
    shown = repr(first["input"])
    value = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{path}: {first['msg'][0].lower() + first['msg'][1:]} (got {value})"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Names that are allowed where an unknown key stands."""
    models: dict[str, type[BaseModel]] = {
        "scales": Scale,
        "tasks": Task,
        "experiments": Experiment,
        "lora": Lora,
        "evaluation": Evaluation,
    }
    for part in reversed(location[:-1]):
        if part in models:
            return list(models[str(part)].model_fields)
    return list(Config.model_fields)


def _suggestion(name: str, available: list[str]) -> str:
    close = difflib.get_close_matches(name, available, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f" (available: {', '.join(sorted(available))})"


def _inconsistency(config: Config) -> str | None:
    """What pydantic cannot see: names that point to nothing, hyperparameters, numbers of no use."""
    from tafs import method as methods
    from tafs.rewards import METRICS

    if config.scale not in config.scales:
        return (
            f"scale: unknown scale {config.scale!r}{_suggestion(config.scale, list(config.scales))}"
        )
    for name, task in config.tasks.items():
        for reward, weight in task.rewards.items():
            if reward not in METRICS:
                hint = _suggestion(reward, list(METRICS))
                return f"tasks.{name}.rewards: unknown reward {reward!r}{hint}"
            if not math.isfinite(weight):
                return f"tasks.{name}.rewards.{reward}: {weight} is not a finite number"
        if not task.rewards:
            return f"tasks.{name}.rewards: at least one reward is needed"
    for variant, settings in config.methods.items():
        if variant == BASE:
            return f"methods.{BASE}: the name is taken by the untrained model"
        name, parameters = _method_of(variant, settings)
        try:
            methods.create(name, parameters)
        except (ValueError, TypeError) as error:
            return f"methods.{variant}: {error}"
    for name, experiment in config.experiments.items():
        if experiment.task not in config.tasks:
            return (
                f"experiments.{name}.task: unknown task {experiment.task!r}"
                f"{_suggestion(experiment.task, list(config.tasks))}"
            )
        for variant in experiment.methods:
            if variant not in config.methods:
                return (
                    f"experiments.{name}.methods: unknown method {variant!r}"
                    f"{_suggestion(variant, list(config.methods))}"
                )
    if config.tuning is not None:
        return _tuning_inconsistency(config, config.tuning)
    return None


def _tuning_inconsistency(config: Config, tuning: Tuning) -> str | None:
    trained = {v for e in config.experiments.values() if e.task == tuning.task for v in e.methods}
    for variant in tuning.grids:
        if variant not in trained:
            return (
                f"tuning.grids: no experiment trains {variant!r} on {tuning.task!r}"
                f"{_suggestion(variant, sorted(trained))}"
            )
    sizes = {v: math.prod(len(values) for values in g.values()) for v, g in tuning.grids.items()}
    if len(set(sizes.values())) > 1:
        return f"tuning.grids: the methods get different numbers of trials ({sizes})"
    if any(tuning.seed in scale.seeds for scale in config.scales.values()):
        return f"tuning.seed: {tuning.seed} is one of the tables' seeds; choose another"
    return None


def _method_of(variant: str, settings: Variant | None) -> tuple[str, dict[str, Any]]:
    """(file name, hyperparameters) of a variant."""
    if settings is None:
        return variant, {}
    return settings.method or variant, dict(settings.model_extra or {})


# -- runs --------------------------------------------------------------------------------------


def runs(config: Config) -> dict[str, Run]:
    """Every run of the active scale's experiments, by name; shared runs appear once."""
    from tafs import method as methods

    scale = config.active
    settings = scale.model_dump(mode="json")
    found: dict[str, Run] = {}
    for backbone in scale.backbones:
        name = f"{BASE}.{backbone}"
        found[name] = Run(
            name, BASE, BASE, backbone, "", backbone, 0, config.scale, settings, {}, {}
        )
        for experiment in config.experiments.values():
            for variant in experiment.methods:
                method, parameters = _method_of(variant, config.methods[variant])
                for seed in scale.seeds:
                    name = f"{variant}.{experiment.task}.{backbone}.{seed}"
                    found[name] = Run(
                        name=name,
                        variant=variant,
                        method=method,
                        title=methods.method_class(method).TITLE or variant,
                        task=experiment.task,
                        backbone=backbone,
                        seed=seed,
                        scale=config.scale,
                        settings=settings,
                        rewards=config.tasks[experiment.task].rewards,
                        hyperparameters=parameters,
                    )
    return found
