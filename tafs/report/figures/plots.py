"""The figures, as PNG (200 dpi) and PDF. Files in, files out; equal input gives equal bytes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tafs.report import stats
from tafs.report.figures.image_grid import image_grid
from tafs.report.figures.learning_curves import learning_curves
from tafs.report.figures.style import Look, _legend, _line, _looks, _save, _style
from tafs.report.results import (
    System,
    check_paired,
    domains,
    metrics_of,
    read_results,
    systems_of,
)
from tafs.report.stats import Array
from tafs.rewards.metrics import METRICS
from tafs.runtime import run_dir

UNITS = {
    "geneval": "accuracy (%)",
    "pickscore": "score",
    "clip": "100 × cosine",
    "hpsv2": "score",
    "imagereward": "score",
    "unifiedreward": "score (1 to 5)",
}


def draw(
    kind: str, name: str, spec: Mapping[str, Any], run_dirs: Sequence[Path], out_dir: Path
) -> list[Path]:
    """One of config.FIGURES as NAME.png and NAME.pdf.

    Args:
        spec: the experiment's entry of `config.tables`.

    Raises:
        ValueError: an input is missing or broken; names it.
    """
    few, curve = (spec["evaluation"][key] for key in ("few", "curve"))
    if kind == "images":
        captions = [prompt.text for prompt in run_dir.RunDir(run_dirs[0]).test_prompts()]
        return image_grid(run_dirs, out_dir, name=name, captions=captions, nfe=few)
    given: dict[str, dict[str, Any]] = {
        "steps": {"nfe": curve},
        "pareto": {"nfe": curve, "few": few},
        "compute": {"nfe": few},
        "curves": {},
        "hacking": {"nfe": few},
        "profiles": {"nfe": few},
    }
    return DRAW[kind](run_dirs, out_dir, name=name, **given[kind])


def figure4(
    run_dirs: Iterable[Path | str],
    out_dir: Path | str,
    *,
    name: str = "figure4",
    nfe: Sequence[int],
) -> list[Path]:
    """Figure 4: every metric against the number of inference steps, a line a method.

    Each method is sampled with its own few-step sampler. Lines are means over seeds, bands 95 %
    intervals; the dotted line is the base model at its full steps.

    Raises:
        ValueError: an input is missing or broken; names it.
    """
    results = read_results(run_dirs)
    systems = systems_of(results)
    looks = _looks(systems)
    metrics = metrics_of(results)
    with _style():
        figure, panels = _panels(metrics, "Inference steps (NFE)")
        for axes, metric in zip(panels, metrics, strict=True):
            axes.set_xticks(list(nfe))
            for system, look in zip(systems, looks, strict=True):
                estimates = [_estimate(system, n, metric) for n in nfe]
                _band(axes, nfe, estimates, look, system.label)
                if not system.trained:
                    value = _estimate(system, system.full_steps, metric).value
                    at_full = f"{system.label}, {system.full_steps} steps"
                    dots = (0, (1, 2)) if look.line == "-" else (0, (1, 5))
                    axes.axhline(
                        value, color=look.colour, linestyle=dots, linewidth=1.2, label=at_full
                    )
        _legend(figure, panels[0])
        return _save(figure, out_dir, name, systems)


def compute(
    run_dirs: Iterable[Path | str], out_dir: Path | str, *, name: str = "compute", nfe: int
) -> list[Path]:
    """Every metric against training compute, a line a method; all start at their base model.

    Compute is the number of forward passes of the network per image of an iteration, times
    iterations; one with gradients counts three (`Method.forward_equivalents`). Bands are 95 % intervals; a
    vertical line marks the least that any whole training takes.

    Raises:
        ValueError: no run is trained or a base model is missing, or an input is broken; names it.
    """
    results = read_results(run_dirs)
    systems = systems_of(results)
    trained = [system for system in systems if system.trained]
    if not trained:
        raise ValueError("no trained run among the given ones")
    looks = dict(zip((s.label for s in systems), _looks(systems), strict=True))
    metrics = metrics_of(results)
    whole = min(float(s.info["forward_equivalents"] * s.info["iterations"]) for s in trained)
    with _style():
        figure, panels = _panels(metrics, "Evaluations per image")
        for axes, metric in zip(panels, metrics, strict=True):
            for system in trained:
                base = _estimate(_base_of(system, systems), nfe, metric)
                at = [*system.info["snapshots"], system.info["iterations"]]
                estimates = [base, *(_estimate(system, nfe, metric, i) for i in at)]
                x = [0.0, *(float(system.info["forward_equivalents"] * i) for i in at)]
                _band(axes, x, estimates, looks[system.label], system.label)
            axes.set_xscale("symlog", linthresh=whole / 4)
            axes.set_xlim(left=0)
            axes.axvline(whole, color="#999999", linestyle=":", linewidth=0.8)
            ticks = [0.0, whole / 4, whole, 4 * whole]
            axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks], minor=False)
            axes.minorticks_off()
        _legend(figure, panels[0])
        return _save(figure, out_dir, name, systems)


def pareto(
    run_dirs: Iterable[Path | str],
    out_dir: Path | str,
    *,
    name: str = "pareto",
    nfe: Sequence[int],
    few: int,
) -> list[Path]:
    """Quality against inference steps: which system is best for a given number of steps.

    Quality is the gain on the base model at `few` steps, in standard deviations of its prompts,
    interquartile mean over seeds and metrics. The grey line is the Pareto front: the best that so
    many steps or fewer reach.

    Raises:
        ValueError: a base model is missing, or an input is missing or broken; names it.
    """
    systems = systems_of(read_results(run_dirs))
    looks = _looks(systems)
    metrics = metrics_of([result for system in systems for result in system.results])
    drawn = {
        (system.label, n, metric): system.values(system.sampler, n, metric)
        for system in systems
        for n in {*nfe, few}
        for metric in metrics
    }
    # The first images of a prompt start from the same noise at every number of steps.
    images = min(values.shape[2] for values in drawn.values())
    front = np.full(len(nfe), -np.inf)
    with _style():
        figure = Figure(figsize=(3.8, 3.4), layout="constrained")
        axes = figure.subplots()
        for system, look in zip(systems, looks, strict=True):
            base = _base_of(system, systems).label
            values = []
            for n in nfe:
                effects = [
                    stats.effects(
                        drawn[system.label, n, m][:, :, :images],
                        drawn[base, few, m][:, :, :images],
                    )
                    for m in metrics
                ]
                values.append(stats.interquartile_mean(np.concatenate(effects)))
            front = np.maximum(front, values)
            axes.plot(nfe, values, **_line(look), label=system.label, linewidth=1)
        best = np.maximum.accumulate(front)
        axes.step(
            nfe, best, where="post", color="#bbbbbb", linewidth=4, zorder=0, label="Pareto front"
        )
        axes.set_xticks(list(nfe))
        axes.set_xlabel("Inference steps (NFE)")
        axes.set_ylabel("Gain on the base model,\nin standard deviations")
        _legend(figure, axes, columns=3)
        return _save(figure, out_dir, name, systems)


def hacking(
    run_dirs: Iterable[Path | str], out_dir: Path | str, *, name: str = "hacking", nfe: int
) -> list[Path]:
    """Reward hacking: gain on the trained rewards against gain on metrics that took no part.

    Gains are on the base model at the same few steps, in standard deviations of its prompts, so
    that rewards of different scales can be averaged. A dot a seed, a large marker their mean; below
    the dotted diagonal a method gains more where it was trained.

    Raises:
        ValueError: no base model is among the runs, or an input is missing or broken; names it.
    """
    systems = _with_trained(run_dirs)
    inside, outside = domains([result for system in systems for result in system.results])
    if not outside:
        raise ValueError("every metric is a trained reward: none is left to judge by")
    looks = _looks(systems)
    with _style():
        figure = Figure(figsize=(3.6, 3.9), layout="constrained")
        axes = figure.subplots()
        for system, (colour, marker, _) in zip(systems, looks, strict=True):
            if not system.trained:
                continue
            x, y = (
                np.mean([_effects(system, systems, nfe, metric) for metric in metrics], axis=0)
                for metrics in (inside, outside)
            )
            if len(x) > 1:
                axes.plot(x, y, ".", color=colour, alpha=0.5, markersize=3)
            label = system.label
            axes.plot(x.mean(), y.mean(), marker, color=colour, markersize=7, label=label)
        axes.axline((0, 0), slope=1, color="#999999", linestyle=":", linewidth=0.8)
        axes.axhline(0, color="#cccccc", linewidth=0.6)
        axes.axvline(0, color="#cccccc", linewidth=0.6)
        for set_label, metrics in ((axes.set_xlabel, inside), (axes.set_ylabel, outside)):
            titles = ", ".join(METRICS[metric].title for metric in metrics)
            set_label(textwrap.fill(f"Gain on {titles}", 44))
        _legend(figure, axes, columns=2)
        return _save(figure, out_dir, name, systems)


def profiles(
    run_dirs: Iterable[Path | str], out_dir: Path | str, *, name: str = "profiles", nfe: int
) -> list[Path]:
    """Performance profiles (Agarwal et al., 2021): the share of a method's scores above a gain.

    A score is one seed's gain on one metric, over the base model at the same few steps, in standard
    deviations of its prompts; the legend gives their interquartile mean.

    Raises:
        ValueError: no base model is among the runs, or an input is missing or broken; names it.
    """
    systems = _with_trained(run_dirs)
    looks = _looks(systems)
    metrics = metrics_of([result for system in systems for result in system.results])
    gains = {
        system.label: np.concatenate([_effects(system, systems, nfe, m) for m in metrics])
        for system in systems
        if system.trained
    }
    everything = np.concatenate(list(gains.values()))
    margin = 0.05 * float(np.ptp(everything)) + 1e-3
    grid = np.linspace(everything.min() - margin, everything.max() + margin, 400)
    with _style():
        figure = Figure(figsize=(3.6, 3.2), layout="constrained")
        axes = figure.subplots()
        for system, (colour, _, _) in zip(systems, looks, strict=True):
            if system.trained:
                values = gains[system.label]
                above = (values[:, None] > grid).mean(0)
                label = f"{system.label} ({stats.interquartile_mean(values):+.2f})"
                axes.plot(grid, above, color=colour, label=label)
        axes.set_xlabel("Gain on the base model, in standard deviations")
        axes.set_ylabel("Share of seeds and metrics above it")
        axes.set_ylim(-0.02, 1.02)
        _legend(figure, axes, columns=2)
        return _save(figure, out_dir, name, systems)


def _with_trained(run_dirs: Iterable[Path | str]) -> list[System]:
    systems = systems_of(read_results(run_dirs))
    if not any(system.trained for system in systems):
        raise ValueError("no trained run among the given ones")
    return systems


def _base_of(system: System, systems: Sequence[System]) -> System:
    """The base model of a system's backbone.

    Raises:
        ValueError: it is not there, or was scored with other prompts; names it.
    """
    backbone = system.info["backbone"]
    bases = [s for s in systems if not s.trained and s.info["backbone"] == backbone]
    if not bases:
        raise ValueError(f"no run of the base model {backbone!r} among the given ones")
    check_paired(system.results[0].scores, bases[0].results[0].scores)
    return bases[0]


def _effects(system: System, systems: Sequence[System], nfe: int, metric: str) -> Array:
    """Each seed's gain on the base model of its backbone; see `stats.effects`."""
    base = _base_of(system, systems)
    own = system.values(system.sampler, nfe, metric)
    return stats.effects(own, base.values(base.sampler, nfe, metric))


