"""Intervals over training seeds and prompts, two crossed random factors.

Prompts are resampled within their stratum (GenEval's task), each with all of its images: n - 1 of n
are drawn, which makes the variance unbiased (Rao & Wu, 1988). Seeds are too few to resample: three
have six distinct resamples. Their part is Student's t instead, from the variance of the seeds'
means, with Welch's degrees of freedom where two systems have seeds of their own. The interval holds
95 % of the sum of both parts.

Both parts contain what is peculiar to a seed on a prompt, so it is taken out of the prompts' part.
Otherwise the interval of systems whose seeds hardly differ covers 99 %.
benchmarks/interval_coverage.py measures the coverage.

With one seed only prompts vary, and `Estimate.resampled` says so. If nothing can vary (one seed,
one prompt per stratum), there is a value but no interval.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

Array = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 2000


class Resampling(NamedTuple):
    """How many resamples are drawn, and from which seed."""

    resamples: int = RESAMPLES
    seed: int = 0


DEFAULT = Resampling()


class Estimate(NamedTuple):
    """A mean, or a difference of means, and its interval."""

    value: float
    low: float
    high: float
    n_seeds: int  # with any value; of a difference, the smaller number
    n_images: int  # finite values, over all seeds
    n_missing: int
    resampled: str  # "seeds and prompts", "seeds", "prompts", or "": no interval
    p_value: float  # two-sided, of a value of 0; 1 without an interval
    seeds_error: float = np.nan  # standard error due to seeds
    seeds_freedom: float = np.nan  # its degrees of freedom
    prompts_error: float = np.nan  # standard error due to prompts


NOTHING = Estimate(np.nan, np.nan, np.nan, 0, 0, 0, "", 1.0)  # of no values


def checked(values: ArrayLike, strata: Sequence[str]) -> tuple[Array, tuple[int, ...]]:
    """The values of the seeds that have any, and the stratum of each prompt as a number."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 3 or array.shape[1] != len(strata):
        raise ValueError(
            f"values must be [seeds, prompts, images] with {len(strata)} prompts, "
            f"not {list(array.shape)}"
        )
    number = {name: i for i, name in enumerate(dict.fromkeys(strata))}
    return array[np.isfinite(array).any((1, 2))], tuple(number[name] for name in strata)


def check_metrics(a: Sequence[ArrayLike], b: Sequence[ArrayLike]) -> None:
    if len(a) != len(b) or not len(a):
        raise ValueError(f"not paired: {len(a)} and {len(b)} metrics")


def by_metric(
    values: Sequence[ArrayLike], strata: Sequence[str]
) -> tuple[list[Array], tuple[int, ...]]:
    """Each metric's values of the seeds that have any in some metric, and the prompts' strata."""
    groups = [checked(metric, strata)[1] for metric in values]
    arrays = [np.asarray(metric, dtype=float) for metric in values]
    seeds = [len(array) for array in arrays]
    if len(set(seeds)) > 1:
        raise ValueError(f"the metrics must have the same seeds, not {seeds} of them")
    kept = np.any([np.isfinite(array).any((1, 2)) for array in arrays], axis=0)
    return [array[kept] for array in arrays], groups[0]


def nanmean(array: Array, axis: int | tuple[int, ...]) -> Array:
    """The mean of the finite values; NaN without a warning if there is none."""
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmean(array, axis=axis))


def spread(reference: Array) -> float:
    """The standard deviation of the prompts' means; NaN if they are all equal."""
    prompts = nanmean(reference, (0, 2))
    prompts = prompts[np.isfinite(prompts)]
    spread = float(prompts.std()) if len(prompts) else 0.0
    return spread if spread > 0 else np.nan


def interquartile_means(rows: Array) -> Array:
    """`interquartile_mean` of each row: [n] from [n, values]."""
    ordered = np.sort(rows, axis=1)  # NaN last
    count = np.isfinite(ordered).sum(1, keepdims=True)
    cut = count // 4
    place = np.arange(rows.shape[1])
    middle = np.where((place >= cut) & (place < count - cut), ordered, np.nan)
    return nanmean(middle, 1)


