"""Means, paired differences, gains and winners, with bootstrap intervals.

Values are arrays [seeds, prompts, images]. NaN is a missing value: it is left out and counted.
tafs/report/bootstrap.py describes the resampling.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike
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
    resampled_factors,
    seed_means,
    seed_weights,
    spread,
    student,
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
    draws = draw_means(array, groups, macro, by, stream=0)
    counts = (len(array), int(np.isfinite(array).sum()), int(np.isnan(np.asarray(values)).sum()))
    value = mean(array, strata, macro=macro)
    return interval_of(value, draws, *counts, resampled_factors(len(array), groups))


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    strata: Sequence[str],
    *,
    same_seeds: bool = False,
    macro: bool = False,
    by: Resampling = DEFAULT,
) -> Estimate:
    """mean(a) - mean(b) over the same prompts and start noise, and its interval.

    Both share one resampling of the prompts; their seeds are resampled independently. An image
    counts only if every seed of both has a value; otherwise the harder images could count on one
    side only.

    Args:
        a: [seeds of a, prompts, images].
        b: [seeds of b, prompts, images].
        same_seeds: seed i of both is the same trained model (for example at two numbers of steps).
    """
    (left, groups), (right, _) = checked(a, strata), checked(b, strata)
    if left.shape[1:] != right.shape[1:]:
        raise ValueError(f"not paired: {left.shape[1:]} and {right.shape[1:]} prompts and images")
    seeds = min(len(left), len(right))
    # Models are matched by position, which shifts if one of them has no value.
    same_seeds = same_seeds and len(left) == len(right) == len(np.asarray(a)) == len(np.asarray(b))
    common = np.isfinite(left).all(0) & np.isfinite(right).all(0) if seeds else np.zeros(1, bool)
    if not common.any():
        return NOTHING._replace(n_missing=int(common.size))
    left, right = np.where(common, left, np.nan), np.where(common, right, np.nan)
    draws = draw_means(left, groups, macro, by, stream=0)
    draws = draws - draw_means(right, groups, macro, by, stream=0 if same_seeds else 1)
    value = mean(left, strata, macro=macro) - mean(right, strata, macro=macro)
    n_images, n_missing = int(common.sum()), int((~common).sum())
    resampled = resampled_factors(max(len(left), len(right)), groups)
    return interval_of(value, draws, seeds, n_images, n_missing, resampled)


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
    if array.ndim != 3 or array.shape[1:] != base.shape[1:]:
        raise ValueError(f"not paired: {array.shape[1:]} and {base.shape[1:]} prompts and images")
    return (nanmean(array, (1, 2)) - np.nanmean(base)) / spread(base)


def interquartile_effect(
    values: Metrics, reference: Metrics, strata: Sequence[str], *, by: Resampling = DEFAULT
) -> Estimate:
    """The interquartile mean of the effects over all seeds and metrics, and its interval.

    See `effects` and `interquartile_mean`. Prompts are resampled jointly for all metrics, the
    values and the reference; seeds are resampled jointly for all metrics. The reference's seeds are
    not resampled, and its spread, the unit, stays fixed. The variation due to seeds is stretched
    for their small number. A metric whose reference does not vary over its prompts is missing.

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
    gains = [effects(x, base) for x, base in zip(arrays, reference, strict=True)]
    n_seeds, n_images = len(arrays[0]), int(sum(np.isfinite(x).sum() for x in arrays))
    n_missing = int(sum(np.isnan(np.asarray(x, dtype=float)).sum() for x in values))
    if not n_seeds:
        return NOTHING._replace(n_missing=n_missing)
    weights = prompt_weights(groups, by)
    drawn = np.random.default_rng([by.seed, 2]).integers(n_seeds, size=(by.resamples, n_seeds))
    means = []
    for array, given, unit in zip(arrays, reference, units, strict=True):
        base = np.asarray(given, dtype=float)
        # As one seed, because `effects` averages over all images of the reference.
        pooled = base.transpose(1, 0, 2).reshape(1, base.shape[1], -1)
        gain = seed_means(array, groups, weights, macro=False)
        means.append((gain - seed_means(pooled, groups, weights, macro=False)) / unit)
    draws = interquartile_means(np.concatenate(means, axis=1))
    if n_seeds > 1:
        resampled = [np.take_along_axis(gain, drawn, axis=1) for gain in means]
        moved = interquartile_means(np.concatenate(resampled, axis=1)) - draws
        # Drawing n of n seeds has (n - 1) / n of the variance of n - 1 of n (Rao & Wu, 1988).
        draws = draws + student(n_seeds) * np.sqrt(n_seeds / (n_seeds - 1)) * moved
    value, factors = interquartile_mean(np.concatenate(gains)), resampled_factors(n_seeds, groups)
    return interval_of(value, draws, n_seeds, n_images, n_missing, factors)


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
    n_left, n_right = wins.shape[:2]
    ours = seed_weights(n_left, by, stream=0) / n_left
    theirs = seed_weights(n_right, by, stream=1) / n_right
    draws = np.einsum("rab,ra,rb->r", means, ours, theirs)
    value = mean(pairs, strata)
    n_missing = int(np.isnan(wins).sum())
    resampled = resampled_factors(max(n_left, n_right), groups)
    n_seeds = min(n_left, n_right)
    half = interval_of(value, draws, n_seeds, wins.size - n_missing, n_missing, resampled)
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

    The best row wins if the paired difference to each other row excludes zero, after Holm's
    correction for the number of these comparisons. Rows without values are ignored.

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
    return best if max(holm(p_values)) <= 1 - LEVEL else None
