"""The experiments' tables, one function per kind of `specs.Kind`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tafs.report import stats
from tafs.report.results import LoadedTable, step_correlation
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
    rows_of,
    samplers_note,
)
from tafs.rewards.metrics import METRICS

SHARED_TIMES = (
    "Time: the median iteration. Jobs that ran at the same time shared the processor, so times are "
    "not comparable; benchmarks/training_loop.py compares them alone."
)


def build(loaded: LoadedTable) -> Table:
    """The table of an experiment, of its kind.

    Raises:
        ValueError: an input is missing or broken; names it.
    """
    table = BUILD[loaded.spec.kind](loaded)
    if loaded.spec.kind == "correlation":  # of annealed trajectories
        return table
    note = samplers_note(table.rows)
    return replace(table, notes=[*table.notes, *([note] if note else [])])


def _scores_table(loaded: LoadedTable) -> Table:
    """Network evaluations, iteration times and all metrics."""
    spec = loaded.spec
    columns: list[Column] = [NFE_OLD, NFE_THETA, TIME, *map(Score, loaded.metrics)]
    trained = [result.spec for result in loaded.results if result.spec.trained]
    # A training that claims its GPUs has them to itself.
    shared = any(run.assets.device != "cuda" for run in trained)
    notes = [SHARED_TIMES] if shared else []
    return Table(spec.name, spec.caption, rows_of(loaded), columns, spec.header, notes)


def _compute_table(loaded: LoadedTable) -> Table:
    """All metrics after the part of the training that the common budget pays for."""
    spec = loaded.spec
    columns: list[Column] = [ITERATIONS, COMPUTE, *map(Score, loaded.metrics)]
    note = (
        "Evaluations: forward passes of the network per image of an iteration, times iterations; "
        "one with gradients counts three. The number of iterations is the largest that the budget "
        "pays for, and at most that of the whole training."
    )
    return Table(spec.name, spec.caption, rows_of(loaded), columns, spec.header, [note])


def _gains_table(loaded: LoadedTable) -> Table:
    """Interquartile gains on the base model, and how often a prompt improves."""
    spec = loaded.spec
    rows = rows_of(loaded)
    bases = {row.spec.backbone: row for row in rows if not row.system.spec.trained}
    trained = [row for row in rows if row.system.spec.trained]
    rivals = {
        row.spec.backbone: row for row in trained if row.spec.variant == spec.compute_reference
    }
    for row in trained:
        loaded.base_of(row.system)

    def values(row: Row, metrics: Sequence[str]) -> list[stats.Array]:
        return [row.quality(metric) for metric in metrics]

    def gain(metrics: Sequence[str]) -> Callable[[Row], stats.Estimate]:
        def estimate(row: Row) -> stats.Estimate:
            base = bases[row.spec.backbone]
            tags = row.system.scores.tags
            return stats.interquartile_effect(values(row, metrics), values(base, metrics), tags)

        return estimate

    def improvement(others: Mapping[str, Row]) -> Callable[[Row], stats.Estimate]:
        def estimate(row: Row) -> stats.Estimate:
            other = others.get(row.spec.backbone)
            if other is None or other is row:  # no rival, or the rival itself
                return stats.NOTHING
            tags = row.system.scores.tags
            return stats.probability_of_improvement(values(row, known), values(other, known), tags)

        return estimate

    known = loaded.metrics
    groups = dict(zip(("Trained rewards", "Other metrics"), loaded.domains, strict=True))
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
        rival = next(iter(rivals.values())).spec.label
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
    beside = [row.system for row in bases.values()]
    variance = {
        row.spec.label: {
            m: stats.variance_components(METRICS[m].factor * row.values(m))._asdict() for m in known
        }
        for row in trained
        if len(row.system.results) > 1
    }
    details = {"variance": variance}
    return Table(spec.name, spec.caption, trained, columns, spec.header, notes, beside, details)


def _correlation_table(loaded: LoadedTable) -> Table:
    """Pearson's r between earlier images' rewards and the final image's, one row per step."""
    spec = loaded.spec
    several = len({row.backbone for row in spec.rows}) > 1
    rows = []
    for row in rows_of(loaded):
        last = int(row.system.results[0].trajectory_rewards["step"].max())
        for step in range(2, last):
            label = f"R{step} with R{last}" + (f", {row.spec.label}" if several else "")
            changes = {"label": label, "nfe": step, "sampler": "anneal"}
            rows.append(replace(row, spec=row.spec.model_copy(update=changes)))

    def correlation(metric: str) -> Callable[[Row], stats.Estimate]:
        return lambda row: step_correlation(row.system.results[0], metric, row.spec.nfe)

    rewards = loaded.results[0].trajectory_rewards
    known = set(rewards["metric"])
    columns = [
        Statistic(f"{m}_r", METRICS[m].title, 2, correlation(m), f"{m}_r")
        for m in METRICS
        if m in known
    ]
    prompts = rewards["prompt"].nunique()
    note = (
        f"Pearson's r over {prompts:,} training prompts, one annealed trajectory of each; R2 is "
        "the reward of the image at the second evaluation. GenEval is the graded training reward."
    )
    return Table(spec.name, spec.caption, rows, columns, spec.header, [note])


BUILD: Mapping[str, Callable[[LoadedTable], Table]] = {
    "scores": _scores_table,
    "compute": _compute_table,
    "gains": _gains_table,
    "correlation": _correlation_table,
}
