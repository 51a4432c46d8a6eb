"""runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tafs.experiment.schema import Config, Evaluation, Experiment, Scale, Variant
from tafs.models import catalog
from tafs.runtime.run_dir import BASE

# Shares of the reference method's training compute at which models are kept for the comparison.
MARKS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Run:
    """One training run, or the evaluation of a base model."""

    name: str
    variant: str  # key in config.yaml's methods, or BASE
    method: str  # the method's file name, or BASE
    title: str
    task: str
    prompts: str  # the prompt set: it trains on one part of it and is judged on the other
    backbone: str
    model: Mapping[str, Any]  # guidance, max_sequence_length and the full steps of the backbone
    seed: int
    scale: str
    settings: Mapping[str, Any]  # of the scale
    rewards: Mapping[str, float]
    hyperparameters: Mapping[str, Any]
    snapshots: tuple[int, ...] = ()  # iterations after which the model is kept besides the last

    @property
    def trained(self) -> bool:
        return self.method != BASE

    @property
    def sampler(self) -> str:
        """Of the untrained models: Euler's, or the pipeline's own where nothing can be trained."""
        return "ode" if self.model["trainable"] else "pipeline"

    def describe(self) -> dict[str, Any]:
        """What run.json holds."""
        from tafs.methods import registry

        used = (self.backbone, *sorted(self.rewards))
        out: dict[str, Any] = {
            "name": self.name,
            "variant": self.variant,
            "method": self.method,
            "title": self.title,
            "task": self.task,
            "prompts": self.prompts,
            "backbone": self.backbone,
            "model": dict(self.model),
            "seed": self.seed,
            "scale": self.scale,
            "settings": dict(self.settings),
            "rewards": dict(self.rewards),
            "hyperparameters": dict(self.hyperparameters),
            "sampler": self.sampler,
            "nfe_old": None,
            "nfe_theta": None,
            "forward_equivalents": 0,
            "iterations": 0,
            "snapshots": list(self.snapshots),
            **weights_of(self.settings, used, [self.prompts]),
        }
        if self.trained:
            algorithm = registry.create(self.method, dict(self.hyperparameters))
            out |= {
                "sampler": algorithm.evaluation_sampler,
                "nfe_old": algorithm.nfe_old,
                "nfe_theta": algorithm.nfe_theta,
                "forward_equivalents": algorithm.forward_equivalents,
                "iterations": self.settings["iterations"],
            }
        return out


def weights_of(
    settings: Mapping[str, Any], names: Sequence[str], prompt_sets: Sequence[str] = ()
) -> dict[str, Any]:
    """What models, rewards and prompts are made of: SHA-256, and what is randomly initialised."""
    from tafs.assets import sources

    world = sources.of(settings)
    if not world.pinned:
        return {"weights": {}, "random_weights": []}
    digests = world.digests(names, prompt_sets)
    return {"weights": digests, "random_weights": world.random(names)}


def to_json(value: Mapping[str, Any]) -> str:
    """The one form in which descriptions are written and compared."""
    return json.dumps(value, sort_keys=True)


def fingerprint(description: Mapping[str, Any], *files: Path) -> str:
    """SHA-256 over what decides a run's outcome: its description and its method's source."""
    digest = hashlib.sha256(to_json(description).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _prompts_of(config: Config, experiment: Experiment) -> str:
    """The part that a scale casts with a prompt set."""
    return experiment.prompts or config.tasks[experiment.tasks[0]].prompts


def _full_steps(evaluation: Evaluation, model: str) -> int:
    """A model's own number of steps; that of a base model can be the scale's."""
    facts = catalog.read()[model]
    return (facts.trainable and evaluation.base_nfe) or facts.steps


def _images_per_prompt(config: Config, experiment: Experiment) -> int:
    given = config.active.evaluation.images_per_prompt
    return given if isinstance(given, int) else given[_prompts_of(config, experiment)]


def _method_of(
    config: Config, variant: str, scale: Scale | None = None
) -> tuple[str, dict[str, Any]]:
    """(file name, hyperparameters) of a variant: its own, on top of those it starts from.

    What a scale (by default the active one) says of a method replaces what `methods` says of it.

    Raises:
        ValueError: its `method` leads back to itself.
    """
    at_scale = (scale or config.active).methods
    name, parameters = variant, dict[str, Any]()
    chain: list[str] = []
    while name in config.methods and name not in chain:
        chain.append(name)
        settings = config.methods[name] or Variant()
        parameters = {**(settings.model_extra or {}), **at_scale.get(name, {}), **parameters}
        name = settings.method or name
    if chain and name in chain[:-1]:
        raise ValueError(f"method: {' -> '.join([*chain, name])} leads round in a circle")
    return name, parameters


# Settings of a scale that say which runs there are, how they are judged and on how many devices,
# not how one is trained.
SELECTION = {
    "backbones",
    "prompts",
    "models",
    "without",
    "methods",
    "seeds",
    "ablation_seeds",
    "experiments",
    "evaluation",
    "processes",
    "nodes",
    "memory_mb",
}


# Those that say how a model is trained, and nothing of one that is not.
TRAINING = {
    "iterations",
    "prompts_per_iteration",
    "group_size",
    "micro_batch",
    "checkpoint_every",
    "lora",
}


def runs(config: Config) -> dict[str, Run]:
    """Every run of the active scale's experiments, by name; shared runs appear once."""
    scale = config.active
    costs, titles = _costs(config), _titles(config)
    found: dict[str, Run] = {}

    def add(variant: str, task: str, model: str, prompts: str, seed: int) -> None:
        facts = catalog.read()[model]
        left_out = SELECTION | (TRAINING if variant == BASE else set())
        common: dict[str, Any] = {
            "backbone": model,
            "prompts": prompts,
            "model": facts.settings(),
            "seed": seed,
            "scale": config.scale,
            "settings": scale.model_dump(mode="json", exclude=left_out),
        }
        if variant == BASE:
            name = f"{BASE}.{prompts}.{model}"
            found[name] = Run(
                name, BASE, BASE, facts.title, "", rewards={}, hyperparameters={}, **common
            )
            return
        method, parameters = _method_of(config, variant)
        name = f"{variant}.{task}.{model}.{seed}"
        found[name] = Run(
            name,
            variant,
            method,
            titles[variant],
            task,
            rewards=config.tasks[task].rewards,
            hyperparameters=parameters,
            snapshots=_snapshots(config, costs, variant),
            **common,
        )

    for experiment in (config.experiments[name] for name in scale.experiments):
        prompts = scale.prompts[_prompts_of(config, experiment)]
        seeds = scale.ablation_seeds if experiment.ablation else scale.seeds
        for model in _untrained(scale, experiment):
            add(BASE, "", model, prompts, 0)
        for backbone in (scale.backbones[part] for part in experiment.backbones):
            for variant, task in _trained(scale, experiment):
                for seed in seeds:
                    add(variant, task, backbone, prompts, seed)
    return found


