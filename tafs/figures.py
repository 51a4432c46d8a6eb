"""The figures, as PNG (200 dpi) and PDF. Files in, files out; equal input gives equal bytes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from safetensors import SafetensorError, safe_open

from tafs import rundir, stats
from tafs.results import (
    METRICS,
    Result,
    System,
    check_paired,
    domains,
    metrics_of,
    read_results,
    systems_of,
)
from tafs.stats import Array

DPI = 200

# Okabe & Ito's colours, which colour-blind readers tell apart; a method looks the same everywhere,
# but for the line, which tells the models apart on which it was trained.
LOOKS = {
    "base": ("#4d4d4d", "o"),
    "tafs_grpo": ("#d55e00", "D"),
    "flow_grpo": ("#0072b2", "s"),
    "mix_grpo": ("#009e73", "^"),
    "dance_grpo": ("#cc79a7", "v"),
    "rg_lcd": ("#e69f00", "P"),
    "reward_instruct": ("#56b4e9", "X"),
}
OTHERS = (
    ("#882255", "p"),
    ("#999933", "h"),
    ("#332288", "<"),
    ("#44aa99", ">"),
    ("#661100", "*"),
    ("#117733", "8"),
    ("#aa4499", "d"),
    ("#ddcc77", "H"),
    ("#88ccee", "p"),
    ("#6699cc", "s"),
)

ROWS = 12  # of prompts in a grid of images
LINES = ("-", "--", "-.", ":")

UNITS = {
    "geneval": "accuracy (%)",
    "pickscore": "score",
    "clip": "100 × cosine",
    "hpsv2": "score",
    "imagereward": "score",
    "unifiedreward": "score (1 to 5)",
}

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 8,
    "text.parse_math": False,  # a prompt or a title may hold dollar signs
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "pdf.fonttype": 42,  # TrueType, embedded
    "savefig.dpi": DPI,
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
        captions = [prompt.text for prompt in rundir.RunDir(run_dirs[0]).test_prompts()]
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
    iterations; one with gradients counts three (`Method.cost`). Bands are 95 % intervals; a
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
    whole = min(float(s.info["cost"] * s.info["iterations"]) for s in trained)
    with _style():
        figure, panels = _panels(metrics, "Evaluations per image")
        for axes, metric in zip(panels, metrics, strict=True):
            for system in trained:
                base = _estimate(_base_of(system, systems), nfe, metric)
                at = [*system.info["snapshots"], system.info["iterations"]]
                estimates = [base, *(_estimate(system, nfe, metric, i) for i in at)]
                x = [0.0, *(float(system.info["cost"] * i) for i in at)]
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


def learning_curves(
    run_dirs: Iterable[Path | str], out_dir: Path | str, *, name: str = "learning_curves"
) -> list[Path]:
    """Each training reward of the final image against iterations, and against compute time.

    Thin lines are the seeds. Thick ones are their mean and bands their range, of running means over
    an eighth of the iterations: every iteration draws other prompts, which hides the trend. Compute
    time counts iterations at their median time, as tables have it: runs disturb one another.

    Raises:
        ValueError: no run is trained, or an input is missing or broken; names it.
    """
    results = read_results(run_dirs)
    systems = systems_of(results)
    looks = dict(zip((s.label for s in systems), _looks(systems), strict=True))
    trained = [system for system in systems if system.trained]
    if not trained:
        raise ValueError("no trained run among the given ones")
    names = _training_rewards(trained)
    pace = {
        s.label: float(np.median(np.concatenate([r.seconds() for r in s.results]))) for s in trained
    }
    longest = max(pace[s.label] * len(r.iterations) for s in trained for r in s.results)
    larger = (unit for unit in (("h", 3600), ("min", 60)) if longest > 5 * unit[1])
    unit, scale = next(larger, ("s", 1))
    window = max(1, min(len(r.iterations) for s in trained for r in s.results) // 8)
    with _style():
        size = (3.2 * len(names) + 0.2, 4.7)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(2, len(names), squeeze=False, sharey="col")
        for j, reward in enumerate(names):
            title = METRICS[reward].title if reward in METRICS else reward
            panels[0, j].set_title(title)
            for axes, xlabel in zip(
                panels[:, j], ("Iteration", f"Compute time ({unit})"), strict=True
            ):
                axes.set_xlabel(xlabel)
            panels[0, j].xaxis.set_major_locator(MaxNLocator(integer=True))
            for system in trained:
                curves = [_reward(result, reward) for result in system.results]
                if any(curve is None for curve in curves):
                    continue
                rewards = [curve for curve in curves if curve is not None]
                colour, label = looks[system.label].colour, system.label
                numbers = [
                    np.array([r["iteration"] for r in result.iterations], dtype=float)
                    for result in system.results
                ]
                clock = [(number + 1) * pace[label] / scale for number in numbers]
                _seeds(panels[0, j], numbers, rewards, colour, label, window)
                _seeds(panels[1, j], clock, rewards, colour, label, window)
        for axes in panels[:, 0]:
            axes.set_ylabel(f"Reward, mean of {window} iterations" if window > 1 else "Reward")
        _legend(figure, *panels[0])
        return _save(figure, out_dir, name, systems)


def image_grid(
    run_dirs: Iterable[Path | str],
    out_dir: Path | str,
    *,
    name: str = "image_grid",
    captions: Sequence[str],
    indices: Sequence[int] | None = None,
    per_tag: int | None = None,
    nfe: int,
) -> list[Path]:
    """The same prompts and start noise side by side, each system's lowest seed.

    Args:
        captions: the text of every prompt, in their order.
        indices: the prompts to show; None takes the first `per_tag` of each task, which by default
            are ROWS together, of those whose images are kept.

    Raises:
        ValueError: an input is missing or broken, or the captions do not fit; names it.
    """
    results = read_results(run_dirs)
    columns: list[tuple[str, Result, str]] = []
    systems = systems_of(results)
    for system in systems:
        steps = [nfe] if system.trained else [system.full_steps, nfe]
        for n in dict.fromkeys(steps):
            title = f"{textwrap.fill(system.label, 14)}\n{n} steps"
            columns.append((title, system.results[0], f"{system.sampler}-{n}"))
    scores = systems[0].results[0].scores
    tags = dict(zip(scores.prompts, scores.tags, strict=True))
    fair = min(rundir.SAMPLES_PER_TAG, ROWS // len(set(tags.values())))
    shown = list(indices) if indices is not None else _first_of_each(tags, per_tag or max(fair, 1))
    if not shown:
        raise ValueError("no prompts to show")
    if max(shown) >= len(captions):
        raise ValueError(f"prompt {max(shown)} has no caption: {len(captions)} were given")
    images = [_samples(result, key, shown) for _, result, key in columns]
    with _style():
        figure = _grid(columns, images, shown, captions, tags)
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


def _grid(
    columns: Sequence[tuple[str, Result, str]],
    images: Sequence[np.ndarray],
    shown: Sequence[int],
    captions: Sequence[str],
    tags: dict[int, str],
) -> Figure:
    """In inches: the cells' sides are whole multiples of 24 pixels at the figure's dpi."""
    side, gap, text, between = 0.72, 0.04, 1.75, 0.1
    head = 0.2 + 0.12 * max(title.count("\n") + 1 for title, _, _ in columns)
    # Prompts of one task stand together.
    breaks = [i > 0 and tags.get(a) != tags.get(shown[i - 1]) for i, a in enumerate(shown)]
    width = text + len(columns) * (side + gap)
    height = head + len(shown) * (side + gap) + sum(breaks) * between + gap
    figure = Figure(figsize=(width, height))
    top = height - head
    for (title, _, _), i in zip(columns, range(len(columns)), strict=True):
        x = text + i * (side + gap) + side / 2
        figure.text(x / width, (top + 0.06) / height, title, ha="center", va="bottom", fontsize=7.5)
    for row, prompt in enumerate(shown):
        top -= between if breaks[row] else 0
        middle = (top - side / 2) / height
        caption = textwrap.fill(captions[prompt], 27, max_lines=3, placeholder=" …")
        tag = tags.get(prompt, "").replace("_", " ")
        lines = caption.count("\n") + 1
        offset = 0.06 * bool(tag)
        x = (text - 0.1) / width
        figure.text(x, middle + offset / height, caption, ha="right", va="center", fontsize=7.5)
        below = middle + (offset - 0.065 * lines - 0.03) / height
        figure.text(x, below, tag, ha="right", va="top", fontsize=6.5, color="#888888")
        for i, stack in enumerate(images):
            left = text + i * (side + gap)
            box = (left / width, (top - side) / height, side / width, side / height)
            axes = figure.add_axes(box)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():  # many pictures are white up to their edges
                spine.set(visible=True, color="#dddddd")
            small = max(stack[row].shape[:2]) <= side * DPI
            axes.imshow(stack[row], interpolation="nearest" if small else "antialiased")
        top -= side + gap
    return figure


def _samples(result: Result, key: str, shown: Sequence[int]) -> np.ndarray:
    """uint8 [shown, H, W, 3]; reads no other images."""
    file = result.run.samples
    if not file.is_file():
        raise ValueError(f"{file}: not found; `python -m tafs.evaluate` writes it")
    try:
        with safe_open(file, framework="numpy") as stored:
            for needed in ("prompts", key):
                if needed not in stored.keys():  # noqa: SIM118 (no mapping)
                    found = ", ".join(sorted(stored.keys()))
                    raise ValueError(f"{file}: has no {needed!r} (has: {found})")
            place = {int(p): i for i, p in enumerate(stored.get_tensor("prompts"))}
            missing = [prompt for prompt in shown if prompt not in place]
            if missing:
                raise ValueError(f"{file}: has no prompt {missing[0]}")
            part = stored.get_slice(key)
            return np.concatenate([part[place[p] : place[p] + 1] for p in shown])
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file ({error})") from None


def _first_of_each(tags: dict[int, str], count: int) -> list[int]:
    """The first prompts of each tag; tags in order of their first prompt."""
    groups: dict[str, list[int]] = {}
    for prompt in sorted(tags):
        groups.setdefault(tags[prompt], []).append(prompt)
    return [prompt for group in groups.values() for prompt in group[:count]]


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


def _line(look: Look) -> dict[str, Any]:
    """matplotlib's properties of a line with markers, which are hollow on a broken line."""
    fill = {} if look.line == "-" else {"markerfacecolor": "white"}
    return {"color": look.colour, "marker": look.marker, "linestyle": look.line, **fill}


