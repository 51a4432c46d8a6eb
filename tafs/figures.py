"""The figures, as PNG (200 dpi) and PDF. Files in, files out; equal input gives equal bytes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open

from tafs import rundir, stats, tables
from tafs.stats import Array
from tafs.tables import METRICS, Result, System

DPI = 200

# Okabe & Ito's colours, which colour-blind readers tell apart; a method looks the same everywhere.
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
)

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


def draw(kind: str, name: str, run_dirs: Sequence[Path], out_dir: Path) -> list[Path]:
    """One of config.FIGURES as NAME.png and NAME.pdf.

    Raises:
        ValueError: an input is missing or broken; names it.
    """
    if kind == "images":
        settings = rundir.RunDir(run_dirs[0]).description["settings"]
        held_out = rundir.test_prompts(settings["world"], settings["evaluation"]["prompts"])
        captions = [prompt.text for prompt in held_out]
        return image_grid(run_dirs, out_dir, name=name, captions=captions)
    return DRAW[kind](run_dirs, out_dir, name=name)


def figure4(
    run_dirs: Iterable[Path | str],
    out_dir: Path | str,
    *,
    name: str = "figure4",
    nfe: Sequence[int] | None = None,
    full_steps: int | None = None,
) -> list[Path]:
    """Figure 4: every metric against the number of inference steps, a line a method.

    Each method is sampled with its own few-step sampler; one whose sampler is not Euler's has a
    dashed line with Euler's, where that was evaluated. Lines are means over seeds, bands 95 %
    intervals (none on dashed lines); the dotted line is the base model at its full steps.

    Args:
        nfe, full_steps: None takes those of the scale.

    Raises:
        ValueError: an input is missing or broken; names it.
    """
    results = tables.read_results(run_dirs)
    steps = list(nfe or results[0].evaluation("curve_nfe"))
    full = full_steps or int(results[0].evaluation("base_nfe"))
    systems = tables.systems(results)
    looks = _looks(systems)
    metrics = _metrics(results)
    with _style():
        columns = min(3, len(metrics))
        rows = -(-len(metrics) // columns)
        figure = Figure(figsize=(2.35 * columns + 0.2, 2.0 * rows + 0.5), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat[len(metrics) :]:
            axes.set_visible(False)
        for place, metric in enumerate(metrics):
            axes = panels.flat[place]
            if place + columns >= len(metrics):  # nothing below
                axes.set_xlabel("Inference steps (NFE)")
            axes.set_title(METRICS[metric].title)
            axes.set_ylabel(UNITS[metric])
            axes.set_xticks(steps)
            for system, (colour, marker) in zip(systems, looks, strict=True):
                label = system.label
                own = str(system.info["sampler"])
                line: dict[str, Any] = {"color": colour, "marker": marker}
                estimates = [_estimate(system, own, n, metric) for n in steps]
                low, high = [e.low for e in estimates], [e.high for e in estimates]
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
                axes.plot(steps, [e.value for e in estimates], label=label, **line)
                if own != "ode" and _evaluated(system, "ode", steps, metric):
                    line |= {"linestyle": (0, (3, 1.5)), "markerfacecolor": "white"}
                    values = [_mean(system, "ode", n, metric) for n in steps]
                    axes.plot(steps, values, label=f"{label}, Euler", **line)
                if not system.trained:
                    value = _mean(system, "ode", full, metric)
                    at_full = f"{label}, {full} steps"
                    axes.axhline(value, color=colour, linestyle=":", linewidth=1.2, label=at_full)
        figure.align_ylabels(panels)
        _legend(figure, panels[0, 0])
        return _save(figure, out_dir, name)


def learning_curves(
    run_dirs: Iterable[Path | str], out_dir: Path | str, *, name: str = "learning_curves"
) -> list[Path]:
    """Each training reward of the final image against iterations, and against compute time.

    Thin lines are the seeds. Thick ones are their mean and bands their range, of running means over
    an eighth of the iterations: every iteration draws other prompts, which hides the trend.

    Raises:
        ValueError: no run is trained, or an input is missing or broken; names it.
    """
    results = tables.read_results(run_dirs)
    everyone = tables.systems(results)
    looks = dict(zip((s.label for s in everyone), _looks(everyone), strict=True))
    trained = [system for system in everyone if system.trained]
    if not trained:
        raise ValueError("no trained run among the given ones")
    names = _training_rewards(trained)
    longest = max(sum(r.seconds()) for system in trained for r in system.results)
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
            for system in trained:
                curves = [_reward(result, reward) for result in system.results]
                if any(curve is None for curve in curves):
                    continue
                rewards = [curve for curve in curves if curve is not None]
                (colour, _), label = looks[system.label], system.label
                numbers = [
                    np.array([r["iteration"] for r in result.iterations], dtype=float)
                    for result in system.results
                ]
                clock = [np.cumsum(result.seconds()) / scale for result in system.results]
                _seeds(panels[0, j], numbers, rewards, colour, label, window)
                _seeds(panels[1, j], clock, rewards, colour, label, window)
        for axes in panels[:, 0]:
            axes.set_ylabel(f"Reward, mean of {window} iterations" if window > 1 else "Reward")
        _legend(figure, *panels[0])
        return _save(figure, out_dir, name)


def image_grid(
    run_dirs: Iterable[Path | str],
    out_dir: Path | str,
    *,
    name: str = "image_grid",
    captions: Sequence[str],
    indices: Sequence[int] | None = None,
    per_tag: int = 2,
    nfe: int | None = None,
    full_steps: int | None = None,
) -> list[Path]:
    """The same prompts and start noise side by side, each system's lowest seed.

    Args:
        captions: the text of every prompt that the samples hold, in their order.
        indices: the prompts to show; None takes the first `per_tag` of each task.
        nfe, full_steps: None takes those of the scale.

    Raises:
        ValueError: an input is missing or broken, or the captions do not fit; names it.
    """
    results = tables.read_results(run_dirs)
    few = nfe or int(results[0].evaluation("table_nfe")[0])
    full = full_steps or int(results[0].evaluation("base_nfe"))
    columns: list[tuple[str, Result, str]] = []
    systems = tables.systems(results)
    for system in systems:
        steps = [full, few] if not system.trained else [few]
        for n in dict.fromkeys(steps):
            sampler = "ode" if n == full else system.info["sampler"]
            title = f"{textwrap.fill(system.label, 14)}\n{n} steps"
            columns.append((title, system.results[0], f"{sampler}-{n}"))
    scores = systems[0].results[0].scores
    tags = dict(zip(scores.prompts, scores.tags, strict=True))
    shown = list(indices) if indices is not None else _first_of_each(tags, per_tag)
    if not shown:
        raise ValueError("no prompts to show")
    images = [_samples(result, key, shown, len(captions)) for _, result, key in columns]
    with _style():
        return _save(_grid(columns, images, shown, captions, tags), out_dir, name)


IN_DOMAIN = ("pickscore", "clip")
OUT_OF_DOMAIN = ("hpsv2", "imagereward", "unifiedreward")


def hacking(
    run_dirs: Iterable[Path | str], out_dir: Path | str, *, name: str = "hacking"
) -> list[Path]:
    """Reward hacking: gain on the trained rewards against gain on rewards that took no part.

    Gains are on the base model at the same few steps, in standard deviations of its prompts, so
    that rewards of different scales can be averaged. A dot a seed, a large marker their mean; below
    the dotted diagonal a method gains more where it was trained.

    Raises:
        ValueError: no base model is among the runs, or an input is missing or broken; names it.
    """
    systems, few = _few_step_systems(run_dirs)
    looks = _looks(systems)
    with _style():
        figure = Figure(figsize=(3.6, 3.9), layout="constrained")
        axes = figure.subplots()
        for system, (colour, marker) in zip(systems, looks, strict=True):
            if not system.trained:
                continue
            x, y = (
                np.mean([_effects(system, systems, few, metric) for metric in metrics], axis=0)
                for metrics in (IN_DOMAIN, OUT_OF_DOMAIN)
            )
            if len(x) > 1:
                axes.plot(x, y, ".", color=colour, alpha=0.5, markersize=3)
            label = system.label
            axes.plot(x.mean(), y.mean(), marker, color=colour, markersize=7, label=label)
        axes.axline((0, 0), slope=1, color="#999999", linestyle=":", linewidth=0.8)
        axes.axhline(0, color="#cccccc", linewidth=0.6)
        axes.axvline(0, color="#cccccc", linewidth=0.6)
        axes.set_xlabel("Gain on " + " and ".join(METRICS[m].title for m in IN_DOMAIN))
        axes.set_ylabel("Gain on " + ", ".join(METRICS[m].title for m in OUT_OF_DOMAIN))
        _legend(figure, axes, columns=2)
        return _save(figure, out_dir, name)


def profiles(
    run_dirs: Iterable[Path | str], out_dir: Path | str, *, name: str = "profiles"
) -> list[Path]:
    """Performance profiles (Agarwal et al., 2021): the share of a method's scores above a gain.

    A score is one seed's gain on one metric, over the base model at the same few steps, in standard
    deviations of its prompts; the legend gives their interquartile mean.

    Raises:
        ValueError: no base model is among the runs, or an input is missing or broken; names it.
    """
    systems, few = _few_step_systems(run_dirs)
    looks = _looks(systems)
    metrics = [m for m in METRICS if m in _metrics([r for s in systems for r in s.results])]
    gains = {
        system.label: np.concatenate([_effects(system, systems, few, m) for m in metrics])
        for system in systems
        if system.trained
    }
    everything = np.concatenate(list(gains.values()))
    margin = 0.05 * float(np.ptp(everything)) + 1e-3
    grid = np.linspace(everything.min() - margin, everything.max() + margin, 400)
    with _style():
        figure = Figure(figsize=(3.6, 3.2), layout="constrained")
        axes = figure.subplots()
        for system, (colour, _) in zip(systems, looks, strict=True):
            if system.trained:
                values = gains[system.label]
                above = (values[:, None] > grid).mean(0)
                label = f"{system.label} ({stats.interquartile_mean(values):+.2f})"
                axes.plot(grid, above, color=colour, label=label)
        axes.set_xlabel("Gain on the base model, in standard deviations")
        axes.set_ylabel("Share of seeds and metrics above it")
        axes.set_ylim(-0.02, 1.02)
        _legend(figure, axes, columns=2)
        return _save(figure, out_dir, name)


def _few_step_systems(run_dirs: Iterable[Path | str]) -> tuple[list[System], int]:
    """The systems, and the few steps that tables print."""
    results = tables.read_results(run_dirs)
    systems = tables.systems(results)
    if not any(system.trained for system in systems):
        raise ValueError("no trained run among the given ones")
    return systems, int(results[0].evaluation("table_nfe")[0])


def _effects(system: System, systems: Sequence[System], nfe: int, metric: str) -> Array:
    """Each seed's gain on the base model of its backbone; see `stats.effects`."""
    backbone = system.info["backbone"]
    bases = [s for s in systems if not s.trained and s.info["backbone"] == backbone]
    if not bases:
        raise ValueError(f"no run of the base model {backbone!r} among the given ones")
    own = system.values(str(system.info["sampler"]), nfe, metric)
    return stats.effects(own, bases[0].values("ode", nfe, metric))


