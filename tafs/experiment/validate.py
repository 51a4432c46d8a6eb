"""Checks config.yaml. Every mistake gives one line that names its key and the remedy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tafs.assets import sources
from tafs.common.yaml_files import NAME, ConfigError, first_problem, load_yaml, suggestion
from tafs.data.prompt_sets import FROM_FILES, prompt_set
from tafs.experiment.schema import (
    FIGURES,
    JUDGE,
    RENAMED_KEYS,
    Config,
    Experiment,
    Range,
    Scale,
    Tuning,
)
from tafs.experiment.variants import Variants
from tafs.methods import registry
from tafs.models import catalog, quantization
from tafs.rewards.metrics import METRICS
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
        config = Config.model_validate(raw, context={"folder": Path(source).parent})
    except ValidationError as error:
        problem = _renamed(error) or first_problem(error, Config)
        raise ConfigError(f"{source}: {problem}") from None
    _raise_first(problems(config), source)
    return config


def with_method(config: Config, name: str) -> Config:
    """The configuration with one more method in every experiment that has the base models.

    A method that config.yaml does not list uses the hyperparameters of its own file.

    Raises:
        ConfigError: there is no such method, or it fits no experiment; names it.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"--config method: {name[:60]!r} is not a method's name")
    source = f"--config method={name}"
    methods = {**config.methods, name: config.methods.get(name)}
    found = config.model_copy(update={"methods": methods})
    _raise_first(problems(found), source)
    joined, reasons = {}, {}
    for key, experiment in config.experiments.items():
        new = experiment.model_copy(update={"methods": (*experiment.methods, name)})
        # A method that needs reward gradients does not fit a task with other rewards.
        reasons[key] = next(_experiment_problems(found, key, new), None)
        fits = experiment.base and reasons[key] is None
        joined[key] = new if fits and name not in experiment.methods else experiment
    found = found.model_copy(update={"experiments": joined})
    if not any(name in joined[key].methods for key in config.active.experiments):
        reason = next(filter(None, (reasons[key] for key in config.active.experiments)), None)
        raise ConfigError(
            f"{source}: no table of scale {config.scale!r} can take it"
            + (f"; {reason}" if reason else "")
        )
    return found


def with_seeds(config: Config, count: Any) -> Config:
    """The configuration with the seeds 0 to `count` - 1 in every experiment of the active scale.

    Raises:
        ConfigError: `count` is not a number of seeds, or the search uses one of them.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1000:
        raise ConfigError(f"--config seeds={count}: give a number from 1 to 1000")
    seeds = tuple(range(count))
    scale = config.active.model_copy(update={"seeds": seeds, "ablation_seeds": seeds})
    found = config.model_copy(update={"scales": {**config.scales, config.scale: scale}})
    _raise_first(problems(found), f"--config seeds={count}")
    return found


def with_gpu_memory(config: Config, gigabytes: float) -> Config:
    """The configuration for GPUs of so many GB."""
    scale = config.active.model_copy(update={"gpu_memory": gigabytes})
    return config.model_copy(update={"scales": {**config.scales, config.scale: scale}})


def _raise_first(found: Iterator[str], source: str) -> None:
    problem = next(found, None)
    if problem is not None:
        raise ConfigError(f"{source}: {problem}")


def _renamed(error: ValidationError) -> str | None:
    """A line about a key that has another name now."""
    for problem in error.errors():
        key = str(problem["loc"][-1])
        if problem["type"] == "extra_forbidden" and key in RENAMED_KEYS:
            path = ".".join(map(str, problem["loc"]))
            return f"{path}: is now called {RENAMED_KEYS[key]!r}; rename it"
    return None


def problems(config: Config) -> Iterator[str]:
    """What the schema cannot see: unknown names, wrong hyperparameters, contradictions."""
    if config.scale not in config.scales:
        hint = suggestion(config.scale, list(config.scales))
        yield f"scale: unknown scale {config.scale!r}{hint}"
        return
    for name, task in config.tasks.items():
        yield from _unknown(f"tasks.{name}.rewards", "reward", task.rewards, METRICS)
    if BASE in config.methods:
        yield f"methods.{BASE}: the name is reserved for the untrained model"
    yield from _unknown("compute_reference", "method", [config.compute_reference], config.methods)
    for key, scale in config.scales.items():
        names = (*scale.methods, *scale.exclude_methods)
        yield from _unknown(f"scales.{key}.methods", "method", names, config.methods)
    for key, scale in config.scales.items():
        yield from _method_problems(config, key, scale)
    for name, experiment in config.experiments.items():
        yield from _experiment_problems(config, name, experiment)
    for key, scale in config.scales.items():
        yield from _scale_problems(config, key, scale)
    if config.tuning is not None:
        yield from _tuning_problems(config, config.tuning)


def _unknown(
    where: str, kind: str, names: Iterator[str] | Any, available: Mapping[str, Any] | Any
) -> Iterator[str]:
    for name in names:
        if name not in available:
            yield f"{where}: unknown {kind} {name!r}{suggestion(name, list(available))}"


def _method_problems(config: Config, key: str, scale: Scale) -> Iterator[str]:
    """Hyperparameters that a method refuses, and budgets that cannot be divided."""
    variants = Variants(config, scale)
    for variant in config.methods:
        where = f"scales.{key}.methods.{variant}" if variant in scale.methods else ""
        where = where or f"methods.{variant}"
        try:
            method = variants.method(variant)
            cost = method.forward_equivalents
        except NotImplementedError as error:
            yield f"{where}: {str(error) or 'is a stub'}"
            continue
        except Exception as error:  # a method's file may raise anything
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            yield f"{where}: {kind}{error}"
            continue
        if not cost > 0:
            yield f"{where}: its `forward_equivalents` is {cost}; it must be above 0"
        # A budget that one scale cannot divide may be fine at another.
        if key == config.scale and variant not in scale.exclude_methods:
            problem = sharing_problem(scale.prompts_per_iteration, method.updates, scale.processes)
            if problem:
                yield f"scales.{key}: {variant}: {problem}"
            try:
                method.check_iterations(scale.iterations)
            except ValueError as error:
                yield f"scales.{key}: {variant}: {error}"


def sharing_problem(prompts: int, updates: int, processes: int) -> str | None:
    """Why an iteration's prompts cannot be divided among updates and processes, or None."""
    if prompts % updates:
        return (
            f"updates: {updates} does not divide prompts_per_iteration ({prompts}); "
            "choose a divisor"
        )
    if prompts // updates % processes:
        return (
            f"prompts_per_iteration: {prompts} prompts in {updates} updates cannot be divided "
            f"among {processes} processes; choose a divisor of {prompts // updates}"
        )
    return None