def _training_rewards(trained: Sequence[System]) -> list[str]:
    """METRICS in their order, then others by name."""
    found = {
        name
        for system in trained
        for result in system.results
        for name in result.iterations[0].get("rewards", {})
    }
    if not found:
        raise ValueError(f"{trained[0].results[0].run.journal}: its iterations have no rewards")
    return [m for m in METRICS if m in found] + sorted(found - set(METRICS))


def _reward(result: Result, name: str) -> Array | None:
    """The reward of the last scored step, [iterations]; None if the run has no such reward."""
    if name not in result.iterations[0].get("rewards", {}):
        return None
    try:
        values = [record["rewards"][name][-1] for record in result.iterations]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{result.run.journal}: an iteration has no reward {name!r}") from None
    return np.array(values, dtype=float)  # null, where it was not finite, becomes NaN


def _seeds(
    axes: Axes, x: Sequence[Array], y: Sequence[Array], colour: str, label: str, window: int
) -> None:
    """Every seed; the mean and the range of their running means where all of them have values."""
    smooth = [_running_mean(values, window) for values in y]
    if len(x) > 1 or window > 1:
        for times, values in zip(x, y, strict=True):
            axes.plot(times, values, color=colour, linewidth=0.5, alpha=0.35)
    if len(x) > 1:
        low, high = max(times[0] for times in x), min(times[-1] for times in x)
        grid = np.linspace(low, high, max(len(times) for times in x))
        curves = np.stack(
            [np.interp(grid, times, values) for times, values in zip(x, smooth, strict=True)]
        )
        axes.fill_between(grid, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
    else:
        grid, curves = x[0], smooth[0][None]
    single = "o" if len(grid) == 1 else None  # one point makes no line
    axes.plot(grid, curves.mean(0), color=colour, label=label, marker=single)


def _running_mean(values: Array, window: int) -> Array:
    """Centred means of `window` values, of fewer at the ends."""
    kernel = np.ones(window)
    counts = np.convolve(np.ones(len(values)), kernel, mode="same")
    means: Array = np.convolve(values, kernel, mode="same") / counts
    return means


class Look(NamedTuple):
    """How a system is drawn."""

    colour: str
    marker: str
    line: str


def _looks(systems: Sequence[System]) -> list[Look]:
    """A look a system: the method's own, or the next free one; a line a trained model."""
    trained = list(dict.fromkeys(s.info["backbone"] for s in systems if s.trained))
    free = iter(OTHERS * len(systems))
    taken: dict[tuple[str, ...], tuple[str, str]] = {}
    looks = []
    for system in systems:
        info = system.info
        key: tuple[str, ...] = (system.results[0].variant, str(info.get("task")))
        if not system.trained and info["backbone"] not in trained:
            key = (str(info["backbone"]),)
        if key not in taken:
            own = LOOKS.get(str(info["method"]))
            taken[key] = own if own and own not in taken.values() else next(free)
        place = trained.index(info["backbone"]) if info["backbone"] in trained else 0
        looks.append(Look(*taken[key], LINES[place % len(LINES)]))
    return looks


def _legend(figure: Figure, *panels: Axes, columns: int = 5) -> None:
    """One legend for all panels, above them."""
    entries: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if max(map(len, entries), default=0) > 20:
        columns = min(columns, 3)  # more long labels than that are wider than the panels
    rows = -(-len(entries) // columns)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside upper center",
        ncols=-(-len(entries) // rows),
        handlelength=2.4,
        columnspacing=1.4,
    )


@contextmanager
def _style() -> Iterator[None]:
    """Our style on matplotlib's own defaults, whatever a user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        parameters: Any = matplotlib.rcParams  # its type knows every single key
        parameters.update(STYLE)
        yield


def _save(figure: Figure, out_dir: Path | str, name: str, systems: Sequence[System]) -> list[Path]:
    """Without dates and versions, so that equal figures are equal files."""
    if any(result.random_weights for system in systems for result in system.results):
        width, height = figure.get_size_inches()
        figure.text(
            0.5,
            0.5,
            "RANDOM WEIGHTS",
            ha="center",
            va="center",
            rotation=np.degrees(np.arctan2(height, width)),
            fontsize=7 * min(width, 2 * height),
            color="#cc3311",
            alpha=0.3,
        )
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.png", folder / f"{name}.pdf"]
    figure.savefig(files[0], metadata={"Software": None})
    figure.savefig(files[1], metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return files


DRAW: dict[str, Callable[..., list[Path]]] = {
    "steps": figure4,
    "pareto": pareto,
    "compute": compute,
    "curves": learning_curves,
    "images": image_grid,
    "hacking": hacking,
    "profiles": profiles,
}
