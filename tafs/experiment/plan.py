"""The plan: everything that config.yaml asks for, expanded once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tafs.common.yaml_files import ConfigError
from tafs.experiment import claims, looks, validate
from tafs.experiment.claims import Claim
from tafs.experiment.expansion import Expansion
from tafs.experiment.schema import Config
from tafs.experiment.specs import (
    BaseCheckSpec,
    DecideSpec,
    EvalSpec,
    ReportSpec,
    RowSpec,
    RunSpec,
    TableSpec,
)
from tafs.runtime.run_dir import BASE

TEXTS = ("scale", "results", "method")
OVERRIDES = (*TEXTS, "seeds")


@dataclass(frozen=True)
class Plan:
    """The runs of the active scale, how they are judged, and what is made of them."""

    config: Config
    runs: Mapping[str, RunSpec]  # by name
    evaluations: Mapping[str, EvalSpec]  # by the run's name
    tables: tuple[TableSpec, ...]
    added_method: str | None = None  # by `--config method=NAME`
    claims: tuple[Claim, ...] = ()  # of claims.yaml

    @property
    def root(self) -> Path:
        """The folder of the scale's results."""
        return Path(self.config.results) / self.config.scale

    @property
    def report(self) -> ReportSpec:
        return ReportSpec(scale=self.config.scale, tables=self.tables)

    @cached_property
    def base_check(self) -> BaseCheckSpec | None:
        """The check of the base models; None if the scale has none, or no table shows them."""
        scale = self.config.active
        if scale.base_within is None:
            return None
        tables = []
        for table in self.tables:
            rows = tuple(filter(_is_base, table.rows)) if table.kind == "scores" else ()
            if rows:
                tables.append(table.model_copy(update={"rows": rows, "figures": {}}))
        if not tables:
            return None
        return BaseCheckSpec(
            within=scale.base_within, accepted=scale.accept_base, tables=tuple(tables)
        )

    @property
    def searched_methods(self) -> list[str]:
        """The methods of the hyperparameter search that the scale trains on one of its tasks."""
        tuning = self.config.tuning
        return [m for m in tuning.methods if self.searched_run(m)] if tuning else []

    def searched_run(self, variant: str) -> RunSpec | None:
        """A run of the method on the first task of the hyperparameter search that trains it."""
        tuning = self.config.tuning
        for task in tuning.tasks if tuning else ():
            for run in self.runs.values():
                if (run.variant, run.task) == (variant, task):
                    return run
        return None

    @cached_property
    def budget(self) -> Plan | None:
        """The plan with the seeds of the last look of `snakemake decide`; None without looks."""
        decide = self.config.active.decide
        if decide is None:
            return None
        return expand(validate.with_seeds(self.config, decide.seeds[-1]), self.added_method)

    @cached_property
    def decide(self) -> DecideSpec | None:
        """The looks of `snakemake decide`; None without any."""
        decide = self.config.active.decide
        if decide is None or self.budget is None:
            return None
        tables, assets = self.budget.tables, self.config.active.assets
        fitting = [c for c in self.claims if any(c.fits(table, assets) for table in tables)]
        return DecideSpec(
            scale=self.config.scale,
            seeds=decide.seeds,
            claims=tuple(claim.id for claim in fitting),
            tables=looks.narrowed(tables, fitting, decide.seeds[-1]),
        )


def _is_base(row: RowSpec) -> bool:
    """Whether a row is a model that is trained, before its training and at its full steps."""
    return row.variant == BASE and bool(row.role) and row.nfe == row.full_steps


def expand(config: Config, added_method: str | None = None) -> Plan:
    """The plan of a configuration."""
    found = Expansion(config)
    return Plan(config, found.runs, found.evaluations, found.tables, added_method)


def load(
    overrides: Mapping[str, Any] | None = None,
    path: Path = Path("config.yaml"),
    gpu_memory: float | None = None,
) -> Plan:
    """The plan of config.yaml; the claims.yaml beside it is checked too.

    Args:
        overrides: OVERRIDES, as snakemake's `--config KEY=VALUE` gives them.
        gpu_memory: GB of other GPUs than the scale's.

    Raises:
        ConfigError: one line that names the file, the key and the remedy.
    """
    given = dict(overrides or {})
    for key in given:
        if key not in OVERRIDES:
            raise ConfigError(
                f"--config {key}: only {', '.join(OVERRIDES)} can be set on the command line; "
                f"set everything else in {path}"
            )
    seeds = given.pop("seeds", None)
    if seeds is None and "seeds" in (overrides or {}):  # snakemake reads `seeds=` as None
        raise ConfigError("--config seeds=: give a number from 1 to 1000")
    given = {key: str(value) for key, value in given.items()}  # a file of --configfile has numbers
    method = given.pop("method", None)
    config = validate.read(path, given)
    _check_folder(Path(config.results), path)
    if seeds is not None:
        config = validate.with_seeds(config, seeds)
    if gpu_memory is not None:
        config = validate.with_gpu_memory(config, gpu_memory)
    if method is not None:
        config = validate.with_method(config, method)
    stated = path.with_name(claims.CLAIMS.name)
    plan = replace(expand(config, method), claims=tuple(claims.read(stated)))
    claims.check(plan.claims, plan.config, plan.tables, stated)
    return plan


def as_typed(arguments: Sequence[str] | None) -> dict[str, str]:
    """The values of TEXTS among snakemake's arguments KEY=VALUE of `--config`.

    Snakemake itself reads 1e3 as a number, true as a truth value and 007 as 7.
    """
    pairs = (argument.partition("=") for argument in arguments or ())
    return {key: value for key, _, value in pairs if key in TEXTS}


def _check_folder(results: Path, path: Path) -> None:
    """Refuse a results folder that cannot be created or written, before any job starts."""
    existing = next(folder for folder in (results, *results.parents) if os.path.lexists(folder))
    if not existing.is_dir():
        raise ConfigError(f"{path}: results: {existing} is not a folder; choose another path")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{path}: results: {existing} is not writable; choose another path")
