"""Means, paired differences, gains and winners, with intervals.

Values are arrays [seeds, prompts, images]. NaN is a missing value: it is left out and counted.
tafs/report/bootstrap.py describes the intervals.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit
from scipy.stats import bootstrap, pearsonr, trim_mean

from tafs.report.bootstrap import (
    DEFAULT,
    LEVEL,
    NOTHING,
    RESAMPLES,
    Array,
    Estimate,
    Resampling,
    by_metric,
    check_metrics,
    checked,
    draw_means,
    interquartile_means,
    interval_of,
    nanmean,
    prompt_weights,
    seed_means,
    spread,
)

__all__ = ["LEVEL", "NOTHING", "RESAMPLES", "Array", "Estimate", "Resampling"]

Metrics = Sequence[ArrayLike]  # one [seeds, prompts, images] per metric


def mean(values: ArrayLike, strata: Sequence[str], *, macro: bool = False) -> float:
    """The mean over seeds of each seed's mean; NaN if there is no value.

    Args:
        values: [seeds, prompts, images].
        strata: [prompts].
        macro: a seed's mean is the mean of its strata's means (GenEval's overall score), instead
            of the mean over all of its images; NaN if a stratum has no value.
    """
    array, groups = checked(values, strata)
    ones = np.ones((1, array.shape[1]))
    return float(seed_means(array, groups, ones, macro).mean()) if len(array) else np.nan


def mean_interval(
    values: ArrayLike, strata: Sequence[str], *, macro: bool = False, by: Resampling = DEFAULT
) -> Estimate:
    """The mean (see `mean`) and its interval."""
    array, groups = checked(values, strata)
    n_images, n_missing = int(np.isfinite(array).sum()), int(np.isnan(np.asarray(values)).sum())
    if not len(array):
        return NOTHING._replace(n_missing=n_missing)
    draws = draw_means(array, groups, macro, by)
    return interval_of(draws.mean(1), [draws], n_images, n_missing, groups, by)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    strata: Sequence[str],
    *,
    same_seeds: bool = False,
    macro: bool = False,
    level: float = LEVEL,
    by: Resampling = DEFAULT,
) -> Estimate:
    """mean(a) - mean(b) over the same prompts and start noise, and its interval.

    Both share one resampling of the prompts; their seeds are independent. An image counts only if
    every seed of both has a value; otherwise the harder images could count on one side only.

    Args:
        a: [seeds of a, prompts, images].
        b: [seeds of b, prompts, images].
        same_seeds: seed i of both is the same trained model (for example at two numbers of steps).
        level: of the interval.
    """
    (left, groups), (right, _) = checked(a, strata), checked(b, strata)
    _check_paired(left, right)
    # Models are matched by position, which shifts if one of them has no value.
    same_seeds = same_seeds and len(left) == len(right) == len(np.asarray(a)) == len(np.asarray(b))
    both = len(left) and len(right)
    common = np.isfinite(left).all(0) & np.isfinite(right).all(0) if both else np.zeros(1, bool)
    if not common.any():
        return NOTHING._replace(n_missing=int(common.size))
    left, right = np.where(common, left, np.nan), np.where(common, right, np.nan)
    one, other = (draw_means(x, groups, macro, by) for x in (left, right))
    values, parts = one.mean(1) - other.mean(1), [one - other] if same_seeds else [one, other]
    n_images, n_missing = int(common.sum()), int((~common).sum())
    return interval_of(values, parts, n_images, n_missing, groups, by, level)


def _check_paired(a: Array, b: Array) -> None:
    if a.ndim != 3 or a.shape[1:] != b.shape[1:]:
        raise ValueError(f"not paired: {a.shape[1:]} and {b.shape[1:]} prompts and images")


def interquartile_mean(values: ArrayLike) -> float:
    """The mean of the middle half (Agarwal et al., 2021); NaN if there is no value."""
    array = np.asarray(values, dtype=float)
    array = array[np.isfinite(array)]
    return float(trim_mean(array, 0.25)) if len(array) else np.nan


def effects(values: ArrayLike, reference: ArrayLike) -> Array:
    """Each seed's gain on a reference, in standard deviations of the reference's prompts: [seeds].

    This puts all metrics on one scale: 1 is the distance of a typical prompt from the mean. A
    reference of one prompt, or of equal ones, has no such scale: the gains are NaN.

    Args:
        values: [seeds, prompts, images]; reference: [seeds, prompts, images] of the same prompts.

    Raises:
        ValueError: the prompts differ.
    """
    array, base = np.asarray(values, dtype=float), np.asarray(reference, dtype=float)
    _check_paired(array, base)
    return (nanmean(array, (1, 2)) - np.nanmean(base)) / spread(base)


def interquartile_effect(
    values: Metrics, reference: Metrics, strata: Sequence[str], *, by: Resampling = DEFAULT
) -> Estimate:
    """The interquartile mean of the effects over all seeds and metrics, and its interval.

    See `effects` and `interquartile_mean`. Prompts are resampled jointly for all metrics, the
    values and the reference. The variation due to seeds is that of the jackknife's pseudo-values,
    each without a seed in all metrics. The reference's seeds do not vary, and its spread, the unit,
    stays fixed. A metric whose reference does not vary over its prompts is missing.

    Args:
        values: one [seeds, prompts, images] per metric; seed i is the same model in all of them.
        reference: one [seeds, prompts, images] per metric, of the same prompts.

    Raises:
        ValueError: the metrics, their seeds or the prompts do not match.
    """
    check_metrics(values, reference)
    units = [spread(np.asarray(base, dtype=float)) for base in reference]
    # Counted as missing, like an image without a value.
    values = [np.where(np.isfinite(unit), x, np.nan) for x, unit in zip(values, units, strict=True)]
    arrays, groups = by_metric(values, strata)
    n_seeds, n_images = len(arrays[0]), int(sum(np.isfinite(x).sum() for x in arrays))
    n_missing = int(sum(np.isnan(np.asarray(x, dtype=float)).sum() for x in values))
    if not n_seeds:
        return NOTHING._replace(n_missing=n_missing)
    weights = prompt_weights(groups, by)
    means = []
    for array, given, unit in zip(arrays, reference, units, strict=True):
        base = np.asarray(given, dtype=float)
        _check_paired(array, base)
        # As one seed, because `effects` averages over all images of the reference.
        pooled = base.transpose(1, 0, 2).reshape(1, base.shape[1], -1)
        gain = seed_means(array, groups, weights, macro=False)
        means.append((gain - seed_means(pooled, groups, weights, macro=False)) / unit)
    gain = np.stack(means, axis=2)  # [1 + resamples, seeds, metrics]

    def middle(gain: Array) -> Array:
        return interquartile_means(gain.reshape(len(gain), -1))

    draws = middle(gain)
    if n_seeds == 1:
        pseudo = draws[:, None]
    else:
        without = np.stack([middle(np.delete(gain, i, axis=1)) for i in range(n_seeds)], axis=1)
        pseudo = n_seeds * draws[:, None] - (n_seeds - 1) * without
    return interval_of(draws, [pseudo], n_images, n_missing, groups, by)


def probability_of_improvement(
    a: Metrics, b: Metrics, strata: Sequence[str], *, by: Resampling = DEFAULT
) -> Estimate:
    """How often a prompt is better under a than under b, ties counting half, and its interval.

    A prompt's value is its mean over images; every seed of a is compared with every seed of b
    (Agarwal et al., 2021). A prompt's wins are averaged over its metrics before resampling, because
    the metrics of one image are not independent. The p-value is that of 1/2.

    Args:
        a, b: one [seeds, prompts, images] per metric, higher being better, of the same prompts and
            start noise; seed i is the same model in all metrics.

    Raises:
        ValueError: the metrics, their seeds or the prompts do not match.
    """
    check_metrics(a, b)
    (left, groups), (right, _) = by_metric(a, strata), by_metric(b, strata)
    if not (len(left[0]) and len(right[0])):
        return NOTHING
    first = np.stack([nanmean(x, 2) for x in left])[:, :, None]
    second = np.stack([nanmean(x, 2) for x in right])[:, None]
    wins = np.where(first == second, 0.5, first > second)
    wins = np.where(np.isnan(first) | np.isnan(second), np.nan, wins)
    wins = nanmean(wins, 0)  # [seeds of a, seeds of b, prompts]
    pairs = wins.reshape(-1, wins.shape[2], 1) - 0.5
    weights = prompt_weights(groups, by)
    means = seed_means(pairs, groups, weights, macro=False).reshape(-1, *wins.shape[:2])
    n_missing = int(np.isnan(wins).sum())
    parts = [means.mean(2), means.mean(1)]
    half = interval_of(means.mean((1, 2)), parts, wins.size - n_missing, n_missing, groups, by)
    low, high = (float(np.clip(bound + 0.5, 0, 1)) for bound in (half.low, half.high))
    return half._replace(value=half.value + 0.5, low=low, high=high)


def correlation(x: ArrayLike, y: ArrayLike, *, by: Resampling = DEFAULT) -> Estimate:
    """Pearson's r of paired values and its bootstrap interval over the pairs; p-value of r = 0.

    Args:
        x, y: [n]; pairs with a missing value are left out and counted.

    Raises:
        ValueError: fewer than three pairs, or one side does not vary.
    """
    left, right = (np.asarray(v, dtype=float).ravel() for v in (x, y))
    if left.shape != right.shape:
        raise ValueError(f"not paired: {len(left)} and {len(right)} values")
    kept = np.isfinite(left) & np.isfinite(right)
    left, right = left[kept], right[kept]
    if len(left) < 3 or not (left.std() > 0 and right.std() > 0):
        raise ValueError("a correlation needs three pairs, and both sides must vary")
    found = pearsonr(left, right)
    interval = bootstrap(
        (left, right),
        lambda a, b, axis: pearsonr(a, b, axis=axis).statistic,
        paired=True,
        vectorized=True,
        confidence_level=LEVEL,
        n_resamples=by.resamples,
        method="percentile",
        rng=np.random.default_rng(by.seed),
        batch=100,
    ).confidence_interval
    r, low, high = float(found.statistic), float(interval.low), float(interval.high)
    missing = int((~kept).sum())
    return Estimate(r, low, high, 1, len(left), missing, "prompts", float(found.pvalue))


def ratio_of_medians(
    a: Sequence[ArrayLike],
    b: Sequence[ArrayLike],
    *,
    level: float = LEVEL,
    by: Resampling = DEFAULT,
) -> Estimate:
    """The ratio of the typical values of two systems, and its interval; no p-value.

    A system's value is the geometric mean of its runs' medians. The values within a run are
    resampled, and runs vary like seeds.

    Args:
        a, b: one array of positive values per run.
        level: of the interval.
    """
    rng = np.random.default_rng(by.seed)

    def medians(runs: Sequence[ArrayLike]) -> Array:
        arrays = [np.asarray(run, dtype=float) for run in runs]
        drawn = [x[rng.integers(len(x), size=(by.resamples, len(x)))] for x in arrays]
        found = [
            np.r_[np.median(x), np.median(d, axis=1)] for x, d in zip(arrays, drawn, strict=True)
        ]
        return np.log(np.stack(found, axis=1))

    one, other = medians(a), medians(b)
    n = sum(np.size(run) for run in [*a, *b])
    logs = interval_of(one.mean(1) - other.mean(1), [one, other], n, 0, (0, 0), by, level)
    value, low, high = (float(np.exp(x)) for x in logs[:3])
    return Estimate(value, low, high, logs.n_seeds, n, 0, "iterations", 1.0)


class Variance(NamedTuple):
    """Variance components of a crossed design, in squared units; none is below 0."""

    seeds: float
    prompts: float
    residual: float  # of a seed's mean of a prompt's images


def variance_components(values: ArrayLike) -> Variance:
    """Analysis of variance of two or more seeds; prompts with a missing value are left out.

    Args:
        values: [seeds, prompts, images].
    """
    means = nanmean(np.asarray(values, dtype=float), 2)
    means = means[:, np.isfinite(means).all(0)]
    seeds, prompts = means.shape
    if seeds < 2 or prompts < 2:
        return Variance(np.nan, np.nan, np.nan)
    of_seeds, of_prompts = means.mean(1, keepdims=True), means.mean(0, keepdims=True)
    rest = means - of_seeds - of_prompts + means.mean()
    residual = float((rest**2).sum()) / ((seeds - 1) * (prompts - 1))
    between = float(of_seeds.var(ddof=1)) - residual / prompts
    return Variance(
        max(0.0, between), max(0.0, float(of_prompts.var(ddof=1)) - residual / seeds), residual
    )


POWER = 0.8
MOST_SEEDS = 100  # beyond these, other seeds do not help


def detectable(estimate: Estimate) -> float:
    """The smallest difference that the test shows with a probability of POWER.

    NaN for an estimate of one seed, because one seed tells nothing of another.
    """
    return float(_detectable(estimate, np.array(float(estimate.n_seeds))))


def _detectable(estimate: Estimate, n_seeds: Array) -> Array:
    """The same as if there were so many seeds."""
    own = estimate.n_seeds
    if own < 2 or not np.isfinite(estimate.seeds_error):
        return np.full(n_seeds.shape, np.nan)
    error = estimate.seeds_error * np.sqrt(own / n_seeds)
    degrees = estimate.seeds_freedom * (n_seeds - 1) / (own - 1)
    freedom = np.where(error > 0, degrees, np.inf)
    parts = [
        np.hypot(stdtrit(freedom, share) * error, ndtri(share) * estimate.prompts_error)
        for share in ((1 + LEVEL) / 2, POWER)
    ]
    return np.sum(parts, axis=0)


def seeds_to_show(estimate: Estimate) -> int | None:
    """How many seeds would show a difference as large as the estimate with a power of POWER.

    None: more than MOST_SEEDS, or it is unknown (one seed).
    """
    numbers = np.arange(2.0, MOST_SEEDS + 1)
    enough = numbers[_detectable(estimate, numbers) <= abs(estimate.value)]
    return int(enough[0]) if len(enough) else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of tests (Holm, 1979)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    steps = (len(p) - np.arange(len(p))) * p[order]
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return list(map(float, adjusted))


def supported_winner(
    rows: Sequence[ArrayLike],
    strata: Sequence[str],
    *,
    sources: Sequence[Hashable] | None = None,
    higher_is_better: bool = True,
    macro: bool = False,
    by: Resampling = DEFAULT,
) -> int | None:
    """The index of the row that is better than every other one, or None.

    The best row wins if its paired difference to each other row is significant. All of them have
    to be, so none is corrected for their number (an intersection-union test; Berger, 1982). Rows
    without values are ignored.

    Args:
        rows: each [seeds, prompts, images].
        sources: rows of equal source are the same trained models; None: all differ.
    """
    means = np.array([mean(row, strata, macro=macro) for row in rows])
    scores = means if higher_is_better else -means
    rivals = [i for i in range(len(rows)) if np.isfinite(scores[i])]
    if len(rivals) < 2:
        return None
    best = max(rivals, key=lambda i: scores[i])
    p_values = []
    for i in rivals:
        if i != best:
            same = sources is not None and sources[i] == sources[best]
            difference = paired_difference(
                rows[best], rows[i], strata, same_seeds=same, macro=macro, by=by
            )
            p_values.append(difference.p_value)
    return best if max(p_values) <= 1 - LEVEL else None
