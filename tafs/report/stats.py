"""Means, paired differences and winners, with bootstrap intervals over training seeds and prompts.

Values are arrays [seeds, prompts, images]. NaN is a missing value: it is left out, and counted.

Seeds and prompts are two crossed random factors, so both are resampled: a seed as a whole, and
prompts within their stratum (GenEval's task), each with all of its images. Resampling both makes
the interval a little too wide rather than too narrow (Owen, 2007, "The pigeonhole bootstrap").
Two corrections for small numbers, without which three seeds would give far too short intervals:

- n - 1 units are drawn in place of n, which makes the variance unbiased (Rao & Wu, 1988).
- The draws of S seeds are stretched by Student's factor t(S - 1) / z: three seeds have only six
  distinct resamples, whose percentiles end at the best and the worst seed. Simulated with seeds
  that differ much, three each, the 95 % interval of a difference covers 99 % of the time with
  the factor and 85 % without: it errs on the side of claiming less.

One seed cannot be resampled: then only prompts are, and `resampled` says so. Where nothing can be
resampled (one seed, one prompt a stratum) there is a value and no interval.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit
from scipy.stats import bootstrap, pearsonr, trim_mean

Array = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 2000


class Estimate(NamedTuple):
    """A mean, or a difference of means, and its percentile interval."""

    value: float
    low: float
    high: float
    n_seeds: int  # seeds with any value; of a difference, the smaller number
    n_images: int  # values that count, over all seeds
    n_missing: int
    resampled: str  # "seeds and prompts", "seeds", "prompts", or "": no interval
    p_value: float  # two-sided, of a value of 0; 1 without an interval


def mean(values: ArrayLike, strata: Sequence[str], *, macro: bool = False) -> float:
    """The mean over seeds of each seed's mean; NaN where there is no value.

    Args:
        values: [seeds, prompts, images].
        strata: [prompts].
        macro: a seed's mean is the mean of its strata's means (GenEval's overall score), instead
            of the mean over all of its images; NaN where a stratum has no value.
    """
    array, groups = _checked(values, strata)
    ones = np.ones((1, array.shape[1]))
    return float(_seed_means(array, groups, ones, macro).mean()) if len(array) else np.nan


def mean_interval(
    values: ArrayLike,
    strata: Sequence[str],
    *,
    macro: bool = False,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean (see `mean`) and its interval."""
    array, groups = _checked(values, strata)
    draws = _draws(array, groups, macro, level, resamples, seed, stream=0)
    missing = int(np.isnan(np.asarray(values)).sum())
    n_images = int(np.isfinite(array).sum())
    value = mean(array, strata, macro=macro)
    resampled = _resampled(len(array), groups)
    return _estimate(value, draws, level, len(array), n_images, missing, resampled)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    strata: Sequence[str],
    *,
    same_seeds: bool = False,
    macro: bool = False,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """mean(a) - mean(b) over the same prompts and start noise, and its interval.

    Both share one resampling of the prompts; their seeds are resampled independently. An image
    counts only where every seed of both has a value, or the harder images might count on one
    side alone.

    Args:
        a: [seeds of a, prompts, images].
        b: [seeds of b, prompts, images].
        same_seeds: seed i of both is the same trained model (say, at two numbers of steps).
    """
    (left, groups), (right, _) = _checked(a, strata), _checked(b, strata)
    if left.shape[1:] != right.shape[1:]:
        raise ValueError(f"not paired: {left.shape[1:]} and {right.shape[1:]} prompts and images")
    seeds = min(len(left), len(right))
    # Models are matched by their place: where one of them has no value, the places moved.
    same_seeds = same_seeds and len(left) == len(right) == len(np.asarray(a)) == len(np.asarray(b))
    common = np.isfinite(left).all(0) & np.isfinite(right).all(0) if seeds else np.zeros(1, bool)
    if not common.any():
        return _estimate(np.nan, np.empty(0), level, 0, 0, int(common.size), "")
    left, right = np.where(common, left, np.nan), np.where(common, right, np.nan)
    streams = (0, 0) if same_seeds else (0, 1)
    draws = _draws(left, groups, macro, level, resamples, seed, streams[0])
    draws = draws - _draws(right, groups, macro, level, resamples, seed, streams[1])
    value = mean(left, strata, macro=macro) - mean(right, strata, macro=macro)
    n_images, n_missing = int(common.sum()), int((~common).sum())
    resampled = _resampled(max(len(left), len(right)), groups)
    return _estimate(value, draws, level, seeds, n_images, n_missing, resampled)


def interquartile_mean(values: ArrayLike) -> float:
    """The mean of the middle half (Agarwal et al., 2021); NaN where there is no value."""
    array = np.asarray(values, dtype=float)
    array = array[np.isfinite(array)]
    return float(trim_mean(array, 0.25)) if len(array) else np.nan


def effects(values: ArrayLike, reference: ArrayLike) -> Array:
    """Each seed's gain on a reference, in standard deviations of the reference's prompts: [seeds].

    This puts all metrics on one scale: 1 is as far as a typical prompt lies from the mean.

    Args:
        values: [seeds, prompts, images]; reference: [seeds, prompts, images] of the same prompts.

    Raises:
        ValueError: the prompts are not the same, or the reference does not vary over them.
    """
    array, base = np.asarray(values, dtype=float), np.asarray(reference, dtype=float)
    if array.ndim != 3 or array.shape[1:] != base.shape[1:]:
        raise ValueError(f"not paired: {array.shape[1:]} and {base.shape[1:]} prompts and images")
    return (_nanmean(array, (1, 2)) - np.nanmean(base)) / _spread(base)


def interquartile_effect(
    values: Sequence[ArrayLike],
    reference: Sequence[ArrayLike],
    strata: Sequence[str],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The interquartile mean of the effects over all seeds and metrics, and its interval.

    See `effects` and `interquartile_mean`. Prompts are resampled for all metrics, the values and
    the reference at once; seeds for all metrics at once. The reference's seeds are not, and its
    spread stays as it is: it is the unit. What the choice of seeds moves is stretched for their
    small number, as everywhere in this module.

    Args:
        values: one [seeds, prompts, images] a metric; seed i is the same model in all of them.
        reference: one [seeds, prompts, images] a metric, of the same prompts.

    Raises:
        ValueError: the metrics, their seeds or the prompts do not match, or a reference does not
            vary over its prompts.
    """
    _check_metrics(values, reference)
    arrays, groups = _by_metric(values, strata)
    gains = [effects(x, base) for x, base in zip(arrays, reference, strict=True)]
    n_seeds, n_images = len(arrays[0]), int(sum(np.isfinite(x).sum() for x in arrays))
    n_missing = int(sum(np.isnan(np.asarray(x, dtype=float)).sum() for x in values))
    if not n_seeds:
        return _estimate(np.nan, np.empty(0), level, 0, 0, n_missing, "")
    weights = _prompt_weights(groups, resamples, seed)
    drawn = np.random.default_rng([seed, 2]).integers(n_seeds, size=(resamples, n_seeds))
    means = []
    for array, given in zip(arrays, reference, strict=True):
        base = np.asarray(given, dtype=float)
        # As one seed: `effects` takes the mean over all of the reference's images, too.
        pooled = base.transpose(1, 0, 2).reshape(1, base.shape[1], -1)
        gain = _seed_means(array, groups, weights, macro=False)
        means.append((gain - _seed_means(pooled, groups, weights, macro=False)) / _spread(base))
    draws = _interquartile_means(np.concatenate(means, axis=1))
    if n_seeds > 1:
        resampled = [np.take_along_axis(gain, drawn, axis=1) for gain in means]
        moved = _interquartile_means(np.concatenate(resampled, axis=1)) - draws
        # Drawing n of n seeds varies by (n - 1) / n of what n - 1 of n do (Rao & Wu, 1988).
        draws = draws + _student(n_seeds, level) * np.sqrt(n_seeds / (n_seeds - 1)) * moved
    return _estimate(
        interquartile_mean(np.concatenate(gains)),
        draws,
        level,
        n_seeds,
        n_images,
        n_missing,
        _resampled(n_seeds, groups),
    )


def probability_of_improvement(
    a: Sequence[ArrayLike],
    b: Sequence[ArrayLike],
    strata: Sequence[str],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """How often a prompt is better under a than under b, ties counting half, and its interval.

    A prompt's value is its mean over images; every seed of a meets every seed of b (Agarwal et al.,
    2021). A prompt's wins are averaged over the metrics that have it before anything is resampled:
    the metrics of one image are not independent. The p-value is that of 1/2.

    Args:
        a, b: one [seeds, prompts, images] a metric, higher being better, of the same prompts and
            start noise; seed i is the same model in all metrics.

    Raises:
        ValueError: the metrics, their seeds or the prompts do not match.
    """
    _check_metrics(a, b)
    (left, groups), (right, _) = _by_metric(a, strata), _by_metric(b, strata)
    if not (len(left[0]) and len(right[0])):
        return _estimate(np.nan, np.empty(0), level, 0, 0, 0, "")
    first = np.stack([_nanmean(x, 2) for x in left])[:, :, None]
    second = np.stack([_nanmean(x, 2) for x in right])[:, None]
    wins = np.where(first == second, 0.5, first > second)
    wins = np.where(np.isnan(first) | np.isnan(second), np.nan, wins)
    wins = _nanmean(wins, 0)  # [seeds of a, seeds of b, prompts]
    pairs = wins.reshape(-1, wins.shape[2], 1) - 0.5
    weights = _prompt_weights(groups, resamples, seed)
    means = _seed_means(pairs, groups, weights, macro=False).reshape(-1, *wins.shape[:2])
    n_left, n_right = wins.shape[:2]
    ours = _seed_weights(n_left, level, resamples, seed, stream=0) / n_left
    theirs = _seed_weights(n_right, level, resamples, seed, stream=1) / n_right
    draws = np.einsum("rab,ra,rb->r", means, ours, theirs)
    value = mean(pairs, strata)
    n_missing = int(np.isnan(wins).sum())
    resampled = _resampled(max(n_left, n_right), groups)
    n_seeds = min(n_left, n_right)
    half = _estimate(value, draws, level, n_seeds, wins.size - n_missing, n_missing, resampled)
    low, high = (float(np.clip(bound + 0.5, 0, 1)) for bound in (half.low, half.high))
    return half._replace(value=half.value + 0.5, low=low, high=high)


def correlation(
    x: ArrayLike, y: ArrayLike, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Pearson's r of paired values and its bootstrap interval over the pairs; p-value of r = 0.

    Args:
        x, y: [n]; pairs with a missing value are left out, and counted.

    Raises:
        ValueError: fewer than three pairs, or one side does not vary.
    """
    left, right = (np.asarray(v, dtype=float).ravel() for v in (x, y))
    if left.shape != right.shape:
        raise ValueError(f"not paired: {len(left)} and {len(right)} values")
    kept = np.isfinite(left) & np.isfinite(right)
    left, right = left[kept], right[kept]
    if len(left) < 3 or not (left.std() > 0 and right.std() > 0):
        raise ValueError("a correlation needs three pairs, and both sides to vary")
    found = pearsonr(left, right)
    interval = bootstrap(
        (left, right),
        lambda a, b, axis: pearsonr(a, b, axis=axis).statistic,
        paired=True,
        vectorized=True,
        confidence_level=level,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
        batch=100,
    ).confidence_interval
    missing = int((~kept).sum())
    return Estimate(
        float(found.statistic),
        float(interval.low),
        float(interval.high),
        1,
        len(left),
        missing,
        "prompts",
        float(found.pvalue),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of tests (Holm, 1979)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    steps = (len(p) - np.arange(len(p))) * p[order]
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return [float(x) for x in adjusted]


def supported_winner(
    rows: Sequence[ArrayLike],
    strata: Sequence[str],
    *,
    sources: Sequence[Hashable] | None = None,
    higher_is_better: bool = True,
    macro: bool = False,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> int | None:
    """The index of the row that is better than every other one; None where none is.

    The best row wins if the paired difference to each other row excludes zero, after Holm's
    correction for the number of these comparisons. A row without values takes no part.

    Args:
        rows: each [seeds, prompts, images].
        sources: rows of equal source come from the same trained models; None: all differ.
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
                rows[best],
                rows[i],
                strata,
                same_seeds=same,
                macro=macro,
                level=level,
                resamples=resamples,
                seed=seed,
            )
            p_values.append(difference.p_value)
    return best if max(holm(p_values)) <= 1 - level else None


def _checked(values: ArrayLike, strata: Sequence[str]) -> tuple[Array, tuple[int, ...]]:
    """Values of the seeds that have any, and each prompt's stratum as a number."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 3 or array.shape[1] != len(strata):
        raise ValueError(
            f"values must be [seeds, prompts, images] with {len(strata)} prompts, "
            f"not {list(array.shape)}"
        )
    number = {name: i for i, name in enumerate(dict.fromkeys(strata))}
    return array[np.isfinite(array).any((1, 2))], tuple(number[name] for name in strata)


def _check_metrics(a: Sequence[ArrayLike], b: Sequence[ArrayLike]) -> None:
    if len(a) != len(b) or not len(a):
        raise ValueError(f"not paired: {len(a)} and {len(b)} metrics")


def _by_metric(
    values: Sequence[ArrayLike], strata: Sequence[str]
) -> tuple[list[Array], tuple[int, ...]]:
    """Each metric's values of the seeds that have any in some metric, and the prompts' strata."""
    groups = [_checked(metric, strata)[1] for metric in values]
    arrays = [np.asarray(metric, dtype=float) for metric in values]
    seeds = [len(array) for array in arrays]
    if len(set(seeds)) > 1:
        raise ValueError(f"the metrics must have the same seeds, not {seeds} of them")
    kept = np.any([np.isfinite(array).any((1, 2)) for array in arrays], axis=0)
    return [array[kept] for array in arrays], groups[0]


def _nanmean(array: Array, axis: int | tuple[int, ...]) -> Array:
    """The mean of the values there are; NaN, without a warning, where there is none."""
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmean(array, axis=axis))


def _spread(reference: Array) -> float:
    """The standard deviation of the prompts' means."""
    prompts = _nanmean(reference, (0, 2))
    prompts = prompts[np.isfinite(prompts)]
    spread = float(prompts.std()) if len(prompts) else 0.0
    if not spread > 0:
        raise ValueError("the reference is the same for every prompt: it gives no scale")
    return spread


def _interquartile_means(rows: Array) -> Array:
    """`interquartile_mean` of each row: [n] from [n, values]."""
    ordered = np.sort(rows, axis=1)  # NaN last
    count = np.isfinite(ordered).sum(1, keepdims=True)
    cut = count // 4
    place = np.arange(rows.shape[1])
    middle = np.where((place >= cut) & (place < count - cut), ordered, np.nan)
    return _nanmean(middle, 1)


def _seed_means(array: Array, groups: tuple[int, ...], weights: Array, macro: bool) -> Array:
    """Each seed's weighted mean: [resamples, seeds] from weights [resamples, prompts]."""
    present = np.isfinite(array)
    # [prompts, seeds]; of a transposed view the products below take 70 times as long.
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


def _draws(
    array: Array,
    groups: tuple[int, ...],
    macro: bool,
    level: float,
    resamples: int,
    seed: int,
    stream: int,
) -> Array:
    """Resampled means [resamples]; the prompts' draws depend on `seed` alone, so are shared."""
    if not len(array):
        return np.empty(0)
    means = _seed_means(array, groups, _prompt_weights(groups, resamples, seed), macro)
    return (means * _seed_weights(len(array), level, resamples, seed, stream)).mean(1)


def _seed_weights(n: int, level: float, resamples: int, seed: int, stream: int) -> Array:
    """[resamples, n] of mean 1, stretched by Student's factor; ones where n is 1."""
    if n == 1:
        return np.ones((resamples, 1))
    weights = _resample(n, resamples, np.random.default_rng([seed, 1, stream]))
    stretched: Array = 1 + (weights - 1) * _student(n, level)
    return stretched


def _student(n: int, level: float) -> float:
    """How much wider Student's interval of n values is than the normal one."""
    tail = (1 + level) / 2
    return float(stdtrit(n - 1, tail) / ndtri(tail))


@lru_cache(maxsize=8)
def _prompt_weights(groups: tuple[int, ...], resamples: int, seed: int) -> Array:
    """[resamples, prompts], with mean 1 within each stratum."""
    rng = np.random.default_rng([seed, 0])
    numbers = np.asarray(groups)
    weights = np.empty((resamples, len(groups)))
    for group in np.unique(numbers):
        of = numbers == group
        weights[:, of] = _resample(int(of.sum()), resamples, rng)
    weights.flags.writeable = False
    return weights


def _resample(n: int, resamples: int, rng: np.random.Generator) -> Array:
    """Weights [resamples, n] of mean 1: n - 1 units drawn with replacement (Rao & Wu, 1988)."""
    if n == 1:
        return np.ones((resamples, 1))
    drawn = rng.integers(n, size=(resamples, n - 1)) + n * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n)
    weights: Array = counts.astype(float) * (n / (n - 1))
    return weights


def _resampled(n_seeds: int, groups: tuple[int, ...]) -> str:
    """Which factors have more than one unit to draw from."""
    if not n_seeds:
        return ""
    factors = {"seeds": n_seeds > 1, "prompts": len(set(groups)) < len(groups)}
    return " and ".join(name for name, varies in factors.items() if varies)


def _estimate(
    value: float,
    draws: Array,
    level: float,
    n_seeds: int,
    n_images: int,
    n_missing: int,
    resampled: str,
) -> Estimate:
    draws = draws[np.isfinite(draws)]
    if not resampled or not np.isfinite(value) or not len(draws):
        nan = float("nan")
        return Estimate(value, nan, nan, n_seeds, n_images, n_missing, "", 1.0)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    below, above = int((draws <= 0).sum()), int((draws >= 0).sum())
    p_value = min(1.0, 2 * (1 + min(below, above)) / (1 + len(draws)))
    return Estimate(
        value, float(low), float(high), n_seeds, n_images, n_missing, resampled, p_value
    )