def _grid(
    columns: Sequence[tuple[str, Result, str]],
    images: Sequence[np.ndarray],
    shown: Sequence[int],
    captions: Sequence[str],
    tags: dict[int, str],
) -> Figure:
    """In inches: the cells' sides are whole multiples of 24 pixels at the figure's dpi."""
    side, gap, text, head, between = 0.72, 0.04, 1.75, 0.5, 0.1
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


def _samples(result: Result, key: str, shown: Sequence[int], n_captions: int) -> np.ndarray:
    """uint8 [shown, H, W, 3]; reads no other images."""
    file = result.run.samples
    if not file.is_file():
        raise ValueError(f"{file}: not found; `python -m tafs.evaluate` writes it")
    try:
        with safe_open(file, framework="numpy") as stored:
            if key not in stored.keys():  # noqa: SIM118 (no mapping)
                found = ", ".join(sorted(stored.keys()))
                raise ValueError(f"{file}: has no {key!r} (has: {found})")
            part = stored.get_slice(key)
            total = part.get_shape()[0]
            if total != n_captions:
                raise ValueError(f"{file}: {total} prompts, but {n_captions} captions were given")
            outside = [i for i in shown if not 0 <= i < total]
            if outside:
                raise ValueError(f"{file}: has no prompt {outside[0]} (prompts: 0 to {total - 1})")
            return np.concatenate([part[i : i + 1] for i in shown])
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file ({error})") from None


