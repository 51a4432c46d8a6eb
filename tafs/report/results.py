"""What runs left on disk, read once: scores, journals, and systems of runs that differ in seed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tafs.common.files import check_readable
from tafs.experiment.run_inputs import eval_spec, run_spec
from tafs.experiment.specs import EvalSpec, ReportSpec, RowSpec, RunSpec, TableSpec
from tafs.report import stats
from tafs.report.stats import Array
from tafs.rewards.metrics import METRICS
from tafs.runtime import journal
from tafs.runtime.run_dir import RunDir


@dataclass(frozen=True)
class Scores:
    """A run's scores: `values[sampler, nfe, metric, iteration]` is [prompts, images].

    A missing value is NaN. Images that a setting did not draw are left out.
    """

    file: Path
    prompts: tuple[int, ...]
    tags: tuple[str, ...]  # of each prompt
    images: tuple[int, ...]
    values: Mapping[tuple[str, int, str, int], Array]

    def settings(self, iteration: int) -> list[tuple[str, int]]:
        """The (sampler, nfe) pairs that the model of an iteration was evaluated with."""
        return sorted({(s, nfe) for s, nfe, _, after in self.values if after == iteration})

    def metrics(self) -> list[str]:
        """The metrics that were scored, in the order of METRICS."""
        found = {metric for _, _, metric, _ in self.values}
        return [metric for metric in METRICS if metric in found]


def read_scores(file: Path, *more: Path) -> Scores:
    """scores.parquet, and the metrics of served_scores.parquet, as dense arrays.

    Raises:
        ValueError: a file is missing or unreadable, or has an image twice; names the file.
    """
    columns = ["prompt", "tag", "image", "iteration", "sampler", "nfe", "metric", "value"]
    # Categories of two files differ, and would come back as objects.
    names_as_text = dict.fromkeys(("tag", "sampler", "metric"), "str")
    parts = [
        _read(file, columns, "scores", "evaluate"),
        *(_read(part, columns, "scores", "score_served") for part in more),
    ]
    table = pd.concat([part.astype(names_as_text) for part in parts], ignore_index=True)
    axes = ["sampler", "nfe", "metric", "iteration", "prompt", "image"]
    codes, names = zip(*(pd.factorize(table[name], sort=True) for name in axes), strict=True)
    shape = tuple(len(found) for found in names)
    place = np.ravel_multi_index(codes, shape)
    count = np.bincount(place, minlength=math.prod(shape)).reshape(shape)
    if count.max() > 1:
        at = np.unravel_index(int(count.argmax()), shape)
        twice = " ".join(f"{axis} {names[i][at[i]]}" for i, axis in enumerate(axes))
        raise ValueError(f"{file}: has two values for {twice}")
    dense = np.full(shape, np.nan)
    dense.flat[place] = table["value"].to_numpy(dtype=float)
    # Any row of a prompt tells its tag.
    rows = np.unique(codes[4], return_index=True)[1]
    return Scores(
        file=file,
        prompts=tuple(int(prompt) for prompt in names[4]),
        tags=tuple(str(tag) for tag in table["tag"].iloc[rows]),
        images=tuple(int(image) for image in names[5]),
        values={
            (str(names[0][i]), int(names[1][j]), str(names[2][k]), int(names[3][m])): dense[
                i, j, k, m
            ][:, count[i, j, k, m].any(0)]
            for i, j, k, m in np.argwhere(count.any((4, 5)))
        },
    )


def read_trajectory_rewards(file: Path) -> pd.DataFrame:
    """trajectory_rewards.parquet: prompt, step, metric, value; raises as `read_scores`."""
    return _read(file, ["prompt", "step", "metric", "value"], "step scores", "trajectory_rewards")


def _read(file: Path, columns: list[str], what: str, rule: str) -> pd.DataFrame:
    if not file.is_file():
        raise ValueError(f"{file}: not found; the workflow's rule {rule} writes it")
    check_readable(file)
    try:
        table = pd.read_parquet(file, columns=columns)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: not a table of {what} ({reason})") from None
    if table.empty:
        raise ValueError(f"{file}: contains no scores")
    return table


class Result:
    """One run's folder; every file is read once, when it is first needed.

    A file that is missing or broken raises FileNotFoundError or ValueError, which names it.
    """

    def __init__(self, folder: Path | str) -> None:
        self.run = RunDir(Path(folder))

    @cached_property
    def spec(self) -> RunSpec:
        return run_spec(self.run)

    @cached_property
    def evaluation(self) -> EvalSpec:
        return eval_spec(self.run)

    @property
    def random_weights(self) -> set[str]:
        """The models and metrics that are randomly initialised, whose numbers mean nothing."""
        return {*self.spec.random_weights, *self.evaluation.random_weights}

    @cached_property
    def origin(self) -> dict[str, Any]:
        """The journal's fingerprint and provenance; {} of a run that is not trained."""
        if not self.iterations:
            return {}
        start = journal.read(self.run.journal)[0]
        return {key: start[key] for key in ("fingerprint", "provenance") if key in start}

    @cached_property
    def scores(self) -> Scores:
        """The evaluation's scores, and a server's where one scored the images."""
        served = [self.run.served_scores] if self.evaluation.served else []
        return read_scores(self.run.scores, *served)

    @cached_property
    def samplers(self) -> dict[tuple[int, int], str]:
        """The samplers that were chosen for the model, by (nfe, iteration)."""
        if not self.run.samplers.is_file():
            return {}
        found = json.loads(self.run.samplers.read_text(encoding="utf-8"))
        return {(one["nfe"], one["iteration"]): one["sampler"] for one in found}

    @property
    def files(self) -> list[Path]:
        """The files that the numbers of tables come from."""
        run = self.run
        files = (run.adapter, run.scores, run.served_scores, run.trajectory_rewards)
        return [file for file in files if file.is_file()]

    @cached_property
    def trajectory_rewards(self) -> pd.DataFrame:
        return read_trajectory_rewards(self.run.trajectory_rewards)

    @cached_property
    def iterations(self) -> list[dict[str, Any]]:
        """The journal's iterations; [] of a run that is not trained."""
        if not self.spec.trained:
            return []
        if not self.run.journal.is_file():
            raise ValueError(f"{self.run.journal}: not found; training writes it")
        found = journal.iterations(self.run.journal)
        if not found:
            raise ValueError(f"{self.run.journal}: contains no iteration")
        return found

    def seconds(self) -> list[float]:
        """The time of each iteration."""
        try:
            return [float(record["seconds"]["total"]) for record in self.iterations]
        except (KeyError, TypeError):
            raise ValueError(f"{self.run.journal}: an iteration has no seconds.total") from None


