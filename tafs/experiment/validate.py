"""validate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tafs.common.yaml_files import NAME, ConfigError, _suggestion, first_problem, load_yaml
from tafs.experiment.runs import _method_of, _prompts_of
from tafs.experiment.schema import FIGURES, Config, Experiment, Tuning
from tafs.models import catalog
from tafs.runtime.run_dir import BASE


def read(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read and check config.yaml; `overrides` replaces top-level keys, such as the scale.

    Raises:
        ConfigError: one line that names the file, the key and the remedy.
    """
    return check({**load_yaml(path, dict), **(overrides or {})}, str(path))


def check(raw: Mapping[str, Any], source: str = "config.yaml") -> Config:
    """Check a mapping read from config.yaml; see `read`."""
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{source}: {first_problem(error)}") from None
    problem = _inconsistency(config)
    if problem:
        raise ConfigError(f"{source}: {problem}")
    return config


def with_method(config: Config, name: str) -> Config:
    """The configuration with one more method in every experiment that has the base models.

    A method that config.yaml does not list gets its file's own hyperparameters.

    Raises:
        ConfigError: there is no such method, or it cannot join an experiment; names it.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"--config method: {name[:60]!r} is no method's name")
    methods = {**config.methods, name: config.methods.get(name)}
    found = config.model_copy(update={"methods": methods})
    problem = _inconsistency(found)
    joined = {}
    for key, experiment in config.experiments.items():
        new = experiment.model_copy(update={"methods": (*experiment.methods, name)})
        known = problem or not experiment.base or name in experiment.methods
        # A method that differentiates its rewards cannot join tasks whose rewards have no gradient.
        fits = not known and _experiment_inconsistency(found, key, new) is None
        joined[key] = new if fits else experiment
    found = found.model_copy(update={"experiments": joined})
    if not problem and not any(name in joined[key].methods for key in config.active.experiments):
        problem = f"no table of scale {config.scale!r} can take it"
    if problem:
        raise ConfigError(f"--config method={name}: {problem}")
    return found


def with_seeds(config: Config, count: Any) -> Config:
    """The configuration with the seeds 0 to `count` - 1 in every experiment of the active scale.

    Raises:
        ConfigError: `count` is no number of seeds, or they meet the search's.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1000:
        raise ConfigError(f"--config seeds={count}: give a number from 1 to 1000")
    seeds = tuple(range(count))
    scale = config.active.model_copy(update={"seeds": seeds, "ablation_seeds": seeds})
    found = config.model_copy(update={"scales": {**config.scales, config.scale: scale}})
    problem = _inconsistency(found)
    if problem:
        raise ConfigError(f"--config seeds={count}: {problem}")
    return found


def _inconsistency(config: Config) -> str | None:
    """What pydantic cannot see: names that point to nothing, hyperparameters, numbers of no use."""
    from tafs.assets import sources
    from tafs.methods import registry
    from tafs.rewards.metrics import METRICS

    if config.scale not in config.scales:
        return (
            f"scale: unknown scale {config.scale!r}{_suggestion(config.scale, list(config.scales))}"
        )
    for name, task in config.tasks.items():
        for reward in task.rewards:
            if reward not in METRICS:
                hint = _suggestion(reward, list(METRICS))
                return f"tasks.{name}.rewards: unknown reward {reward!r}{hint}"
        if not task.rewards:
            return f"tasks.{name}.rewards: at least one reward is needed"
    if BASE in config.methods:
        return f"methods.{BASE}: the name is taken by the untrained model"
    for key, scale in config.scales.items():
        for name in (*scale.methods, *scale.without):
            if name not in config.methods:
                hint = _suggestion(name, list(config.methods))
                return f"scales.{key}.methods: unknown method {name!r}{hint}"
        for variant in config.methods:
            own = f"scales.{key}." if variant in scale.methods else ""
            try:
                algorithm = registry.create(*_method_of(config, variant, scale))
                cost = algorithm.forward_equivalents
            except NotImplementedError as error:
                return f"{own}methods.{variant}: {str(error) or 'is a stub'}"
            except Exception as error:  # whatever a method makes of its hyperparameters
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                return f"{own}methods.{variant}: {kind}{error}"
            if not cost > 0:
                return f"{own}methods.{variant}: its `forward_equivalents` is {cost}; it must be above 0"
            # A method that one scale cannot share out may be tried at another.
            if key == config.scale and variant not in scale.without:
                problem = sharing_problem(
                    scale.prompts_per_iteration, algorithm.updates, scale.processes
                )
                if problem:
                    return f"scales.{key}: {variant}: {problem}"
    if config.reference not in config.methods:
        hint = _suggestion(config.reference, list(config.methods))
        return f"reference: unknown method {config.reference!r}{hint}"
    for name, experiment in config.experiments.items():
        problem = _experiment_inconsistency(config, name, experiment)
        if problem:
            return problem
    for name, scale in config.scales.items():
        for wanted in scale.experiments:
            if wanted not in config.experiments:
                hint = _suggestion(wanted, list(config.experiments))
                return f"scales.{name}.experiments: unknown experiment {wanted!r}{hint}"
            experiment = config.experiments[wanted]
            for part in experiment.backbones:
                if part not in scale.backbones:
                    hint = _suggestion(part, list(scale.backbones))
                    return (
                        f"experiments.{wanted}.backbones: scale {name!r} has no backbone for "
                        f"{part!r}{hint}"
                    )
            part = _prompts_of(config, experiment)
            if part not in scale.prompts:
                hint = _suggestion(part, list(scale.prompts))
                return f"scales.{name}.prompts: no prompt set for {part!r} of {wanted!r}{hint}"
            images = scale.evaluation.images_per_prompt
            if not isinstance(images, int) and part not in images:
                hint = _suggestion(part, list(images))
                return f"scales.{name}.evaluation.images_per_prompt: none for {part!r}{hint}"
        for model in (*scale.backbones.values(), *scale.models):
            if model not in catalog.read():
                hint = _suggestion(model, list(catalog.read()))
                return f"scales.{name}: unknown model {model!r}{hint}"
            if catalog.read()[model].world != scale.world:
                return f"scales.{name}: {model!r} is not of the world {scale.world!r}"
        for model in scale.backbones.values():
            if not catalog.read()[model].trainable:
                return f"scales.{name}.backbones: {model!r} cannot be trained, only compared"
        if scale.processes % scale.nodes:
            return (
                f"scales.{name}.nodes: {scale.nodes} cannot share {scale.processes} processes; "
                "choose a divisor"
            )
        if scale.evaluation.server and scale.world != "hub":
            return f"scales.{name}.evaluation.server: the world {scale.world!r} needs no server"
        for prompt_set in scale.prompts.values():
            if prompt_set not in sources.PROMPTS[scale.world]:
                hint = _suggestion(prompt_set, list(sources.PROMPTS[scale.world]))
                return f"scales.{name}.prompts: unknown prompt set {prompt_set!r}{hint}"
    if config.tuning is not None:
        return _tuning_inconsistency(config, config.tuning)
    return None


