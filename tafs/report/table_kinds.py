"""The experiments' tables, one function a kind of `config.Kind`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tafs.report import stats
from tafs.report.formats import write
from tafs.report.results import (
    Result,
    System,
    check_paired,
    domains,
    metrics_of,
    read_results,
    select,
    step_correlation,
)
from tafs.report.stats import Array
from tafs.report.tables import (
    COMPUTE,
    ITERATIONS,
    NFE_OLD,
    NFE_THETA,
    TIME,
    Column,
    Row,
    Score,
    Statistic,
    Table,
)
from tafs.rewards.metrics import METRICS
from tafs.runtime import run_dir


def write_table(
    spec: Mapping[str, Any],
    run_dirs: Iterable[Path | str],
    out_dir: Path | str,
    *,
    scale: str | None = None,
) -> list[Path]:
    """The table of an experiment, an entry of `config.tables`, of its kind.

    Args:
        run_dirs: the folders of the rows' runs.
        scale: None takes the runs' own; the paper's values stand beside ours only where it is
            "paper".

    Returns:
        The written files.

    Raises:
        ValueError: an input is missing or broken; names it.
    """
    results = read_results(run_dirs)
    if scale is None:
        scale = _common_scale(results)
    table = BUILD[spec["kind"]](spec, results)
    return write(table, results, out_dir, published=scale == "paper")


def _scores_table(spec: Mapping[str, Any], results: Sequence[Result]) -> Table:
    """Counts, times and all metrics."""
    columns: list[Column] = [NFE_OLD, NFE_THETA, TIME, *map(Score, metrics_of(results))]
    return Table(spec["name"], spec["caption"], _rows(spec), columns, header=spec["header"])


def _compute_table(spec: Mapping[str, Any], results: Sequence[Result]) -> Table:
    """All metrics after a share of the training."""
    columns: list[Column] = [ITERATIONS, COMPUTE, *map(Score, metrics_of(results))]
    note = (
        "Evaluations: forward passes of the network per image of an iteration, times iterations; "
        "one with gradients counts three. The number of iterations is the largest that the deadline "
        "pays for, and at most that of the whole training."
    )
    return Table(
        spec["name"], spec["caption"], _rows(spec), columns, header=spec["header"], notes=[note]
    )


def _gains_table(spec: Mapping[str, Any], results: Sequence[Result]) -> Table:
    """Interquartile gains on the base model, and how often a prompt gets better."""
    rows = _rows(spec)
    bases = {row.where["backbone"]: row for row in rows if row.where["variant"] == run_dir.BASE}
    trained = [row for row in rows if row.where["variant"] != run_dir.BASE]
    rivals = {
        row.where["backbone"]: row for row in trained if row.where["variant"] == spec["reference"]
    }
    for row in trained:
        if row.where["backbone"] not in bases:
            raise ValueError(
                f"{spec['name']}: no base model {row.where['backbone']!r}; set base: true"
            )

    def values(row: Row, metrics: Sequence[str]) -> list[Array]:
        system = select(results, row.where)
        return [system.values(row.sampler or system.sampler, row.nfe, m) for m in metrics]

    def gain(metrics: Sequence[str]) -> Callable[[System, Row], stats.Estimate]:
        def estimate(system: System, row: Row) -> stats.Estimate:
            base = bases[row.where["backbone"]]
            tags = system.results[0].scores.tags
            check_paired(system.results[0].scores, select(results, base.where).results[0].scores)
            return stats.interquartile_effect(values(row, metrics), values(base, metrics), tags)

        return estimate

    def improvement(others: Mapping[str, Row]) -> Callable[[System, Row], stats.Estimate]:
        def estimate(system: System, row: Row) -> stats.Estimate:
            other = others.get(row.where["backbone"])
            if other is None or other is row:  # no rival, or the rival itself
                nan = float("nan")
                return stats.Estimate(nan, nan, nan, 0, 0, 0, "", 1.0)
            tags = system.results[0].scores.tags
            return stats.probability_of_improvement(values(row, known), values(other, known), tags)

        return estimate

    known = metrics_of(results)
    groups = dict(zip(("Trained rewards", "Other metrics"), domains(results), strict=True))
    rival = select(results, rivals[next(iter(rivals))].where).label if rivals else ""
    columns: list[Column] = [
        *(
            Statistic(f"iqm_{title.split()[0].lower()}", title, 2, gain(metrics))
            for title, metrics in groups.items()
            if metrics
        ),
        Statistic("iqm_all", "All metrics", 2, gain(known)),
        Statistic("better_than_base", "P(better than base)", 3, improvement(bases)),
    ]
    if rivals:
        title = f"P(better than {rival})"
        columns.append(Statistic("better_than_reference", title, 3, improvement(rivals)))
    notes = [
        "Gains on the base model at the same steps, in standard deviations of its prompts: the "
        "interquartile mean over seeds and metrics.",
        *(
            f"{title}: {', '.join(METRICS[m].title for m in metrics)}."
            for title, metrics in groups.items()
            if metrics
        ),
        "P: how often a prompt's images are better, over all metrics and pairs of seeds; ties "
        "count half.",
    ]
    beside = list(bases.values())
    return Table(spec["name"], spec["caption"], trained, columns, spec["header"], notes, beside)


def _correlation_table(spec: Mapping[str, Any], results: Sequence[Result]) -> Table:
    """Pearson's r of earlier images' rewards with the final image's, a row a step."""
    rows = []
    for row in _rows(spec):
        scores = select(results, row.where).results[0].trajectory_rewards
        last = int(scores["step"].max())
        several = len({r["backbone"] for r in spec["rows"]}) > 1
        for step in range(2, last):
            label = f"R{step} with R{last}" + (f", {row.label}" if several else "")
            rows.append(replace(row, label=label, nfe=step, published=label, sampler="anneal"))

    def correlation(metric: str) -> Callable[[System, Row], stats.Estimate]:
        return lambda system, row: step_correlation(system.results[0], metric, row.nfe)

    known = set(results[0].trajectory_rewards["metric"])
    columns = [
        Statistic(f"{m}_r", METRICS[m].title, 2, correlation(m), f"{m}_r")
        for m in METRICS
        if m in known
    ]
    prompts = results[0].trajectory_rewards["prompt"].nunique()
    note = (
        f"Pearson's r over {prompts:,} training prompts, one annealed trajectory of each; R2 is "
        "the reward of the image at the second evaluation. GenEval is the graded training reward."
    )
    return Table(spec["name"], spec["caption"], rows, columns, spec["header"], [note])


BUILD: Mapping[str, Callable[[Mapping[str, Any], Sequence[Result]], Table]] = {
    "scores": _scores_table,
    "compute": _compute_table,
    "gains": _gains_table,
    "correlation": _correlation_table,
}


def _rows(spec: Mapping[str, Any]) -> list[Row]:
    return [
        Row(
            where={key: row[key] for key in ("variant", "task", "backbone")},
            nfe=row["nfe"],
            sampler=row["sampler"],
            label=row["label"],
            iteration=row["iteration"],
            published=row["label"],
            first=_first_of_its_runs(row, spec["rows"]),
            rule=row["rule"],
        )
        for row in spec["rows"]
    ]


def _first_of_its_runs(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    keys = ("variant", "task", "backbone")
    return next(r for r in rows if all(r[key] == row[key] for key in keys)) is row


def _common_scale(results: Sequence[Result]) -> str:
    first = results[0]
    for result in results:
        if result.info["scale"] != first.info["scale"]:
            raise ValueError(
                f"{result.run.folder}: scale {result.info['scale']!r}, but {first.run.folder} has "
                f"{first.info['scale']!r}"
            )
    return str(first.info["scale"])