@dataclass(frozen=True)
class System:
    """Runs that differ in their training seed only."""

    label: str
    results: tuple[Result, ...]  # sorted by seed

    @property
    def spec(self) -> RunSpec:
        """The spec of the first run; the others differ in name and seed."""
        return self.results[0].spec

    @property
    def full_steps(self) -> int:
        """The untrained model's own number of steps."""
        return self.results[0].evaluation.full_steps

    @property
    def scores(self) -> Scores:
        """The scores of the first run."""
        return self.results[0].scores

    def values(self, sampler: str, nfe: int, metric: str, iteration: int | None = None) -> Array:
        """Scores of the models after an iteration, [seeds, prompts, images]; None: the final ones.

        Raises:
            ValueError: a run was not scored with this setting, or on other prompts; names its file.
        """
        arrays = []
        for result in self.results:
            scores = result.scores
            at = result.spec.iterations if iteration is None else iteration
            if (sampler, nfe, metric, at) not in scores.values:
                found = ", ".join(f"{s} {n}" for s, n in scores.settings(at))
                after = "" if iteration is None else f" after iteration {iteration}"
                raise ValueError(
                    f"{scores.file}: no {metric} for sampler {sampler} at nfe {nfe}{after} "
                    f"(available: {found})"
                )
            check_paired(scores, self.scores)
            arrays.append(scores.values[sampler, nfe, metric, at])
        return np.stack(arrays)

    def quality(self, sampler: str, nfe: int, metric: str, iteration: int | None = None) -> Array:
        """Scores with the sign for which higher is better; see `values`."""
        found = self.values(sampler, nfe, metric, iteration)
        return found if METRICS[metric].higher_is_better else -found

    def estimate(self, nfe: int, metric: str, iteration: int | None = None) -> stats.Estimate:
        """A metric's mean with the system's own sampler, on the shown scale; see `values`."""
        values = self.values(self.spec.sampler, nfe, metric, iteration)
        return shown_mean(metric, METRICS[metric].factor * values, self.scores.tags)


