"""What runs left on disk: scores, journals, and the runs that differ in their seed alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tafs.report import stats
from tafs.report.stats import Array
from tafs.rewards.metrics import METRICS
from tafs.runtime import journal, run_dir


@dataclass(frozen=True)
class Scores:
    """A run's scores: `values[sampler, nfe, metric, iteration]` is [prompts, images].

    NaN where a value is missing; images that a setting did not draw are not there.
    """

    file: Path
    prompts: tuple[int, ...]
    tags: tuple[str, ...]  # of each prompt
    images: tuple[int, ...]
    values: Mapping[tuple[str, int, str, int], Array]

    def settings(self, iteration: int) -> list[tuple[str, int]]:
        """The (sampler, nfe) that the model of an iteration was evaluated with."""
        return sorted({(s, nfe) for s, nfe, _, after in self.values if after == iteration})

    def metrics(self) -> list[str]:
        """Those of METRICS that were scored, in their order."""
        found = {metric for _, _, metric, _ in self.values}
        return [metric for metric in METRICS if metric in found]


def read_scores(file: Path, *more: Path) -> Scores:
    """scores.parquet, and the further metrics of served_scores.parquet, as dense arrays.

    Raises:
        ValueError: a file is missing or unreadable, or an image is there twice; names the file.
    """
    table = pd.concat([_read_long(part) for part in (file, *more)], ignore_index=True)
    axes = ["sampler", "nfe", "metric", "iteration", "prompt", "image"]
    codes, names = zip(*(pd.factorize(table[name], sort=True) for name in axes), strict=True)
    shape = tuple(len(found) for found in names)
    place = np.ravel_multi_index(codes, shape)
    count = np.bincount(place, minlength=math.prod(shape)).reshape(shape)
    if count.max() > 1:
        at = np.unravel_index(int(count.argmax()), shape)
        twice = " ".join(f"{axis} {names[i][at[i]]}" for i, axis in enumerate(axes))
        raise ValueError(f"{file}: holds two values of {twice}")
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


def _read_long(file: Path) -> pd.DataFrame:
    if not file.is_file():
        stage = "score_served" if file.name.startswith("served_scores") else "evaluate"
        raise ValueError(f"{file}: not found; `python -m tafs.{stage}` writes it")
    columns = ["prompt", "tag", "image", "iteration", "sampler", "nfe", "metric", "value"]
    try:
        table = pd.read_parquet(file, columns=columns)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: not a table of scores ({reason})") from None
    if table.empty:
        raise ValueError(f"{file}: holds no scores")
    # Categories of two files differ, and would come back as objects.
    return table.astype({name: "str" for name in ("tag", "sampler", "metric")})


def read_trajectory_rewards(file: Path) -> pd.DataFrame:
    """trajectory_rewards.parquet: prompt, step, metric, value.

    Raises:
        ValueError: it is missing or unreadable; names the file.
    """
    if not file.is_file():
        raise ValueError(
            f"{file}: not found; `python -m tafs.evaluation.trajectory_rewards` writes it"
        )
    try:
        table = pd.read_parquet(file, columns=["prompt", "step", "metric", "value"])
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: not a table of step scores ({reason})") from None
    if table.empty:
        raise ValueError(f"{file}: holds no scores")
    return table


# Of run.json.
REQUIRED = "name method title backbone seed scale sampler iterations"


class Result:
    """One run's folder, read when asked for."""

    def __init__(self, folder: Path | str) -> None:
        self.run = run_dir.RunDir(Path(folder))

    @cached_property
    def info(self) -> dict[str, Any]:
        """run.json.

        Raises:
            ValueError: it is missing, broken or incomplete; names the file.
        """
        try:
            info = self.run.description
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
        for key in REQUIRED.split():
            if key not in info:
                raise ValueError(f"{self.run.folder / 'run.json'}: has no {key!r}")
        return info

    @property
    def variant(self) -> str:
        """The key in config.yaml's methods: a method's file with hyperparameters of its own."""
        return str(self.info.get("variant", self.info["method"]))

    @property
    def random_weights(self) -> set[str]:
        """What of its models and its metrics' is randomly initialised: its numbers mean nothing."""
        return {
            name
            for record in (self.info, self.run.evaluation)
            for name in record.get("random_weights", ())
        }

    @property
    def origin(self) -> dict[str, Any]:
        """The journal's fingerprint and provenance; {} of a run that is not trained.

        Raises:
            ValueError: see `iterations`.
        """
        if not self.iterations:
            return {}
        start = journal.read(self.run.journal)[0]
        return {key: start[key] for key in ("fingerprint", "provenance") if key in start}

    @cached_property
    def scores(self) -> Scores:
        """Of the evaluation, and of a server where it judged the images.

        Raises:
            ValueError: a file is missing or broken; names it.
        """
        files = [self.run.scores]
        if self.run.evaluation["server"]:
            files.append(self.run.served_scores)
        return read_scores(*files)

    @cached_property
    def trajectory_rewards(self) -> pd.DataFrame:
        return read_trajectory_rewards(self.run.trajectory_rewards)

    @cached_property
    def iterations(self) -> list[dict[str, Any]]:
        """The journal's iterations; [] of a run that is not trained.

        Raises:
            ValueError: a trained run has none; names the file.
        """
        if not self.run.trained:
            return []
        if not self.run.journal.is_file():
            raise ValueError(
                f"{self.run.journal}: not found; `python -m tafs.training.train` writes it"
            )
        found = journal.iterations(self.run.journal)
        if not found:
            raise ValueError(f"{self.run.journal}: holds no iteration")
        return found

    def seconds(self) -> list[float]:
        """Each iteration's time."""
        try:
            return [float(record["seconds"]["total"]) for record in self.iterations]
        except (KeyError, TypeError):
            raise ValueError(f"{self.run.journal}: an iteration has no seconds.total") from None