def _untrained(scale: Scale, experiment: Experiment) -> list[str]:
    """The base models of an experiment, which its figures need, and the models beside them."""
    return [
        *(scale.backbones[part] for part in experiment.backbones),
        *(scale.models if experiment.models else ()),
    ]


def _trained(scale: Scale, experiment: Experiment) -> list[tuple[str, str]]:
    """The (method, task) of an experiment that the scale trains."""
    kept = [variant for variant in experiment.methods if variant not in scale.without]
    return list(itertools.product(kept, experiment.tasks))


def _costs(config: Config) -> dict[str, float]:
    """Of every method an iteration's evaluations per image; see `Method.forward_equivalents`."""
    from tafs.methods import registry

    return {
        variant: registry.create(*_method_of(config, variant)).cost for variant in config.methods
    }


def _iterations_at(config: Config, costs: Mapping[str, float], variant: str, share: float) -> int:
    """How many iterations a share of the reference's training compute pays for."""
    iterations = config.active.iterations
    paid = iterations * share * costs[config.reference] / costs[variant]
    # The ratio of two equal costs is 1 up to rounding.
    return max(1, min(iterations, math.floor(paid + 1e-9)))


def _snapshots(config: Config, costs: Mapping[str, float], variant: str) -> tuple[int, ...]:
    found = {_iterations_at(config, costs, variant, share) for share in MARKS}
    return tuple(sorted(found - {config.active.iterations}))


def _titles(config: Config) -> dict[str, str]:
    """Of every method."""
    from tafs.methods import registry

    return {
        variant: (settings.title if settings else "")
        or registry.method_class(_method_of(config, variant)[0]).TITLE
        or variant
        for variant, settings in config.methods.items()
    }