def _estimate(
    system: System, nfe: int, metric: str, iteration: int | None = None
) -> stats.Estimate:
    """With the system's own sampler, on the reported scale."""
    values = METRICS[metric].factor * system.values(system.sampler, nfe, metric, iteration)
    tags = system.results[0].scores.tags
    return stats.mean_interval(values, tags, macro=METRICS[metric].macro)


def _panels(metrics: Sequence[str], xlabel: str) -> tuple[Figure, list[Axes]]:
    """A panel a metric, with its title and units."""
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(2.35 * columns + 0.2, 2.0 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(metrics) :]:
        axes.set_visible(False)
    for place, metric in enumerate(metrics):
        axes = panels.flat[place]
        if place + columns >= len(metrics):  # nothing below
            axes.set_xlabel(xlabel)
        axes.set_title(METRICS[metric].title)
        axes.set_ylabel(UNITS[metric])
    figure.align_ylabels(panels)
    return figure, list(panels.flat[: len(metrics)])


def _band(
    axes: Axes,
    x: Sequence[float],
    estimates: Sequence[stats.Estimate],
    look: Look,
    label: str,
) -> None:
    """A line of values in the band of their intervals."""
    low, high = [e.low for e in estimates], [e.high for e in estimates]
    axes.fill_between(x, low, high, color=look.colour, alpha=0.15, linewidth=0)
    axes.plot(x, [e.value for e in estimates], **_line(look), label=label)


DRAW: dict[str, Callable[..., list[Path]]] = {
    "steps": figure4,
    "pareto": pareto,
    "compute": compute,
    "curves": learning_curves,
    "images": image_grid,
    "hacking": hacking,
    "profiles": profiles,
}