def shown_mean(metric: str, values: Array, tags: Sequence[str]) -> stats.Estimate:
    """The mean of values on the shown scale, its interval clipped to the metric's limits."""
    limits, macro = METRICS[metric].limits, METRICS[metric].macro
    found = stats.mean_interval(values, tags, macro=macro)
    low, high = (float(np.clip(bound, *limits)) for bound in (found.low, found.high))
    return found._replace(low=low, high=high)


def check_paired(scores: Scores, other: Scores) -> None:
    """Raise ValueError, naming both files, unless both scored the same prompts and images."""
    for axis in ("prompts", "tags", "images"):
        if getattr(scores, axis) != getattr(other, axis):
            raise ValueError(f"{scores.file}: its {axis} differ from those of {other.file}")


@dataclass(frozen=True)
class LoadedTable:
    """A table's spec with the system of every row."""

    spec: TableSpec
    systems: Mapping[RowSpec, System]  # rows of the same runs share a system

    @cached_property
    def distinct(self) -> list[System]:
        """Every system once: untrained ones first, then in the order of the rows."""
        found = list({row.runs: system for row, system in self.systems.items()}.values())
        return sorted(found, key=lambda system: system.spec.trained)

    @property
    def results(self) -> list[Result]:
        """Every run once."""
        return [result for system in self.distinct for result in system.results]

    @property
    def metrics(self) -> list[str]:
        """The metrics that any run was scored with, in the order of METRICS."""
        known = {metric for result in self.results for metric in result.scores.metrics()}
        return [metric for metric in METRICS if metric in known]

    @property
    def domains(self) -> tuple[list[str], list[str]]:
        """(metrics that some run was trained on, metrics that none was trained on)."""
        rewards = {name for result in self.results for name in result.spec.rewards}
        known = self.metrics
        return [m for m in known if m in rewards], [m for m in known if m not in rewards]

    @property
    def trained(self) -> list[System]:
        """The trained systems.

        Raises:
            ValueError: there is none.
        """
        found = [system for system in self.distinct if system.spec.trained]
        if not found:
            raise ValueError(f"{self.spec.name}: no run is trained")
        return found

    def base_of(self, system: System) -> System:
        """The untrained model that a system started from, scored on the same prompts.

        Raises:
            ValueError: it is not in the table, or was scored on others; names it.
        """
        backbone = system.spec.backbone
        for other in self.distinct:
            if not other.spec.trained and other.spec.backbone == backbone:
                check_paired(system.scores, other.scores)
                return other
        raise ValueError(f"{self.spec.name}: no base model {backbone!r}; set `base: true`")


@dataclass(frozen=True)
class Report:
    """Everything that the report shows, each run read once."""

    scale: str
    tables: tuple[LoadedTable, ...]

    @property
    def random_weights(self) -> list[str]:
        """The models and metrics of all tables that are randomly initialised."""
        results = [result for table in self.tables for result in table.results]
        return sorted(set[str]().union(*(result.random_weights for result in results)))


def load(root: Path) -> Report:
    """The report of ROOT/report_spec.json, on the run folders ROOT/runs.

    Raises:
        FileNotFoundError, ValueError: report_spec.json is missing or broken; names it.
    """
    spec = ReportSpec.read(root / "report_spec.json")
    return Report(spec.scale, tuple(load_tables(spec.tables, root / "runs")))


def load_tables(specs: Iterable[TableSpec], runs: Path) -> list[LoadedTable]:
    """The tables with their systems; tables share the results of runs they have in common."""
    results: dict[str, Result] = {}
    tables = []
    for spec in specs:
        systems: dict[tuple[str, ...], System] = {}
        for row in spec.rows:
            own = [results.setdefault(name, Result(runs / name)) for name in row.runs]
            by_seed = sorted(own, key=lambda result: result.spec.seed)
            systems.setdefault(row.runs, System(row.label, tuple(by_seed)))
        tables.append(LoadedTable(spec, {row: systems[row.runs] for row in spec.rows}))
    return tables


def step_correlation(result: Result, metric: str, step: int) -> stats.Estimate:
    """Pearson's r between the rewards of the images at a step and of the final images.

    Raises:
        ValueError: the run has no such metric or step; names the file.
    """
    rewards = result.trajectory_rewards
    table = rewards[rewards["metric"] == metric]
    table = table.pivot(index="prompt", columns="step", values="value")
    if step not in table.columns:
        raise ValueError(f"{result.run.trajectory_rewards}: no {metric} of step {step}")
    return stats.correlation(table[step].to_numpy(), table.iloc[:, -1].to_numpy())