@dataclass(frozen=True)
class System:
    """Runs that differ in their training seed alone."""

    label: str
    results: tuple[Result, ...]  # sorted by seed

    @property
    def info(self) -> dict[str, Any]:
        return self.results[0].info

    @property
    def trained(self) -> bool:
        return self.results[0].run.trained

    @property
    def sampler(self) -> str:
        """The runs' own sampler for few steps."""
        return str(self.info["sampler"])

    @property
    def full_steps(self) -> int:
        """The untrained model's own steps."""
        return int(self.results[0].run.evaluation["full"])

    def values(self, sampler: str, nfe: int, metric: str, iteration: int | None = None) -> Array:
        """[seeds, prompts, images] of the models after an iteration; None: the final ones.

        Raises:
            ValueError: a run was not scored so, or with other prompts; names its file.
        """
        arrays = []
        for result in self.results:
            scores = result.scores
            at = int(result.info["iterations"]) if iteration is None else iteration
            if (sampler, nfe, metric, at) not in scores.values:
                found = ", ".join(f"{s} {n}" for s, n in scores.settings(at))
                after = "" if iteration is None else f" after iteration {iteration}"
                raise ValueError(
                    f"{scores.file}: no {metric} for sampler {sampler} at nfe {nfe}{after} "
                    f"(has: {found})"
                )
            check_paired(scores, self.results[0].scores)
            arrays.append(scores.values[sampler, nfe, metric, at])
        return np.stack(arrays)


def check_paired(scores: Scores, other: Scores) -> None:
    """Raises ValueError, naming both files, unless both scored the same prompts and images."""
    for axis in ("prompts", "tags", "images"):
        if getattr(scores, axis) != getattr(other, axis):
            raise ValueError(f"{scores.file}: its {axis} are not those of {other.file}")


def read_results(folders: Iterable[Path | str]) -> list[Result]:
    """The runs' folders, each once.

    Raises:
        ValueError: there is none.
    """
    results = [Result(folder) for folder in dict.fromkeys(Path(f) for f in folders)]
    if not results:
        raise ValueError("no runs were given")
    return results


def select(results: Iterable[Result], where: Mapping[str, Any], label: str = "") -> System:
    """The runs whose run.json holds these values; "a.b" is key b of object a.

    Raises:
        ValueError: there is none, or two with the same seed.
    """
    seeds: dict[int, Result] = {}
    for result in results:
        if all(_lookup(result, key) == value for key, value in where.items()):
            other = seeds.setdefault(int(result.info["seed"]), result)
            if other is not result:
                raise ValueError(
                    f"{result.run.folder}: the same system and seed as {other.run.folder}"
                )
    if not seeds:
        wanted = ", ".join(f"{key} {value}" for key, value in where.items())
        raise ValueError(f"no run with {wanted} among the given ones")
    chosen = tuple(seeds[seed] for seed in sorted(seeds))
    return System(label or str(chosen[0].info["title"]), chosen)


def _lookup(result: Result, key: str) -> Any:
    value: Any = result.variant if key == "variant" else result.info
    for part in key.split(".") if key != "variant" else ():
        value = value.get(part) if isinstance(value, dict) else None
    return value


def systems_of(results: Sequence[Result]) -> list[System]:
    """Every system among the runs: base models first, then in the order of the runs."""
    keys = ("variant", "task", "backbone")
    found: dict[tuple[str, ...], System] = {}
    for result in sorted(results, key=lambda r: r.run.trained):
        where = {key: _lookup(result, key) for key in keys}
        if tuple(where.values()) not in found:
            found[tuple(where.values())] = select(results, where)
    backbones = {backbone for _, _, backbone in found}
    named = []
    for (variant, task, backbone), system in found.items():
        label = system.label
        namesakes = [w for w, s in found.items() if s.label == label and w[2] == backbone]
        if len({other for other, _, _ in namesakes}) > 1:
            label = f"{label} ({variant})"
        elif len(namesakes) > 1:
            label = f"{label} ({task})"
        if system.trained and len(backbones) > 1:
            label = f"{label} + {backbone}"
        named.append(System(label, system.results))
    return named


def step_correlation(result: Result, metric: str, step: int) -> stats.Estimate:
    """Pearson's r of the reward of a step's image with that of the final image.

    Raises:
        ValueError: the run has no such metric or step; names the file.
    """
    scores = result.trajectory_rewards
    table = scores[scores["metric"] == metric].pivot(index="prompt", columns="step", values="value")
    if step not in table.columns:
        raise ValueError(f"{result.run.trajectory_rewards}: no {metric} of step {step}")
    return stats.correlation(table[step].to_numpy(), table.iloc[:, -1].to_numpy())


def metrics_of(results: Sequence[Result]) -> list[str]:
    """Those of METRICS that any of the runs was scored with, in their order."""
    known = {metric for result in results for metric in result.scores.metrics()}
    return [metric for metric in METRICS if metric in known]


def domains(results: Sequence[Result]) -> tuple[list[str], list[str]]:
    """The metrics that any of the runs was trained on, and those that took no part."""
    rewards = {name for result in results for name in result.info["rewards"]}
    known = metrics_of(results)
    return [m for m in known if m in rewards], [m for m in known if m not in rewards]
