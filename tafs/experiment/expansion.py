"""Expands config.yaml's active scale into specs: runs, then tables, then evaluations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from tafs.assets import sources
from tafs.assets.sources import AssetSettings
from tafs.data.prompt_sets import prompt_set
from tafs.experiment import gpu_memory
from tafs.experiment.schema import Config, Experiment
from tafs.experiment.specs import (
    BEST,
    PIPELINE,
    EvalSetting,
    EvalSpec,
    RowSpec,
    RunSpec,
    TableSpec,
    TrainingSpec,
    TrajectorySpec,
)
from tafs.experiment.variants import Variants
from tafs.methods.group_relative import GroupRelative
from tafs.models import catalog
from tafs.rewards.metrics import METRICS
from tafs.runtime.run_dir import BASE

# Shares of the compute reference's training compute at which adapters are kept for comparison.
SNAPSHOT_SHARES = (0.25, 0.5, 0.75, 1.0)

SystemKey = tuple[str, str, str, str]  # variant, task, prompt set, backbone


def asset_settings(config: Config) -> AssetSettings:
    """Where the active scale's models, rewards and prompts come from."""
    return AssetSettings(
        **config.active.unsettled.model_dump(include={*AssetSettings.model_fields})
    )


class Expansion:
    """The specs of the active scale."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.scale = config.active.unsettled
        self.variants = Variants(config)
        self.assets = asset_settings(config)
        self.source = sources.of(self.assets)
        self.experiments = [(name, config.experiments[name]) for name in self.scale.experiments]
        self.runs: dict[str, RunSpec] = {}
        self.systems: dict[SystemKey, list[str]] = {}
        for _, experiment in self.experiments:
            self._add_runs(experiment)
        self.runs = gpu_memory.settled(config.active, config.scale, self.runs)
        self.tables = tuple(self._table(*named) for named in self.experiments)
        self.evaluations = self._evaluations()

    def _add_runs(self, experiment: Experiment) -> None:
        prompts = self._prompt_set(experiment)
        seeds = self.scale.ablation_seeds if experiment.ablation else self.scale.seeds
        for model in self._untrained(experiment):
            self._add(self._base_run(model, prompts))
        for backbone in self._backbones(experiment):
            for variant, task in self._trained(experiment):
                for seed in seeds:
                    self._add(self._training_run(variant, task, backbone, prompts, seed))

    def _add(self, run: RunSpec) -> None:
        if run.name not in self.runs:
            self.runs[run.name] = run
            key = (run.variant, run.task, run.prompts, run.backbone)
            self.systems.setdefault(key, []).append(run.name)

    def _base_run(self, model: str, prompts: str) -> RunSpec:
        entry = catalog.read()[model]
        return self._run(
            prompts,
            model,
            name=f"{BASE}.{prompts}.{model}",
            variant=BASE,
            method=BASE,
            title=entry.title,
            task="",
            seed=0,
            sampler=BEST if entry.trainable else PIPELINE,
        )

    def _training_run(
        self, variant: str, task: str, backbone: str, prompts: str, seed: int
    ) -> RunSpec:
        name, hyperparameters = self.variants.resolve(variant)
        method = self.variants.method(variant)
        if self.config.tasks[task].normalize and isinstance(method, GroupRelative):
            hyperparameters = {**hyperparameters, "normalize_rewards": True}
        kept = {self.variants.iterations_at(variant, share) for share in SNAPSHOT_SHARES}
        return self._run(
            prompts,
            backbone,
            name=f"{variant}.{task}.{backbone}.{seed}",
            variant=variant,
            method=name,
            title=self.variants.title(variant),
            task=task,
            seed=seed,
            training=TrainingSpec(**self.scale.model_dump(include={*TrainingSpec.model_fields})),
            # Sorted, so that the order in config.yaml does not change the rounding of sums.
            rewards=dict(sorted(self.config.tasks[task].rewards.items())),
            hyperparameters=hyperparameters,
            sampler=BEST,
            nfe_old=method.nfe_old,
            nfe_theta=method.nfe_theta,
            forward_equivalents=self.variants.cost(variant),
            snapshots=tuple(sorted(kept - {self.scale.iterations})),
        )

    def _run(self, prompts: str, backbone: str, **fields: Any) -> RunSpec:
        names = [backbone, *fields.get("rewards", ())]
        weights, random = self._weights(names, [prompts])
        return RunSpec(
            prompts=prompts,
            prompt_files=prompt_set(prompts).files,
            backbone=backbone,
            model=catalog.read()[backbone].settings(),
            scale=self.config.scale,
            assets=self.assets,
            resolution=self.scale.resolution,
            weights=weights,
            random_weights=random,
            **fields,
        )

    def _weights(
        self, names: Sequence[str], prompt_sets: Sequence[str] = ()
    ) -> tuple[dict[str, str], tuple[str, ...]]:
        """(SHA-256 of models, rewards and prompts, those that are randomly initialised)."""
        if not self.source.pinned:
            return {}, ()
        return self.source.digests(names, prompt_sets), tuple(self.source.random(names))

    def _prompt_set(self, experiment: Experiment) -> str:
        return self.scale.prompts[self.config.prompt_role(experiment)]

    def _backbones(self, experiment: Experiment) -> list[str]:
        return [self.scale.model_roles[role] for role in experiment.model_roles]

    def _untrained(self, experiment: Experiment) -> list[str]:
        """The base models, which the figures need, and the models that are only compared."""
        compared = self.scale.models if experiment.models else ()
        return [*self._backbones(experiment), *compared]

    def _trained(self, experiment: Experiment) -> list[tuple[str, str]]:
        """The (variant, task) pairs that the scale trains."""
        kept = [v for v in experiment.methods if v not in self.scale.exclude_methods]
        return list(itertools.product(kept, experiment.tasks))

    def _table(self, name: str, experiment: Experiment) -> TableSpec:
        evaluation = self.scale.evaluation
        rows = [*self._untrained_rows(experiment)]
        rows += self._trained_rows(experiment, below=bool(rows))
        return TableSpec(
            name=name,
            kind=experiment.kind,
            caption=experiment.caption,
            header=experiment.header,
            figures=experiment.figures,
            compute_reference=self.config.compute_reference,
            excluded_methods=tuple(
                v for v in experiment.methods if v in self.scale.exclude_methods
            ),
            few_nfe=evaluation.correlation_nfe
            if experiment.kind == "correlation"
            else evaluation.few_nfe,
            curve_nfe=evaluation.curve_nfe,
            rows=tuple(_distinct_labels(rows)),
        )

    def _untrained_rows(self, experiment: Experiment) -> Iterator[RowSpec]:
        few = self.scale.evaluation.few_nfe
        roles = {model: role for role, model in self.scale.model_roles.items()}
        for model in self._untrained(experiment):
            compared = model in self.scale.models
            full = self._full_steps(model)
            if compared:
                steps = [full]
            elif experiment.base or experiment.kind == "correlation":
                steps = [full, few] if experiment.kind == "scores" else [few]
            else:
                steps = []
            for nfe in dict.fromkeys(steps):
                yield self._row(
                    (BASE, "", self._prompt_set(experiment), model),
                    label=catalog.read()[model].title,
                    role=roles.get(model, ""),
                    nfe=nfe,
                    sampler=PIPELINE if compared else self._sampler(experiment),
                )

    def _trained_rows(self, experiment: Experiment, below: bool) -> Iterator[RowSpec]:
        """The rows of trained systems; `below` rows of untrained ones."""
        steps = experiment.nfe or (self.scale.evaluation.few_nfe,)
        for role in experiment.model_roles:
            backbone = self.scale.model_roles[role]
            for number, (variant, task) in enumerate(self._trained(experiment)):
                at = experiment.kind == "compute"
                for nfe in steps:
                    yield self._row(
                        (variant, task, self._prompt_set(experiment), backbone),
                        label=self._label(experiment, variant, task, backbone),
                        role=role,
                        nfe=nfe,
                        iteration=self.variants.iterations_at(variant, 1.0) if at else None,
                        sampler=self._sampler(experiment),
                        rule=below and number == 0 and nfe == steps[0],
                    )
                    below = True

    def _row(self, key: SystemKey, **fields: Any) -> RowSpec:
        variant, task, _, backbone = key
        return RowSpec(
            runs=tuple(self.systems[key]),
            variant=variant,
            task=task,
            backbone=backbone,
            full_steps=self._full_steps(backbone),
            **fields,
        )

    def _label(self, experiment: Experiment, variant: str, task: str, backbone: str) -> str:
        """What tables and figures call a trained system."""
        label = experiment.labels.get(variant) or self.variants.title(variant)
        if len(experiment.tasks) > 1:
            label = self.config.tasks[task].title or task
        if len(experiment.model_roles) > 1:
            entry = catalog.read()[backbone]
            label = f"{label} + {entry.short or entry.title}"
        return label

    def _sampler(self, experiment: Experiment) -> str:
        common = experiment.sampler == "common"
        return self.scale.evaluation.common_sampler if common else BEST

    def _full_steps(self, model: str) -> int:
        """A model's own number of steps, which a scale may set for base models."""
        entry = catalog.read()[model]
        return (entry.trainable and self.scale.evaluation.base_nfe) or entry.steps

    def _evaluations(self) -> dict[str, EvalSpec]:
        evaluation = self.scale.evaluation
        wanted = self._wanted_settings()
        metrics_of = {run.prompts: self.metrics(run.prompts) for run in self.runs.values()}
        weights_of = {prompts: self._weights(names) for prompts, names in metrics_of.items()}
        return {
            name: EvalSpec(
                weights=weights_of[run.prompts][0],
                random_weights=weights_of[run.prompts][1],
                prompts_per_tag=evaluation.prompts,
                batch=evaluation.batch,
                full_steps=self._full_steps(run.backbone),
                resolution=evaluation.resolution or self.scale.resolution,
                served=evaluation.served,
                judge=evaluation.judge,
                optional_metrics=self.optional_metrics,
                trajectories=TrajectorySpec(
                    nfe=evaluation.correlation_nfe, prompts=evaluation.correlation_prompts
                ),
                samplers=evaluation.samplers,
                validation_prompts=evaluation.validation_prompts,
                settings=tuple(
                    EvalSetting(
                        sampler=sampler, nfe=nfe, images_per_prompt=count, iteration=iteration
                    )
                    for (sampler, nfe, iteration), count in sorted(
                        wanted.get(name, {}).items(),
                        key=lambda item: (item[0][2] or 0, item[0][:2]),
                    )
                ),
            )
            for name, run in self.runs.items()
        }

    def metrics(self, prompts: str) -> tuple[str, ...]:
        """The metrics that a run on a prompt set is judged by, a served one included."""
        evaluation = self.scale.evaluation
        own = self.source.metrics(prompts, self.optional_metrics)
        return (*own, evaluation.judge) if evaluation.served else own

    @property
    def optional_metrics(self) -> tuple[str, ...]:
        """The optional metrics that evaluations compute: those of the scale and its rewards."""
        chosen = {*self.scale.evaluation.metrics}
        chosen |= {reward for run in self.runs.values() for reward in run.rewards}
        return tuple(name for name in METRICS if METRICS[name].optional and name in chosen)

    def _wanted_settings(self) -> dict[str, dict[tuple[str, int, int | None], int]]:
        """Images per prompt of every (sampler, nfe, iteration) that a table or figure needs.

        The points of curves are judged on fewer images, since they only draw a line.
        """
        evaluation = self.scale.evaluation
        found: dict[str, dict[tuple[str, int, int | None], int]] = {}
        for (_, experiment), table in zip(self.experiments, self.tables, strict=True):
            if table.kind == "correlation":
                continue
            images = evaluation.images_per_prompt
            if not isinstance(images, int):
                images = images[self.config.prompt_role(experiment)]
            curve = evaluation.curve_images_per_prompt
            for row in table.rows:
                for name in row.runs:
                    run = self.runs[name]
                    wanted = found.setdefault(name, {})
                    if "steps" in table.figures or "pareto" in table.figures:
                        for nfe in evaluation.curve_nfe:
                            wanted.setdefault((row.sampler, nfe, None), curve)
                    if "images" in table.figures:
                        wanted.setdefault((row.sampler, table.few_nfe, None), curve)
                    if "compute" in table.figures:
                        for iteration in run.snapshots:
                            wanted.setdefault((row.sampler, table.few_nfe, iteration), curve)
                        wanted[row.sampler, table.few_nfe, None] = images
                    kept = row.iteration if row.iteration in run.snapshots else None
                    wanted[row.sampler, row.nfe, kept] = images
        return found


def _distinct_labels(rows: Sequence[RowSpec]) -> Iterator[RowSpec]:
    """Add the variant to the labels that several systems share."""
    systems: dict[str, set[tuple[str, ...]]] = {}
    for row in rows:
        systems.setdefault(row.label, set()).add(row.runs)
    for row in rows:
        shared = len(systems[row.label]) > 1
        yield row.model_copy(update={"label": f"{row.label} ({row.variant})"}) if shared else row