def _first_of_each(tags: dict[int, str], count: int) -> list[int]:
    """The first prompts of each tag; tags in order of their first prompt."""
    groups: dict[str, list[int]] = {}
    for prompt in sorted(tags):
        groups.setdefault(tags[prompt], []).append(prompt)
    return [prompt for group in groups.values() for prompt in group[:count]]


def _metrics(results: Sequence[Result]) -> list[str]:
    known = {metric for result in results for metric in result.scores.metrics()}
    return [metric for metric in METRICS if metric in known]


def _evaluated(system: System, sampler: str, steps: Sequence[int], metric: str) -> bool:
    return all(
        (sampler, nfe, metric) in result.scores.values for result in system.results for nfe in steps
    )


def _estimate(system: System, sampler: str, nfe: int, metric: str) -> stats.Estimate:
    """On the reported scale."""
    values = METRICS[metric].factor * system.values(sampler, nfe, metric)
    tags = system.results[0].scores.tags
    return stats.mean_interval(values, tags, macro=METRICS[metric].macro)


def _mean(system: System, sampler: str, nfe: int, metric: str) -> float:
    """On the reported scale."""
    values = METRICS[metric].factor * system.values(sampler, nfe, metric)
    return stats.mean(values, system.results[0].scores.tags, macro=METRICS[metric].macro)


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


def _looks(systems: Sequence[System]) -> list[tuple[str, str]]:
    """A colour and a marker a system: the method's own, or the next free ones."""
    free = iter(OTHERS * len(systems))
    looks: list[tuple[str, str]] = []
    for system in systems:
        own = LOOKS.get(str(system.info["method"]))
        looks.append(own if own and own not in looks else next(free))
    return looks


def _legend(figure: Figure, *panels: Axes, columns: int = 5) -> None:
    """One legend for all panels, above them."""
    entries: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
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


def _save(figure: Figure, out_dir: Path | str, name: str) -> list[Path]:
    """Without dates and versions, so that equal figures are equal files."""
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.png", folder / f"{name}.pdf"]
    figure.savefig(files[0], metadata={"Software": None})
    figure.savefig(files[1], metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return files


DRAW: dict[str, Callable[..., list[Path]]] = {
    "steps": figure4,
    "curves": learning_curves,
    "images": image_grid,
    "hacking": hacking,
    "profiles": profiles,
}
