"""The numbers behind the page's charts; every statistic is one of tafs.report.stats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tafs.report import stats
from tafs.report.bootstrap import nanmean
from tafs.report.figures import plots
from tafs.report.page.content import interval, number
from tafs.report.page.sprites import kept_prompts
from tafs.report.page.systems import Systems
from tafs.report.results import LoadedTable, Report, System
from tafs.report.tables import Line, Row, Score, Table
from tafs.rewards.metrics import METRICS

TOGETHER = "*"  # all metrics in one number; no metric has this name


def with_figure(report: Report, kind: str) -> list[LoadedTable]:
    """The tables that have a figure of this kind."""
    return [table for table in report.tables if kind in table.spec.figures]


def matrices(
    report: Report, tables: Sequence[tuple[Table, Sequence[Line]]]
) -> dict[str, dict[str, Any]]:
    """How often each row of a table is better than each other one, for every table of scores.

    P-values are Holm's for all pairs of rows in one metric.
    """
    loaded = {table.spec.name: table for table in report.tables}
    found = {}
    for built, lines in tables:
        rows = [line.row for line in lines]
        if len(rows) > 1 and any(isinstance(column, Score) for column in built.columns):
            found[built.name] = _matrix(loaded[built.name], rows)
    return found


def _resampling(comparisons: int) -> stats.Resampling:
    """Resamples that let Holm's correction find something in any number of comparisons.

    The smallest p-value is 2 / (1 + resamples), and the correction multiplies it.
    """
    return stats.Resampling(max(stats.RESAMPLES, round(5 / (1 - stats.LEVEL)) * comparisons))


def _matrix(table: LoadedTable, rows: Sequence[Row]) -> dict[str, Any]:
    pairs = [(i, j) for i in range(len(rows)) for j in range(i + 1, len(rows))]
    values = {metric: [row.quality(metric) for row in rows] for metric in table.metrics}
    tags = rows[0].system.scores.tags
    wins = {}
    for name, chosen in [(TOGETHER, table.metrics), *((m, [m]) for m in table.metrics)]:
        estimates = [
            stats.probability_of_improvement(
                [values[m][i] for m in chosen],
                [values[m][j] for m in chosen],
                tags,
                by=_resampling(len(pairs)),
            )
            for i, j in pairs
        ]
        adjusted = stats.holm([estimate.p_value for estimate in estimates])
        wins[name] = [
            [i, j, *interval(estimate), number(p)]
            for (i, j), estimate, p in zip(pairs, estimates, adjusted, strict=True)
        ]
    return {
        "rows": [f"{row.spec.label}, {row.spec.nfe}" for row in rows],
        # A system that is trained with one seed decides nothing.
        "decides": [not r.system.spec.trained or len(r.system.results) > 1 for r in rows],
        "wins": wins,
    }


def steps(report: Report, systems: Systems) -> dict[str, dict[str, Any]]:
    """Every metric against the number of inference steps: {table: {metric: {system: points}}}."""
    return {
        table.spec.name: {
            metric: {
                systems.key(system): [
                    [nfe, *interval(system.estimate(nfe, metric))] for nfe in table.spec.curve_nfe
                ]
                for system in table.distinct
            }
            for metric in table.metrics
        }
        for table in with_figure(report, "steps")
    }


def compute(report: Report, systems: Systems) -> dict[str, dict[str, Any]]:
    """Quality against training compute: {table: {metric: {system: points}}}, as in the figure.

    TOGETHER is the interquartile gain on the base model over all metrics.
    """
    found = {}
    for table in with_figure(report, "compute"):
        names = [TOGETHER, *table.metrics]
        found[table.spec.name] = {
            name: {
                systems.key(system): [
                    [number(x), *interval(estimate)]
                    for x, estimate in _over_compute(table, system, name)
                ]
                for system in table.trained
            }
            for name in names
        }
    return found


def _over_compute(
    table: LoadedTable, system: System, name: str
) -> Iterator[tuple[float, stats.Estimate]]:
    base, nfe = table.base_of(system), table.spec.few_nfe
    if name == TOGETHER:
        yield 0.0, stats.NOTHING._replace(value=0.0, low=0.0, high=0.0)
    else:
        yield 0.0, base.estimate(nfe, name)
    for iteration in [*system.spec.snapshots, system.spec.iterations]:
        x = system.spec.forward_equivalents * iteration
        if name == TOGETHER:
            yield x, _gain(table, system, base, table.metrics, iteration)
        else:
            yield x, system.estimate(nfe, name, iteration)


def _gain(
    table: LoadedTable,
    system: System,
    base: System,
    metrics: Sequence[str],
    iteration: int | None = None,
) -> stats.Estimate:
    """The interquartile gain on the base model at few steps, over the images that both drew."""
    nfe = table.spec.few_nfe
    pairs = [
        (
            system.quality(system.spec.sampler, nfe, m, iteration),
            base.quality(base.spec.sampler, nfe, m),
        )
        for m in metrics
    ]
    images = min(array.shape[2] for pair in pairs for array in pair)
    own, other = ([x[:, :, :images] for x in side] for side in zip(*pairs, strict=True))
    return stats.interquartile_effect(own, other, system.scores.tags)


def gains(report: Report, systems: Systems) -> dict[str, dict[str, Any]]:
    """Gains on metrics that were trained on and on others, in standard deviations of the base."""
    found = {}
    for table in with_figure(report, "hacking"):
        inside, outside = table.domains
        rows = {}
        for system, (x, y) in plots.domain_gains(table).items():
            base = table.base_of(system)
            rows[systems.key(system)] = {
                "seeds": [[number(a), number(b)] for a, b in zip(x, y, strict=True)],
                "mean": [number(float(np.mean(x))), number(float(np.mean(y)))],
                "metrics": {m: interval(_gain(table, system, base, [m])) for m in table.metrics},
            }
        found[table.spec.name] = {"trained": inside, "others": outside, "systems": rows}
    return found


def prompts(report: Report, systems: Systems) -> dict[str, dict[str, Any]]:
    """By system: the gains on the base model by task, and the scores of prompts with images.

    At the few steps of the first table that has the system, with the system's own sampler.
    """
    found: dict[str, dict[str, Any]] = {}
    for table in report.tables:
        if table.spec.kind == "correlation":
            continue
        for system in table.distinct:
            key = systems.key(system)
            if key not in found and _is_scored(system, table.spec.few_nfe):
                found[key] = _by_prompt(table, system, systems)
    return found


def _is_scored(system: System, nfe: int) -> bool:
    settings = system.scores.settings(system.spec.iterations)
    return (system.spec.sampler, nfe) in settings


def _by_prompt(table: LoadedTable, system: System, systems: Systems) -> dict[str, Any]:
    nfe, scores = table.spec.few_nfe, system.scores
    metrics = [m for m in table.metrics if m in scores.metrics()]
    place = {prompt: i for i, prompt in enumerate(scores.prompts)}
    kept = [place[prompt] for prompt in kept_prompts(system.results[0])]
    record: dict[str, Any] = {
        "nfe": nfe,
        "means": {
            m: [number(float(x)) for x in nanmean(_shown(system, nfe, m), (0, 2))[kept]]
            for m in metrics
        },
    }
    bases = [s for s in table.distinct if not s.spec.trained]
    base = next((s for s in bases if s.spec.backbone == system.spec.backbone), None)
    if not system.spec.trained or base is None or not _is_scored(base, nfe):
        return record
    tags = np.asarray(scores.tags)
    tasks = {"": np.ones(len(tags), bool), **{tag: tags == tag for tag in dict.fromkeys(tags)}}
    record["base"] = systems.key(base)
    record["tasks"] = {
        m: {
            str(task): interval(
                stats.paired_difference(
                    _shown(system, nfe, m)[:, of],
                    _shown(base, nfe, m)[:, of],
                    list(tags[of]),
                    macro=METRICS[m].macro,
                )
            )
            for task, of in tasks.items()
        }
        for m in metrics
    }
    return record


def _shown(system: System, nfe: int, metric: str) -> stats.Array:
    """Scores on the shown scale, [seeds, prompts, images]."""
    return METRICS[metric].factor * system.values(system.spec.sampler, nfe, metric)
