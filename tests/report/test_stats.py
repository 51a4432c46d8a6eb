"""Statistics against hand-computed values, and how often their intervals cover the truth."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_ind

from tafs.report import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from interval_coverage import MEASURED, simulate  # noqa: E402

TASKS = ["colors"] * 2 + ["position"]
A2, A3, A40, A100 = (["a"] * n for n in (2, 3, 40, 100))
STUDENT = 12.7062047  # the 97.5 % quantile with one degree of freedom


def values(*seeds: list[list[float]]) -> np.ndarray:
    return np.array(seeds, dtype=float)


def test_mean_is_over_all_images_and_macro_over_strata() -> None:
    x = values([[1, 0], [1, 1], [0, 0]])
    assert stats.mean(x, TASKS) == 0.5
    assert stats.mean(x, TASKS, macro=True) == pytest.approx((0.75 + 0) / 2)
    x[:, 2] = np.nan  # a stratum without values
    assert np.isnan(stats.mean(x, TASKS, macro=True))
    assert np.isnan(stats.mean_interval(x, TASKS, macro=True).low)


@pytest.mark.parametrize(
    ("x", "value", "counts", "resampled"),
    [
        ([[[2, np.nan], [4, 6], [np.nan, np.nan]]], 4, (1, 3, 3), "prompts"),
        # A seed without values does not count as a seed.
        ([[[1, 2], [3, 4], [5, 6]], [[np.nan] * 2] * 3], 3.5, (1, 6, 6), "prompts"),
        ([[[np.nan] * 2] * 3], np.nan, (0, 0, 6), ""),
    ],
)
def test_missing_values_are_left_out_and_counted(
    x: list[list[list[float]]], value: float, counts: tuple[int, ...], resampled: str
) -> None:
    estimate = stats.mean_interval(values(*x), A3)
    assert estimate.value == pytest.approx(value, nan_ok=True)
    assert (estimate.n_seeds, estimate.n_images, estimate.n_missing) == counts
    assert estimate.resampled == resampled
    assert np.isnan(estimate.low) == (resampled == "")


HALF = 0.5 * STUDENT  # half the difference of two values is the error of their mean


@pytest.mark.parametrize(
    ("x", "tags", "macro", "expected", "resampled"),
    [
        # Nothing can be resampled.
        (values([[1], [3]]), ["a", "b"], False, (2, np.nan, np.nan), ""),
        # One of two prompts is drawn: each half of the time.
        (values([[0, 0], [1, 1]]), A2, False, (0.5, 0, 1), "prompts"),
        # All differences are between the strata, so no resample changes the mean.
        (values([[0], [0], [0], [6], [6]]), [*A3, "b", "b"], False, (2.4, 2.4, 2.4), "prompts"),
        (values([[0], [0], [0], [6], [6]]), [*A3, "b", "b"], True, (3, 3, 3), "prompts"),
        # Student's interval of two seeds.
        (
            values([[0], [0]], [[1], [1]]),
            A2,
            False,
            (0.5, 0.5 - HALF, 0.5 + HALF),
            "seeds and prompts",
        ),
    ],
)
def test_intervals_match_hand_computed_ones(
    x: np.ndarray, tags: list[str], macro: bool, expected: tuple[float, ...], resampled: str
) -> None:
    estimate = stats.mean_interval(x, tags, macro=macro)
    assert estimate[:3] == pytest.approx(expected, rel=0.02, nan_ok=True)
    assert estimate.resampled == resampled
    assert resampled or estimate.p_value == 1


def test_the_interval_of_many_prompts_is_the_normal_one() -> None:
    x = np.random.default_rng(0).normal(5, 2, (1, 400, 1))
    estimate = stats.mean_interval(x, ["a"] * 400, by=stats.Resampling(4000))
    half = 1.96 * x.std(ddof=1) / 20
    expected = (x.mean(), x.mean() - half, x.mean() + half)
    assert estimate[:3] == pytest.approx(expected, abs=0.02)
    # Four equal images of a prompt hold no more information than one.
    four = stats.mean_interval(np.repeat(x, 4, 2), ["a"] * 400, by=stats.Resampling(4000))
    assert four[:3] == pytest.approx(estimate[:3])


@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("TAFS-GRPO", "base"),
        ("RG-LCD", "base"),
        ("TAFS-GRPO", "Flow-GRPO"),
        ("RG-LCD", "Reward-Instruct"),
    ],
)
def test_the_interval_of_a_difference_has_its_nominal_coverage(
    left: str, right: str, seeds: int
) -> None:
    found = simulate(MEASURED[left], MEASURED.get(right), seeds, replicates=1200, prompts=60)
    assert 0.93 <= found.covers <= 0.975
    assert 0.02 <= found.rejects <= 0.07


def test_variances_and_their_degrees_of_freedom_add_as_welch_says() -> None:
    # Welch's two-sample test of scipy, here of seeds' means on one prompt.
    a, b = [1.0, 4.0, 2.0], [0.0, 0.5, 0.2, 9.0]
    expected = ttest_ind(a, b, equal_var=False)
    x, y = (np.array(v).reshape(-1, 1, 1) for v in (a, b))
    d = stats.paired_difference(x, y, ["a"])
    assert d.seeds_error == pytest.approx(d.value / expected.statistic)
    assert d.seeds_freedom == pytest.approx(expected.df)
    assert d.p_value == pytest.approx(expected.pvalue, abs=2e-3)
    interval = expected.confidence_interval(stats.LEVEL)
    assert d[1:3] == pytest.approx((interval.low, interval.high), rel=0.01)


def test_a_difference_cancels_the_difficulty_of_the_prompts() -> None:
    hard = np.random.default_rng(0).normal(size=(1, 40, 2)) * 10
    d = stats.paired_difference(hard + 0.1, hard, A40)
    assert d[:3] == pytest.approx((0.1, 0.1, 0.1))
    assert d.p_value < 0.01
    assert d.n_images == 80


def test_a_difference_leaves_out_images_that_either_side_lacks() -> None:
    a = values([[1, 9], [2, 2]])
    b = values([[0, np.nan], [0, 0]], [[0, 5], [np.nan, 0]])
    d = stats.paired_difference(a, b, A2)
    assert d.value == pytest.approx((1 + 2) / 2)
    assert (d.n_seeds, d.n_images, d.n_missing) == (1, 2, 2)
    d = stats.paired_difference(values([[1], [np.nan]]), values([[np.nan], [1]]), A2)
    assert np.isnan(d.value) and d.p_value == 1 and d.n_missing == 2


def test_unpaired_values_are_refused() -> None:
    with pytest.raises(ValueError, match="not paired"):
        stats.paired_difference(np.zeros((1, 2, 3)), np.zeros((1, 2, 4)), A2)
    with pytest.raises(ValueError, match=r"\[seeds, prompts, images\] with 2 prompts"):
        stats.mean(np.zeros((1, 3, 1)), A2)


def test_holm_matches_the_published_procedure() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == [1, 1]
    assert stats.holm([]) == []


def rows(*means: float, std: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(1, 100, 2))
    return [shared + m + std * rng.normal(size=(3, 100, 2)) for m in means]


EMPTY = np.full((1, 100, 2), np.nan)


@pytest.mark.parametrize(
    ("x", "higher_is_better", "winner"),
    [
        (rows(0, 1, 0.1), True, 1),
        (rows(0, 1, 0.1), False, None),
        (rows(0, 1, -1), False, 2),
        (rows(0, 1, 1.01), True, None),  # too close
        (rows(1) * 2, True, None),
        (rows(1), True, None),
        ([*rows(1), EMPTY], True, None),  # rows without values take no part
        ([*rows(0, 1), EMPTY], True, 1),
    ],
)
def test_the_winner_is_better_than_every_other_row(
    x: list[np.ndarray], higher_is_better: bool, winner: int | None
) -> None:
    assert stats.supported_winner(x, A100, higher_is_better=higher_is_better) == winner


def test_a_winner_needs_every_difference_and_no_correction_for_their_number() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(size=(1, 40, 1))
    noise = rng.normal(size=(1, 40, 1))
    noise = (noise - noise.mean()) / noise.std()
    best, closer = base + noise + 2.4 / 40**0.5, base + 1.2 / 40**0.5  # in standard errors
    assert 0.01 < stats.paired_difference(best, base, A40).p_value < 0.05
    assert stats.supported_winner([best, *[base] * 5], A40) == 0
    assert stats.supported_winner([best, base, closer], A40) is None


def test_rows_of_the_same_models_are_compared_seed_by_seed() -> None:
    spread = np.array([0.0, 5.0, 10.0]).reshape(3, 1, 1)
    x = [row + spread for row in rows(1, 0, std=0.1)]
    assert stats.supported_winner(x, A100) is None
    assert stats.supported_winner(x, A100, sources=["tafs", "tafs"]) == 0


def test_the_interquartile_mean_drops_both_outer_quarters() -> None:
    assert stats.interquartile_mean([100, 1, 2, 3, 4, 5, 6, -50]) == pytest.approx(14 / 4)
    assert stats.interquartile_mean([np.nan, 7.0]) == 7
    assert np.isnan(stats.interquartile_mean([np.nan]))


def test_effects_are_gains_in_standard_deviations_of_the_references_prompts() -> None:
    reference = values([[0, 2], [4, 6], [8, 10]])  # prompts at 1, 5 and 9: mean 5, std sqrt(32 / 3)
    trained = values([[5, 5]] * 3, [[9, 9]] * 3)
    assert stats.effects(trained, reference).tolist() == pytest.approx([0, 4 / np.sqrt(32 / 3)])


def seeds_of(*means: float, prompts: int = 40, std: float = 0.3) -> np.ndarray:
    """Models of these means on prompts that share their difficulty."""
    rng = np.random.default_rng(5)
    hard = rng.normal(size=(1, prompts, 1))
    return np.concatenate([hard + m + std * rng.normal(size=(1, prompts, 2)) for m in means])


def test_the_interquartile_effect_is_the_interquartile_mean_of_the_effects() -> None:
    # The prompts' deviations are 1 and 10; the effects 0, 1, 2, 30 and 4, 5, -60, 7.
    bases = [values([[-1], [1]]), values([[-10], [10]])]
    gains = [[0, 1, 2, 30], [40, 50, -600, 70]]
    x = [values(*([[g - 1], [g + 1]] for g in metric)) for metric in gains]
    estimate = stats.interquartile_effect(x, bases, A2)
    assert estimate.value == pytest.approx((1 + 2 + 4 + 5) / 4)
    assert (estimate.n_seeds, estimate.n_images, estimate.n_missing) == (4, 16, 0)
    assert estimate.resampled == "seeds and prompts"


def test_the_interquartile_effect_agrees_with_effects_where_values_are_missing() -> None:
    rng = np.random.default_rng(2)
    x = [rng.normal(size=(5, 12, 3)) for _ in range(3)]
    bases = [rng.normal(size=(2, 12, 3)) for _ in range(3)]
    for array in [*x, *bases]:
        array[rng.random(array.shape) < 0.2] = np.nan
    x[1][3] = np.nan  # a seed without one of the metrics
    bases[2][:, 4] = np.nan  # a prompt that the reference lacks
    tags = ["a"] * 5 + ["b"] * 7
    effects = np.concatenate([stats.effects(v, r) for v, r in zip(x, bases, strict=True)])
    estimate = stats.interquartile_effect(x, bases, tags)
    assert np.isnan(effects).sum() == 1
    assert estimate.value == pytest.approx(stats.interquartile_mean(effects))
    assert estimate.low < estimate.value < estimate.high
    assert estimate.n_missing == sum(int(np.isnan(v).sum()) for v in x)
    assert estimate.n_images + estimate.n_missing == 3 * 5 * 12 * 3


def test_the_interquartile_effect_cancels_the_difficulty_of_the_prompts() -> None:
    base = seeds_of(0)
    estimate = stats.interquartile_effect([base + 2 * base.mean(2).std()], [base], A40)
    assert estimate[:3] == pytest.approx((2, 2, 2))
    assert estimate.p_value < 0.01
    assert estimate.resampled == "prompts"
    empty = stats.interquartile_effect([np.full((2, 40, 2), np.nan)], [base], A40)
    assert np.isnan([empty.value, empty.low, empty.high]).all()
    assert (empty.n_seeds, empty.n_missing, empty.resampled, empty.p_value) == (0, 160, "", 1)


def test_the_metrics_of_a_seed_vary_together() -> None:
    # Only seeds differ: four copies of a metric hold no more information than one.
    base = values([[0], [2]])
    x = values([[0], [2]], [[3], [5]])
    one = stats.interquartile_effect([x], [base], A2)
    four = stats.interquartile_effect([x] * 4, [base] * 4, A2)
    reach = 1.5 * STUDENT
    assert one[:3] == pytest.approx((1.5, 1.5 - reach, 1.5 + reach), rel=0.02)
    assert four[:3] == pytest.approx(one[:3])


def test_the_interquartile_effect_covers_the_truth() -> None:
    rng = np.random.default_rng(7)
    n, prompts, covered = 100, 30, 0
    for i in range(n):
        hard = rng.normal(size=(1, prompts, 1))
        base = hard + 0.3 * rng.normal(size=(1, prompts, 2))
        models = 0.3 * rng.normal(size=(10, 1, 1))
        x = [hard + models + 0.3 * rng.normal(size=(10, prompts, 2)) for _ in range(2)]
        by = stats.Resampling(200, i % 4)
        e = stats.interquartile_effect(x, [base, base], ["a"] * prompts, by=by)
        covered += e.low <= 0 <= e.high
    assert 0.85 * n <= covered <= 0.99 * n


X, Y = values([[1], [2], [3]]), values([[1], [2]])


@pytest.mark.parametrize(
    "statistic", [stats.interquartile_effect, stats.probability_of_improvement]
)
@pytest.mark.parametrize(
    ("a", "b", "problem"),
    [
        ([X, X], [X], "not paired: 2 and 1 metrics"),
        ([], [], "not paired: 0 and 0 metrics"),
        ([X], [Y], "not paired|with 3 prompts"),
        ([X, np.repeat(X, 2, 0)], [X, X], r"same seeds, not \[1, 2\]"),
    ],
)
def test_mismatched_inputs_are_refused(
    statistic: Callable[..., stats.Estimate], a: list[np.ndarray], b: list[np.ndarray], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        statistic(a, b, A3)


def test_a_reference_that_does_not_vary_is_no_scale_and_its_metric_is_missing() -> None:
    constant = np.ones((1, 3, 1))
    assert np.isnan(stats.effects(X, constant)).all()
    nothing = stats.interquartile_effect([X], [constant], A3)
    assert np.isnan(nothing.value) and (nothing.n_images, nothing.n_missing) == (0, 3)
    both = stats.interquartile_effect([X, X + 1], [constant, X], A3)
    one = stats.interquartile_effect([X + 1], [X], A3)
    assert both[:3] == pytest.approx(one[:3])
    assert (both.n_images, both.n_missing) == (3, 3)


def test_values_that_do_not_vary_have_no_correlation() -> None:
    with pytest.raises(ValueError, match="both sides must vary"):
        stats.correlation([1, 1, 1], [1, 2, 3])


def test_the_probability_of_improvement_counts_prompts_and_halves_ties() -> None:
    a, b = values([[3], [1], [2]]), values([[2], [1], [5]])
    estimate = stats.probability_of_improvement([a], [b], A3)
    assert estimate.value == pytest.approx((1 + 0.5 + 0) / 3)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    # Every seed of one side meets every seed of the other: wins 1, 1/2, 0 and 1, 1, 1.
    two = stats.probability_of_improvement([np.concatenate([a, a + 10])], [b], A3)
    assert two.value == pytest.approx((1.5 + 3) / 6)
    x = [seeds_of(0), 1 - seeds_of(0)]
    same = stats.probability_of_improvement(x, x, A40)
    assert (*same[:3], same.p_value) == (0.5, 0.5, 0.5, 1)
    clear = stats.probability_of_improvement([seeds_of(0.8, 0.8, 0.8)], [seeds_of(0)], A40)
    assert clear.low > 0.8 and clear.p_value < 0.01


def test_wins_are_averaged_over_the_metrics_that_have_the_prompt() -> None:
    a = [values([[3], [1], [2]]), values([[1], [np.nan], [9]])]
    b = [values([[2], [1], [5]]), values([[2], [0], [5]])]
    estimate = stats.probability_of_improvement(a, b, A3)
    # Wins 1, 1/2, 0 of the first and 0, missing, 1 of the second.
    assert estimate.value == pytest.approx(0.5)
    assert (estimate.n_seeds, estimate.n_images, estimate.n_missing) == (1, 3, 0)
    a[0][0, 1] = np.nan
    estimate = stats.probability_of_improvement(a, b, A3)
    assert (estimate.n_images, estimate.n_missing) == (2, 1)


def test_copies_of_a_metric_do_not_narrow_the_probability_of_improvement() -> None:
    a, b, tags = seeds_of(0, 0.2, 0.3), seeds_of(0.1, 0.1), ["a"] * 20 + ["b"] * 20
    one = stats.probability_of_improvement([a], [b], tags)
    assert stats.probability_of_improvement([a] * 4, [b] * 4, tags) == one


def test_correlation_is_pearsons_and_leaves_out_missing_pairs() -> None:
    x = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, np.nan])
    y = np.array([2.0, 1, 4, 3, 6, 5, 8, 7, 9])
    estimate = stats.correlation(x, y)
    assert estimate.value == pytest.approx(38 / 42)
    assert (estimate.n_images, estimate.n_missing) == (8, 1)


def test_the_interval_of_a_correlation_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=400)
    y = 0.6 * x + 0.8 * rng.normal(size=400)
    estimate = stats.correlation(x, y, by=stats.Resampling(500))
    assert 0.5 < estimate.low < 0.6 < estimate.high < 0.7


def test_the_ratio_of_medians_takes_runs_as_seeds() -> None:
    rng = np.random.default_rng(0)
    slow = [2 * factor * np.exp(0.02 * rng.normal(size=50)) for factor in (1.0, 1.1, 0.9)]
    fast = [factor * np.exp(0.02 * rng.normal(size=50)) for factor in (1.0, 1.05, 0.95)]
    many = stats.ratio_of_medians(slow, fast, by=stats.Resampling(400))
    one = stats.ratio_of_medians(slow[:1], fast[:1], by=stats.Resampling(400))
    assert many.value == pytest.approx(2, rel=0.02) and one.value == pytest.approx(2, rel=0.02)
    # The runs differ by a tenth, the iterations of one by a fiftieth.
    assert many.high - many.low > 10 * (one.high - one.low)
    assert (many.n_seeds, one.n_seeds, many.resampled) == (3, 1, "iterations")


def test_variance_components_are_those_of_the_design() -> None:
    rng = np.random.default_rng(0)
    seeds, prompts = 200, 200
    x = 0.5 * rng.normal(size=(seeds, 1, 1)) + rng.normal(size=(1, prompts, 1))
    x = x + 0.2 * rng.normal(size=(seeds, prompts, 1))
    assert stats.variance_components(x) == pytest.approx((0.25, 1, 0.04), rel=0.15)
    x[0, 0] = np.nan  # a prompt that one seed lacks
    assert stats.variance_components(x) == stats.variance_components(x[:, 1:])
    assert np.isnan(stats.variance_components(x[:1])).all()


def test_a_difference_of_the_detectable_size_is_shown_four_times_in_five() -> None:
    rng = np.random.default_rng(0)
    n, shown, seeds = 400, 0, 5

    def systems(by: float) -> tuple[np.ndarray, np.ndarray]:
        a, b = (0.3 * rng.normal(size=(seeds, 1, 1)) + np.zeros((1, 4, 1)) for _ in range(2))
        return a + by, b

    true = stats.NOTHING._replace(
        n_seeds=seeds, seeds_error=0.3 * (2 / seeds) ** 0.5, seeds_freedom=8, prompts_error=0.0
    )
    size = stats.detectable(true)
    for _ in range(n):
        a, b = systems(size)
        shown += stats.paired_difference(a, b, ["a"] * 4).p_value <= 0.05
    assert 0.75 * n <= shown <= 0.87 * n
    assert stats.seeds_to_show(true._replace(value=size)) == seeds
    assert stats.seeds_to_show(true._replace(value=size / 2)) == pytest.approx(4 * seeds, abs=3)
    assert stats.seeds_to_show(true._replace(value=0.0)) is None
    assert np.isnan(stats.detectable(true._replace(n_seeds=1)))