def _experiment_problems(config: Config, name: str, experiment: Experiment) -> Iterator[str]:
    where = f"experiments.{name}"
    roles = {role for scale in config.scales.values() for role in scale.model_roles}
    yield from _unknown(f"{where}.tasks", "task", experiment.tasks, config.tasks)
    yield from _unknown(f"{where}.methods", "method", experiment.methods, config.methods)
    yield from _unknown(f"{where}.labels", "method", experiment.labels, config.methods)
    yield from _unknown(f"{where}.model_roles", "model role", experiment.model_roles, roles)
    yield from _unknown(f"{where}.figures", "figure", experiment.figures, FIGURES)
    if experiment.sampler == "common" and experiment.figures:
        yield f"{where}.figures: are drawn with the best samplers; leave them out"
    correlation = experiment.kind == "correlation"
    for key in ("tasks", "methods"):
        if bool(getattr(experiment, key)) == correlation:
            needed = "takes no" if correlation else "needs at least one of its"
            yield f"{where}.{key}: a table of kind {experiment.kind!r} {needed} {key}"
            return
    if bool(experiment.prompts) != correlation:
        needed = "needs" if correlation else "does not take"
        yield f"{where}.prompts: a table of kind {experiment.kind!r} {needed} prompts of its own"
    tasks = [config.tasks[task] for task in experiment.tasks if task in config.tasks]
    prompts = {task.prompts for task in tasks}
    if len(prompts) > 1:
        yield f"{where}.tasks: they have different prompts ({', '.join(sorted(prompts))})"
    variants = Variants(config)
    for variant in experiment.methods:
        if not variants.method(variant).needs_reward_gradients:
            continue
        for reward in dict.fromkeys(chain.from_iterable(task.rewards for task in tasks)):
            if not METRICS[reward].differentiable:
                yield (
                    f"{where}.methods: {variant!r} needs the rewards' gradients, but {reward!r} "
                    "is not differentiable"
                )


def _scale_problems(config: Config, key: str, scale: Scale) -> Iterator[str]:
    where = f"scales.{key}"
    yield from _unknown(f"{where}.experiments", "experiment", scale.experiments, config.experiments)
    for name in scale.experiments:
        experiment = config.experiments[name]
        for role in experiment.model_roles:
            if role not in scale.model_roles:
                hint = suggestion(role, list(scale.model_roles))
                yield f"{where}.model_roles: no model for {role!r} of experiment {name!r}{hint}"
        role = config.prompt_role(experiment)
        if role not in scale.prompts:
            hint = suggestion(role, list(scale.prompts))
            yield f"{where}.prompts: no prompt set for {role!r} of experiment {name!r}{hint}"
        images = scale.evaluation.images_per_prompt
        if not isinstance(images, int) and role not in images:
            hint = suggestion(role, list(images))
            yield f"{where}.evaluation.images_per_prompt: no number for {role!r}{hint}"
    if key == config.scale and (missing := quantization.problem(scale.quantize)):
        yield f"{where}.quantize: {missing}"
    if scale.automatic and scale.gpu_memory is None:
        yield (
            f"{where}.gpu_memory: is missing; {scale.automatic[0]}: auto needs it, the GB of a GPU"
        )
    known = catalog.read()
    models = (*scale.model_roles.values(), *scale.models)
    yield from _unknown(where, "model", models, known)
    for model in models:
        if known[model].assets != scale.assets:
            yield f"{where}: the assets of {model!r} are not {scale.assets!r}"
    for model in scale.model_roles.values():
        if not known[model].trainable:
            yield f"{where}.model_roles: {model!r} cannot be trained, only compared"
        longest = known[model].max_sequence_length
        if longest is not None and (scale.max_sequence_length or 0) > longest:
            yield (
                f"{where}.max_sequence_length: {scale.max_sequence_length} is more than the "
                f"{longest} tokens of {model!r}; lower it"
            )
    if scale.processes % scale.nodes:
        yield (
            f"{where}.nodes: {scale.nodes} nodes cannot share {scale.processes} processes; "
            "choose a divisor"
        )
    if scale.device == "auto" and scale.processes > 1:
        yield f"{where}.device: 'auto' is for trainings of one process; choose cpu or cuda"
    yield from _unknown(
        f"{where}.accept_base", "model", scale.accept_base, scale.model_roles.values()
    )
    looks = scale.decide.seeds if scale.decide else ()
    if any(n >= after for n, after in itertools.pairwise(looks)):
        yield f"{where}.decide.seeds: {list(looks)} should increase"
    yield from _metric_problems(scale, f"{where}.evaluation")
    yield from _prompt_problems(config, scale, f"{where}.prompts")