def sharing_problem(prompts: int, updates: int, processes: int) -> str | None:
    """Why an iteration's prompts cannot be shared out to its updates and their processes."""
    if prompts % updates:
        return (
            f"updates: {updates} does not divide prompts_per_iteration ({prompts}); "
            "choose a divisor"
        )
    if prompts // updates % processes:
        return (
            f"prompts_per_iteration: {prompts} prompts in {updates} updates cannot be shared by "
            f"{processes} processes; choose a divisor of {prompts // updates}"
        )
    return None


def _experiment_inconsistency(config: Config, name: str, experiment: Experiment) -> str | None:
    from tafs.methods import registry
    from tafs.rewards.metrics import DIFFERENTIABLE

    where = f"experiments.{name}"
    known: dict[str, Mapping[str, Any]] = {
        "tasks": config.tasks,
        "methods": config.methods,
        "labels": config.methods,
        "backbones": {part: None for scale in config.scales.values() for part in scale.backbones},
    }
    for key, available in known.items():
        for entry in getattr(experiment, key):
            if entry not in available:
                hint = _suggestion(entry, list(available))
                return f"{where}.{key}: unknown {key.rstrip('s')} {entry!r}{hint}"
    for kind in experiment.figures:
        if kind not in FIGURES:
            return f"{where}.figures: unknown figure {kind!r}{_suggestion(kind, list(FIGURES))}"
    for key in ("tasks", "methods"):
        if bool(getattr(experiment, key)) == (experiment.kind == "correlation"):
            needed = "takes no" if experiment.kind == "correlation" else "needs at least one of its"
            return f"{where}.{key}: a table of kind {experiment.kind!r} {needed} {key}"
    parts = {config.tasks[task].prompts for task in experiment.tasks}
    if len(parts) > 1:
        return f"{where}.tasks: they have different prompts ({', '.join(sorted(parts))})"
    if bool(experiment.prompts) != (experiment.kind == "correlation"):
        needed = "needs" if experiment.kind == "correlation" else "takes no"
        return f"{where}.prompts: a table of kind {experiment.kind!r} {needed} prompts of its own"
    for variant in experiment.methods:
        algorithm = registry.create(*_method_of(config, variant))
        for task in experiment.tasks if algorithm.needs_reward_gradients else ():
            for reward in config.tasks[task].rewards:
                if reward not in DIFFERENTIABLE:
                    return (
                        f"{where}.methods: {variant!r} needs the rewards' gradients, and "
                        f"{reward!r} of task {task!r} has none"
                    )
    return None


def _tuning_inconsistency(config: Config, tuning: Tuning) -> str | None:
    from tafs.methods import registry

    trained = {v for e in config.experiments.values() if tuning.task in e.tasks for v in e.methods}
    for variant in tuning.grids:
        if variant not in trained:
            return (
                f"tuning.grids: no experiment trains {variant!r} on {tuning.task!r}"
                f"{_suggestion(variant, sorted(trained))}"
            )
        file, own = _method_of(config, variant)
        for key, value in ((k, v) for k, values in tuning.grids[variant].items() for v in values):
            try:
                registry.create(file, {**own, key: value})
            except ValueError as error:
                return f"tuning.grids.{variant}: {error}"
    sizes = {v: math.prod(len(values) for values in g.values()) for v, g in tuning.grids.items()}
    if len(set(sizes.values())) > 1:
        return f"tuning.grids: should give every method as many trials as the others ({sizes})"
    if any(tuning.seed in (*s.seeds, *s.ablation_seeds) for s in config.scales.values()):
        return f"tuning.seed: {tuning.seed} is one of the tables' seeds; choose another"
    return None
