"""Training rewards against iterations and compute time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tafs.report.figures.style import legend, looks
from tafs.report.results import LoadedTable, Result, System
from tafs.report.stats import Array
from tafs.rewards.metrics import METRICS

FEW_SEEDS = 4  # the lines of more would hide each other


def draw(table: LoadedTable) -> Figure:
    """Each training reward of the last scored image against iterations and against compute time.

    It is the final image; of Stepwise-Flow-GRPO, the estimate after its last trained step.

    Thin lines are the seeds, if they are few; thick lines are their means and bands their ranges,
    of running means over an eighth of the iterations, because every iteration draws other prompts.
    Compute time counts every iteration at the median time, as the tables do, because runs disturb
    one another.

    Raises:
        ValueError: no run is trained, or an input is missing or broken; names it.
    """
    systems, trained = table.distinct, table.trained
    look_of = looks(systems)
    names = _training_rewards(trained)
    pace = {s: float(np.median(np.concatenate([r.seconds() for r in s.results]))) for s in trained}
    longest = max(pace[s] * len(r.iterations) for s in trained for r in s.results)
    larger = (unit for unit in (("h", 3600), ("min", 60)) if longest > 5 * unit[1])
    unit, scale = next(larger, ("s", 1))
    window = max(1, min(len(r.iterations) for s in trained for r in s.results) // 8)
    figure = Figure(figsize=(3.2 * len(names) + 0.2, 4.7), layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False, sharey="col")
    for j, reward in enumerate(names):
        panels[0, j].set_title(METRICS[reward].title if reward in METRICS else reward)
        panels[0, j].set_xlabel("Iteration")
        panels[1, j].set_xlabel(f"Compute time ({unit})")
        panels[0, j].xaxis.set_major_locator(MaxNLocator(integer=True))
        for system in trained:
            if any(reward not in r.iterations[0].get("rewards", {}) for r in system.results):
                continue
            rewards = [_reward(result, reward) for result in system.results]
            colour, label = look_of[system].colour, system.label
            numbers = [
                np.array([r["iteration"] for r in result.iterations], dtype=float)
                for result in system.results
            ]
            clock = [(number + 1) * pace[system] / scale for number in numbers]
            _seeds(panels[0, j], numbers, rewards, colour, label, window)
            _seeds(panels[1, j], clock, rewards, colour, label, window)
    for axes in panels[:, 0]:
        axes.set_ylabel(f"Reward, mean of {window} iterations" if window > 1 else "Reward")
    legend(figure, *panels[0])
    return figure


def _training_rewards(trained: Sequence[System]) -> list[str]:
    """The training rewards: those of METRICS in their order, then others by name."""
    found = {
        name
        for system in trained
        for result in system.results
        for name in result.iterations[0].get("rewards", {})
    }
    if not found:
        raise ValueError(f"{trained[0].results[0].run.journal}: its iterations have no rewards")
    return [m for m in METRICS if m in found] + sorted(found - set(METRICS))


def _reward(result: Result, name: str) -> Array:
    """The reward of the last scored step, [iterations]."""
    try:
        values = [record["rewards"][name][-1] for record in result.iterations]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{result.run.journal}: an iteration has no reward {name!r}") from None
    return np.array(values, dtype=float)  # null stands for a value that was not finite


def _seeds(
    axes: Axes, x: Sequence[Array], y: Sequence[Array], colour: str, label: str, window: int
) -> None:
    """Draw every seed, and the mean and range of their running means where all have values."""
    smooth = [_running_mean(values, window) for values in y]
    if (len(x) > 1 or window > 1) and len(x) <= FEW_SEEDS:
        for times, values in zip(x, y, strict=True):
            axes.plot(times, values, color=colour, linewidth=0.5, alpha=0.35)
    if len(x) > 1:
        low, high = max(times[0] for times in x), min(times[-1] for times in x)
        grid = np.linspace(low, high, max(len(times) for times in x))
        curves = np.stack(
            [np.interp(grid, times, values) for times, values in zip(x, smooth, strict=True)]
        )
        axes.fill_between(grid, curves.min(0), curves.max(0), color=colour, alpha=0.12, linewidth=0)
    else:
        grid, curves = x[0], smooth[0][None]
    single = "o" if len(grid) == 1 else None  # a line needs two points
    axes.plot(grid, curves.mean(0), color=colour, label=label, marker=single)


def _running_mean(values: Array, window: int) -> Array:
    """Centred means over `window` values, over fewer at the ends."""
    kernel = np.ones(window)
    counts = np.convolve(np.ones(len(values)), kernel, mode="same")
    means: Array = np.convolve(values, kernel, mode="same") / counts
    return means