def _metric_problems(scale: Scale, where: str) -> Iterator[str]:
    """Metrics that the scale cannot compute, or that no key of this kind chooses."""
    evaluation = scale.evaluation
    served = [name for name, metric in METRICS.items() if metric.served]
    if evaluation.servers and scale.assets != "hub":
        key = "server" if evaluation.server else "judges"
        yield f"{where}.{key}: the assets {scale.assets!r} need no server"
    yield from _unknown(f"{where}.judges", "served metric", evaluation.judges, served)
    if evaluation.judge != JUDGE and evaluation.judge not in evaluation.judges:
        known = ", ".join(evaluation.servers) or "none"
        yield f"{where}.judge: {evaluation.judge!r} has no command in judges (there are: {known})"
    optional = [n for n, m in METRICS.items() if m.optional and not m.served]
    yield from _unknown(f"{where}.metrics", "optional metric", evaluation.metrics, optional)


def _prompt_problems(config: Config, scale: Scale, where: str) -> Iterator[str]:
    """Prompt sets that the scale's models, rewards or numbers do not fit."""
    available = sources.prompt_sets_of(scale.assets)
    for role, name in scale.prompts.items():
        if name not in FROM_FILES and name not in available:
            yield from _unknown(where, "prompt set", [name], available)
            return
        if problem := sources.prompt_problem(name, scale.assets):
            yield f"{where}.{role}: {problem}"
        evaluation = scale.evaluation
        key = METRICS[evaluation.judge].metadata if evaluation.judge in METRICS else ""
        if evaluation.served and key and key not in prompt_set(name).metadata:
            yield f"{where}.{role}: have no {key!r}, which the judge {evaluation.judge!r} needs"
    for key in scale.experiments:
        experiment = config.experiments[key]
        role = config.prompt_role(experiment)
        chosen = prompt_set(scale.prompts[role])
        for task in experiment.tasks:
            for reward in config.tasks[task].rewards:
                needed = f"{where}.{role}: the reward {reward!r} of task {task!r} needs"
                key = METRICS[reward].metadata
                if key and key not in chosen.metadata:
                    yield (
                        f"{needed} GenEval's metadata; give prompts that have it, as a .jsonl file "
                        f"with {key!r}"
                    )
                if METRICS[reward].quotes and not chosen.quotes:
                    yield f"{needed} a text in double quotes in every prompt; give such prompts"
        count = scale.evaluation.correlation_prompts
        if experiment.kind == "correlation" and chosen.files:
            known = len(chosen.prompts("train", Path))
            if count > known:
                yield (
                    f"{where.removesuffix('prompts')}evaluation.correlation_prompts: {count} is "
                    f"more than the {known} training prompts of {', '.join(chosen.files)}; lower it"
                )


def _tuning_problems(config: Config, tuning: Tuning) -> Iterator[str]:
    trained = {
        variant
        for experiment in config.experiments.values()
        if not set(tuning.tasks).isdisjoint(experiment.tasks)
        for variant in experiment.methods
    }
    variants = Variants(config)
    for variant in tuning.methods:
        if variant not in trained:
            hint = suggestion(variant, sorted(trained))
            tasks = " or ".join(map(repr, tuning.tasks))
            yield f"tuning.methods: no experiment trains {variant!r} on {tasks}{hint}"
            continue
        name, own = variants.resolve(variant)
        for key, searched in tuning.space(variant).items():
            values = (searched.low, searched.high) if isinstance(searched, Range) else searched
            for value in values:
                try:
                    registry.create(name, {**own, key: value})
                except ValueError as error:
                    if key in tuning.methods[variant]:
                        yield f"tuning.methods.{variant}: {error}"
                    yield f"tuning.common: {variant}: {error}"
    for seed in tuning.seeds:
        for scale in config.scales.values():
            added = range(scale.decide.seeds[-1] if scale.decide else 0)
            if seed in (*scale.seeds, *scale.ablation_seeds, *added):
                yield f"tuning.seeds: {seed} is one of the tables' seeds; choose another"