def seed_means(array: Array, groups: tuple[int, ...], weights: Array, macro: bool) -> Array:
    """Each seed's weighted mean: [resamples, seeds] from weights [resamples, prompts]."""
    present = np.isfinite(array)
    # [prompts, seeds]; the products below are 70 times slower on a transposed view.
    sums = np.ascontiguousarray(np.where(present, array, 0).sum(2).T)
    counts = np.ascontiguousarray(present.sum(2, dtype=float).T)
    with np.errstate(invalid="ignore"):  # 0 / 0: a resample without any value is NaN
        if not macro:
            return (weights @ sums) / (weights @ counts)
        numbers = np.asarray(groups)
        parts = []
        for group in np.unique(numbers):
            of = numbers == group
            parts.append((weights[:, of] @ sums[of]) / (weights[:, of] @ counts[of]))
        return np.mean(parts, axis=0)


def draw_means(array: Array, groups: tuple[int, ...], macro: bool, by: Resampling) -> Array:
    """Each seed's mean, [1 + resamples, seeds]; see `prompt_weights`."""
    return seed_means(array, groups, prompt_weights(groups, by), macro)


@lru_cache(maxsize=8)
def prompt_weights(groups: tuple[int, ...], by: Resampling) -> Array:
    """[1 + resamples, prompts], with mean 1 within each stratum; the first row is ones."""
    rng = np.random.default_rng([by.seed, 0])
    numbers = np.asarray(groups)
    weights = np.ones((1 + by.resamples, len(groups)))
    for group in np.unique(numbers):
        of = numbers == group
        weights[1:, of] = resample(int(of.sum()), by.resamples, rng)
    weights.flags.writeable = False
    return weights


def resample(n: int, resamples: int, rng: np.random.Generator) -> Array:
    """Weights [resamples, n] of mean 1: n - 1 units drawn with replacement (Rao & Wu, 1988)."""
    if n == 1:
        return np.ones((resamples, 1))
    drawn = rng.integers(n, size=(resamples, n - 1)) + n * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n)
    weights: Array = counts.astype(float) * (n / (n - 1))
    return weights


def resampled_factors(n_seeds: int, groups: tuple[int, ...]) -> str:
    """The factors that have more than one unit to draw from."""
    if not n_seeds:
        return ""
    factors = {"seeds": n_seeds > 1, "prompts": len(set(groups)) < len(groups)}
    return " and ".join(name for name, varies in factors.items() if varies)


def interval_of(
    values: Array,
    parts: Sequence[Array],
    n_images: int,
    n_missing: int,
    groups: tuple[int, ...],
    by: Resampling,
    level: float = LEVEL,
) -> Estimate:
    """The estimate of a statistic.

    Args:
        values: [1 + resamples], the statistic, and the same of resampled prompts.
        parts: one [1 + resamples, seeds] per group of independently trained seeds. The statistic
            changes with its seeds like the sum of the means of its parts.
        level: of the interval.
    """
    resampled = resampled_factors(max(part.shape[1] for part in parts), groups)
    counts = (min(part.shape[1] for part in parts), n_images, n_missing)
    value = float(values[0])
    kept = np.isfinite(values) & np.all([np.isfinite(part).all(1) for part in parts], axis=0)
    if not resampled or not kept[0] or kept.sum() < 2:
        return Estimate(value, np.nan, np.nan, *counts, "", 1.0)
    draws = values[kept][1:] - value
    own, freedom = 0.0, []  # variance that both parts contain; (variance, degrees of freedom)
    for part in parts:
        if (n := part.shape[1]) > 1:
            moved = part[kept][1:] - part[0]
            own += float(moved.var(axis=1, ddof=1).mean()) / n
            freedom.append((float(part[0].var(ddof=1)) / n, n - 1))
    total = float(draws.var())
    draws = draws * np.sqrt(max(0.0, 1 - own / total)) if total else draws
    prompts_error = float(draws.std())
    seeds_variance, degrees = welch(freedom)
    if seeds_variance:
        order = np.random.default_rng([by.seed, 1]).permutation(len(draws))
        quantiles = stdtrit(degrees, (order + 0.5) / len(draws))
        draws = draws + np.sqrt(seeds_variance) * quantiles
    low, high = value + np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    below, above = int((draws <= -value).sum()), int((draws >= -value).sum())
    p_value = min(1.0, 2 * (1 + min(below, above)) / (1 + len(draws)))
    errors = (float(np.sqrt(seeds_variance)), degrees, prompts_error)
    return Estimate(value, float(low), float(high), *counts, resampled, p_value, *errors)


def welch(variances: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """The sum of variances and its degrees of freedom, from those of each (Welch, 1947)."""
    total = sum(variance for variance, _ in variances)
    if not total:
        return 0.0, np.nan
    return total, total**2 / sum(variance**2 / freedom for variance, freedom in variances)
