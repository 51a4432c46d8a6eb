"""Quality against inference steps and compute, gains and performance profiles."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tafs.report import stats
from tafs.report.bootstrap import nanmean
from tafs.report.figures.style import Look, legend, line, looks
from tafs.report.results import LoadedTable, System
from tafs.report.stats import Array
from tafs.rewards.metrics import METRICS

WIDE = 10  # more systems than this need a wider figure for their legend


def steps(table: LoadedTable) -> Figure:
    """Figure 4: every metric against the number of inference steps, a line per method.

    Each model is sampled with the best of the evaluation's samplers at each number of steps. Lines
    are means over seeds, bands 95 % intervals; the dotted line is the base model at its full steps.
    """
    metrics, nfe = table.metrics, table.spec.curve_nfe
    figure, panels = _panels(metrics, "Inference steps (NFE)")
    for axes, metric in zip(panels, metrics, strict=True):
        axes.set_xticks(list(nfe))
        for system, look in looks(table.distinct).items():
            estimates = [system.estimate(n, metric) for n in nfe]
            _band(axes, nfe, estimates, look, system.label)
            if not system.spec.trained:
                value = system.estimate(system.full_steps, metric).value
                at_full = f"{system.label}, {system.full_steps} steps"
                dots = (0, (1, 2)) if look.line == "-" else (0, (1, 5))
                axes.axhline(value, color=look.colour, linestyle=dots, linewidth=1.2, label=at_full)
    legend(figure, panels[0])
    return figure


def compute(table: LoadedTable) -> Figure:
    """Every metric against training compute, a line per method; all start at their base model.

    Compute is the number of forward passes per image of an iteration, times iterations; a pass
    with gradients counts three (`Method.forward_equivalents`). Bands are 95 % intervals; a vertical
    line marks the cheapest whole training.
    """
    metrics, nfe, trained = table.metrics, table.spec.few_nfe, table.trained
    look_of = looks(table.distinct)
    whole = min(s.spec.forward_equivalents * s.spec.iterations for s in trained)
    figure, panels = _panels(metrics, "Evaluations per image")
    for axes, metric in zip(panels, metrics, strict=True):
        for system in trained:
            base = table.base_of(system).estimate(nfe, metric)
            at = [*system.spec.snapshots, system.spec.iterations]
            estimates = [base, *(system.estimate(nfe, metric, i) for i in at)]
            x = [0.0, *(system.spec.forward_equivalents * i for i in at)]
            _band(axes, x, estimates, look_of[system], system.label)
        axes.set_xscale("symlog", linthresh=whole / 4)
        axes.set_xlim(left=0)
        axes.axvline(whole, color="#999999", linestyle=":", linewidth=0.8)
        ticks = [0.0, whole / 4, whole, 4 * whole]
        axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks], minor=False)
        axes.minorticks_off()
    legend(figure, panels[0])
    return figure


def pareto(table: LoadedTable) -> Figure:
    """Quality against inference steps: which system is best at a given number of steps.

    Quality is the gain on the base model at few steps, in standard deviations of its prompts, as
    the interquartile mean over seeds and metrics. The grey line is the Pareto front: the best that
    is reached with at most that many steps.
    """
    systems, metrics = table.distinct, table.metrics
    nfe, few = table.spec.curve_nfe, table.spec.few_nfe
    drawn = {
        (system, n, metric): system.quality(system.spec.sampler, n, metric)
        for system in systems
        for n in {*nfe, few}
        for metric in metrics
    }
    # The first images of a prompt start from the same noise at every number of steps.
    images = min(values.shape[2] for values in drawn.values())
    front = np.full(len(nfe), -np.inf)
    wide = len(systems) > WIDE
    figure = Figure(figsize=(6.6, 4.2) if wide else (3.8, 3.4), layout="constrained")
    axes = figure.subplots()
    for system, look in looks(systems).items():
        base = table.base_of(system)
        values = []
        for n in nfe:
            effects = [
                stats.effects(
                    drawn[system, n, m][:, :, :images], drawn[base, few, m][:, :, :images]
                )
                for m in metrics
            ]
            values.append(stats.interquartile_mean(np.concatenate(effects)))
        front = np.fmax(front, values)
        axes.plot(nfe, values, **line(look), label=system.label, linewidth=1)
    best = np.maximum.accumulate(front)
    axes.step(nfe, best, where="post", color="#bbbbbb", linewidth=4, zorder=0, label="Pareto front")
    _explain_if_empty(axes, front)
    axes.set_xticks(list(nfe))
    axes.set_xlabel("Inference steps (NFE)")
    axes.set_ylabel("Gain on the base model,\nin standard deviations")
    legend(figure, axes)
    return figure


def hacking(table: LoadedTable) -> Figure:
    """Reward hacking: gain on the trained rewards against gain on the held-out metrics.

    Gains are on the base model at the same few steps, in standard deviations of its prompts, so
    that rewards of different scales can be averaged. Dots are seeds and large markers their means;
    below the dotted diagonal a method gains more on the rewards it was trained on.
    """
    inside, outside = table.domains
    figure = Figure(figsize=(3.6, 3.9), layout="constrained")
    axes = figure.subplots()
    look_of = looks(table.distinct)
    drawn: list[Array] = []
    for system, (x, y) in domain_gains(table).items():
        colour, marker, _ = look_of[system]
        drawn.append(x + y)
        if len(x) > 1:
            axes.plot(x, y, ".", color=colour, alpha=0.5, markersize=3)
        axes.plot(x.mean(), y.mean(), marker, color=colour, markersize=7, label=system.label)
    _explain_if_empty(axes, np.concatenate(drawn))
    axes.axline((0, 0), slope=1, color="#999999", linestyle=":", linewidth=0.8)
    axes.axhline(0, color="#cccccc", linewidth=0.6)
    axes.axvline(0, color="#cccccc", linewidth=0.6)
    for set_label, metrics in ((axes.set_xlabel, inside), (axes.set_ylabel, outside)):
        titles = ", ".join(METRICS[metric].title for metric in metrics)
        set_label(textwrap.fill(f"Gain on {titles}", 44))
    legend(figure, axes)
    return figure


def domain_gains(table: LoadedTable) -> dict[System, tuple[Array, Array]]:
    """Each seed's mean gain on trained rewards and on held-out metrics, by trained system.

    Raises:
        ValueError: every metric is a trained reward.
    """
    inside, outside = table.domains
    if not outside:
        raise ValueError(f"{table.spec.name}: every metric is a trained reward; none is held out")

    def gains(system: System, metrics: Sequence[str]) -> Array:
        return nanmean(np.array([_effects(table, system, metric) for metric in metrics]), 0)

    return {system: (gains(system, inside), gains(system, outside)) for system in table.trained}


def profiles(table: LoadedTable) -> Figure:
    """Performance profiles (Agarwal et al., 2021): the share of a method's scores above a gain.

    A score is the gain of one seed on one metric over the base model at the same few steps, in
    standard deviations of its prompts. The legend gives the interquartile mean.
    """
    look_of = looks(table.distinct)
    gains = {
        system: np.concatenate([_effects(table, system, m) for m in table.metrics])
        for system in table.trained
    }
    everything = np.concatenate(list(gains.values()))
    everything = everything[np.isfinite(everything)]
    figure = Figure(figsize=(3.6, 3.2), layout="constrained")
    axes = figure.subplots()
    _explain_if_empty(axes, everything)
    everything = everything if len(everything) else np.zeros(1)
    margin = 0.05 * float(np.ptp(everything)) + 1e-3
    grid = np.linspace(everything.min() - margin, everything.max() + margin, 400)
    for system, values in gains.items():
        finite = values[np.isfinite(values)]
        above = nanmean(finite[:, None] > grid, 0)
        middle = stats.interquartile_mean(values)
        label = f"{system.label} ({f'{middle:+.2f}' if np.isfinite(middle) else '–'})"
        axes.plot(grid, above, color=look_of[system].colour, label=label)
    axes.set_xlabel("Gain on the base model, in standard deviations")
    axes.set_ylabel("Share of seeds and metrics above it")
    axes.set_ylim(-0.02, 1.02)
    legend(figure, axes)
    return figure


def _explain_if_empty(axes: Axes, gains: Array) -> None:
    """Say in a figure of gains why it shows nothing: see `stats.effects`."""
    if not np.isfinite(gains).any():
        text = "No gains: the base model's scores\ndo not vary over the prompts"
        axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)


def _effects(table: LoadedTable, system: System, metric: str) -> Array:
    """Each seed's gain on the base model of its backbone at few steps; see `stats.effects`."""
    base, nfe = table.base_of(system), table.spec.few_nfe
    own = system.quality(system.spec.sampler, nfe, metric)
    return stats.effects(own, base.quality(base.spec.sampler, nfe, metric))


def _panels(metrics: Sequence[str], xlabel: str) -> tuple[Figure, list[Axes]]:
    """A panel per metric, with its title and unit."""
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    # A single panel is larger, so that its legend fits above it.
    size = max(2.35 * columns + 0.2, 4.0), max(2.0 * rows + 0.5, 3.0)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(metrics) :]:
        axes.set_visible(False)
    for place, metric in enumerate(metrics):
        axes = panels.flat[place]
        if place + columns >= len(metrics):  # nothing below
            axes.set_xlabel(xlabel)
        axes.set_title(METRICS[metric].title)
        axes.set_ylabel(METRICS[metric].unit)
    figure.align_ylabels(panels)
    return figure, list(panels.flat[: len(metrics)])


def _band(
    axes: Axes, x: Sequence[float], estimates: Sequence[stats.Estimate], look: Look, label: str
) -> None:
    """Draw values as a line, and their intervals as a band."""
    low, high = [e.low for e in estimates], [e.high for e in estimates]
    axes.fill_between(x, low, high, color=look.colour, alpha=0.08, linewidth=0)
    axes.plot(x, [e.value for e in estimates], **line(look), label=label)
