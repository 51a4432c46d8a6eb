"""Statistics against hand-computed values, and how often their intervals cover the truth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tafs.report import stats

TASKS = ["colors"] * 2 + ["position"]


def values(*seeds: list[list[float]]) -> np.ndarray:
    return np.array(seeds, dtype=float)


def test_mean_is_over_all_images_and_macro_over_strata() -> None:
    x = values([[1, 0], [1, 1], [0, 0]])
    assert stats.mean(x, TASKS) == 0.5
    assert stats.mean(x, TASKS, macro=True) == pytest.approx((0.75 + 0) / 2)


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
    estimate = stats.mean_interval(values(*x), ["a"] * 3)
    assert estimate.value == pytest.approx(value, nan_ok=True)
    assert (estimate.n_seeds, estimate.n_images, estimate.n_missing) == counts
    assert estimate.resampled == resampled
    assert np.isnan(estimate.low) == (resampled == "")


def test_macro_without_a_stratum_is_nan() -> None:
    x = values([[1, 1], [1, 1], [np.nan, np.nan]])
    assert np.isnan(stats.mean(x, TASKS, macro=True))
    assert np.isnan(stats.mean_interval(x, TASKS, macro=True).low)


def test_without_anything_to_resample_there_is_no_interval() -> None:
    estimate = stats.mean_interval(values([[1], [3]]), ["a", "b"])
    assert estimate.value == 2
    assert np.isnan([estimate.low, estimate.high]).all()
    assert (estimate.resampled, estimate.p_value) == ("", 1)


def test_the_interval_of_two_prompts_ends_at_their_values() -> None:
    # One of two prompts is drawn: each half of the time.
    estimate = stats.mean_interval(values([[0, 0], [1, 1]]), ["a", "a"])
    assert estimate[:3] == (0.5, 0, 1)
    assert estimate.resampled == "prompts"


def test_prompts_are_resampled_within_their_stratum() -> None:
    # All differences are between the strata, so no resample changes the mean.
    x = values([[0], [0], [0], [6], [6]])
    tags = ["a", "a", "a", "b", "b"]
    assert stats.mean_interval(x, tags)[:3] == pytest.approx((2.4, 2.4, 2.4))
    assert stats.mean_interval(x, tags, macro=True)[:3] == pytest.approx((3, 3, 3))


def test_the_interval_of_many_prompts_is_the_normal_one() -> None:
    x = np.random.default_rng(0).normal(5, 2, (1, 400, 1))
    estimate = stats.mean_interval(x, ["a"] * 400, by=stats.Resampling(4000))
    half = 1.96 * x.std(ddof=1) / 20
    assert estimate.value == pytest.approx(x.mean())
    assert (estimate.low, estimate.high) == pytest.approx(
        (x.mean() - half, x.mean() + half), abs=0.02
    )


def test_a_prompt_is_resampled_with_all_its_images() -> None:
    one = np.random.default_rng(0).normal(size=(1, 50, 1))
    tags = ["a"] * 50
    # Four equal images hold no more information than one.
    assert stats.mean_interval(np.repeat(one, 4, 2), tags)[:3] == pytest.approx(
        stats.mean_interval(one, tags)[:3]
    )


def test_the_interval_of_two_seeds_is_widened_by_students_factor() -> None:
    x = values([[0], [0]], [[1], [1]])
    estimate = stats.mean_interval(x, ["a", "a"])
    half = 0.5 * 12.7062 / 1.95996
    assert estimate[:3] == pytest.approx((0.5, 0.5 - half, 0.5 + half), rel=1e-4)
    assert estimate.resampled == "seeds and prompts"


@pytest.mark.parametrize("seed_std", [0.02, 0.5])
def test_the_interval_of_a_difference_covers_the_truth(seed_std: float) -> None:
    rng = np.random.default_rng(1)
    prompts, n = 40, 200
    tags = ["a"] * (prompts // 2) + ["b"] * (prompts // 2)
    covered = 0
    for seed in range(n):
        a, b = (
            rng.normal(size=(3, 1, 1)) * seed_std + rng.normal(size=(3, prompts, 2))
            for _ in range(2)
        )
        shared = rng.normal(size=(1, prompts, 1))
        d = stats.paired_difference(
            a + shared, b + shared, tags, by=stats.Resampling(400, seed % 4)
        )
        covered += d.low <= 0 <= d.high
    assert covered >= 0.95 * n


def test_a_difference_cancels_the_difficulty_of_the_prompts() -> None:
    hard = np.random.default_rng(0).normal(size=(1, 60, 2)) * 10
    d = stats.paired_difference(hard + 0.1, hard, ["a"] * 60)
    assert d[:3] == pytest.approx((0.1, 0.1, 0.1))
    assert d.p_value < 0.01
    assert d.n_images == 120


def test_a_difference_leaves_out_images_that_either_side_lacks() -> None:
    a = values([[1, 9], [2, 2]])
    b = values([[0, np.nan], [0, 0]], [[0, 5], [np.nan, 0]])
    d = stats.paired_difference(a, b, ["a", "a"])
    assert d.value == pytest.approx((1 + 2) / 2)
    assert (d.n_seeds, d.n_images, d.n_missing) == (1, 2, 2)


def test_a_difference_without_common_images_is_nan() -> None:
    d = stats.paired_difference(values([[1], [np.nan]]), values([[np.nan], [1]]), ["a", "a"])
    assert np.isnan(d.value) and d.p_value == 1 and d.n_missing == 2


def test_same_seeds_are_resampled_together() -> None:
    seeds = np.array([0.0, 5.0, 10.0]).reshape(3, 1, 1)
    a, b = np.ones((3, 10, 1)) + seeds, np.zeros((3, 10, 1)) + seeds
    together = stats.paired_difference(a, b, ["a"] * 10, same_seeds=True)
    assert together[:3] == pytest.approx((1, 1, 1))
    apart = stats.paired_difference(a, b, ["a"] * 10)
    assert apart.low < 0 < apart.high


def test_unpaired_values_are_refused() -> None:
    with pytest.raises(ValueError, match="not paired"):
        stats.paired_difference(np.zeros((1, 2, 3)), np.zeros((1, 2, 4)), ["a", "a"])
    with pytest.raises(ValueError, match=r"\[seeds, prompts, images\] with 2 prompts"):
        stats.mean(np.zeros((1, 3, 1)), ["a", "a"])


def test_holm_matches_the_published_procedure() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == [1, 1]
    assert stats.holm([]) == []


def rows(*means: float, std: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(1, 100, 2))
    return [shared + m + std * rng.normal(size=(3, 100, 2)) for m in means]


def test_the_winner_is_better_than_every_other_row() -> None:
    tags = ["a"] * 100
    assert stats.supported_winner(rows(0, 1, 0.1), tags) == 1
    assert stats.supported_winner(rows(0, 1, 0.1), tags, higher_is_better=False) is None
    assert stats.supported_winner(rows(0, 1, -1), tags, higher_is_better=False) == 2


def test_close_rows_have_no_winner() -> None:
    assert stats.supported_winner(rows(0, 1, 1.01), ["a"] * 100) is None
    x = rows(1)[0]
    assert stats.supported_winner([x, x], ["a"] * 100) is None


def test_rows_without_values_take_no_part() -> None:
    assert stats.supported_winner(rows(1), ["a"] * 100) is None
    empty = np.full((1, 100, 2), np.nan)
    assert stats.supported_winner([*rows(1), empty], ["a"] * 100) is None
    assert stats.supported_winner([*rows(0, 1), empty], ["a"] * 100) == 1


def test_more_rows_need_a_larger_difference() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(size=(1, 40, 1))
    noise = rng.normal(size=(1, 40, 1))
    # 2.4 standard errors
    best = base + (noise - noise.mean()) / noise.std() + 2.4 / 40**0.5
    p = stats.paired_difference(best, base, ["a"] * 40).p_value
    assert 0.01 < p < 0.05
    assert stats.supported_winner([best, base], ["a"] * 40) == 0
    assert stats.supported_winner([best, *[base] * 5], ["a"] * 40) is None


def test_rows_of_the_same_models_are_compared_seed_by_seed() -> None:
    spread = np.array([0.0, 5.0, 10.0]).reshape(3, 1, 1)
    x = [row + spread for row in rows(1, 0, std=0.1)]
    assert stats.supported_winner(x, ["a"] * 100) is None
    assert stats.supported_winner(x, ["a"] * 100, sources=["tafs", "tafs"]) == 0


def test_the_seed_decides_the_resamples() -> None:
    x, tags = rows(0)[0], ["a"] * 50 + ["b"] * 50
    assert stats.mean_interval(x, tags) == stats.mean_interval(x, tags)
    assert stats.mean_interval(x, tags, by=stats.Resampling(seed=1)) != stats.mean_interval(x, tags)


def test_the_interquartile_mean_drops_both_outer_quarters() -> None:
    assert stats.interquartile_mean([100, 1, 2, 3, 4, 5, 6, -50]) == pytest.approx(
        (2 + 3 + 4 + 5) / 4
    )
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
    estimate = stats.interquartile_effect(x, bases, ["a", "a"])
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
    assert estimate.value == stats.interquartile_mean(effects)
    assert estimate.low < estimate.value < estimate.high
    assert estimate.n_missing == sum(int(np.isnan(v).sum()) for v in x)
    assert estimate.n_images + estimate.n_missing == 3 * 5 * 12 * 3
    # Where all seeds are equal, every resample gives the value itself.
    strata = [str(i) for i in range(12)]
    one = [v[:1] for v in x]
    assert stats.interquartile_effect(one, bases, strata).resampled == ""
    twice = [np.repeat(v, 2, 0) for v in one]
    estimate = stats.interquartile_effect(twice, bases, strata)
    assert estimate[1:3] == pytest.approx((estimate.value, estimate.value))


def test_the_interquartile_effect_cancels_the_difficulty_of_the_prompts() -> None:
    base = seeds_of(0)
    estimate = stats.interquartile_effect([base + 2 * base.mean(2).std()], [base], ["a"] * 40)
    assert estimate[:3] == pytest.approx((2, 2, 2))
    assert estimate.p_value < 0.01
    assert estimate.resampled == "prompts"


def test_the_metrics_of_a_seed_are_resampled_together() -> None:
    # Only seeds differ: four copies of a metric hold no more information than one.
    base = values([[0], [2]])
    x = values([[0], [2]], [[3], [5]])
    one = stats.interquartile_effect([x], [base], ["a", "a"])
    four = stats.interquartile_effect([x] * 4, [base] * 4, ["a", "a"])
    # Student's factor of two seeds, 12.706 / 1.960, and sqrt(2) for drawing two of two.
    reach = 1.5 * 12.7062047 / 1.9599640 * 2**0.5
    assert one[:3] == pytest.approx((1.5, 1.5 - reach, 1.5 + reach))
    assert four[:3] == pytest.approx(one[:3])


def test_the_interquartile_effect_covers_the_truth() -> None:
    rng = np.random.default_rng(7)
    n, prompts, covered = 100, 30, 0
    for i in range(n):
        hard = rng.normal(size=(1, prompts, 1))
        base = hard + 0.3 * rng.normal(size=(1, prompts, 2))
        models = 0.3 * rng.normal(size=(10, 1, 1))
        x = [hard + models + 0.3 * rng.normal(size=(10, prompts, 2)) for _ in range(2)]
        e = stats.interquartile_effect(
            x, [base, base], ["a"] * prompts, by=stats.Resampling(200, i % 4)
        )
        covered += e.low <= 0 <= e.high
    assert 0.85 * n <= covered <= 0.99 * n


def test_an_interquartile_effect_of_no_seeds_is_nan() -> None:
    empty = stats.interquartile_effect([np.full((2, 40, 2), np.nan)], [seeds_of(0)], ["a"] * 40)
    assert np.isnan([empty.value, empty.low, empty.high]).all()
    assert (empty.n_seeds, empty.n_missing, empty.resampled, empty.p_value) == (0, 160, "", 1)


X, Y = values([[1], [2], [3]]), values([[1], [2]])
MISMATCHED = [
    ([X, X], [X], "not paired: 2 and 1 metrics"),
    ([], [], "not paired: 0 and 0 metrics"),
    ([X], [Y], "not paired|with 3 prompts"),
    ([X, np.repeat(X, 2, 0)], [X, X], r"same seeds, not \[1, 2\]"),
]


@pytest.mark.parametrize(
    "statistic", [stats.interquartile_effect, stats.probability_of_improvement]
)
@pytest.mark.parametrize(("a", "b", "problem"), MISMATCHED)
def test_mismatched_inputs_are_refused(
    statistic: Callable[..., stats.Estimate],
    a: list[np.ndarray],
    b: list[np.ndarray],
    problem: str,
) -> None:
    with pytest.raises(ValueError, match=problem):
        statistic(a, b, ["a"] * 3)


def test_a_reference_without_spread_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be a scale"):
        stats.interquartile_effect([X], [np.ones((1, 3, 1))], ["a"] * 3)


def test_the_probability_of_improvement_counts_prompts_and_halves_ties() -> None:
    a, b = values([[3], [1], [2]]), values([[2], [1], [5]])
    estimate = stats.probability_of_improvement([a], [b], ["x"] * 3)
    assert estimate.value == pytest.approx((1 + 0.5 + 0) / 3)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    # Every seed of one side meets every seed of the other: wins 1, 1/2, 0 and 1, 1, 1.
    two = stats.probability_of_improvement([np.concatenate([a, a + 10])], [b], ["x"] * 3)
    assert two.value == pytest.approx((1.5 + 3) / 6)


def test_identical_models_improve_with_probability_one_half() -> None:
    x = [seeds_of(0), 1 - seeds_of(0)]
    estimate = stats.probability_of_improvement(x, x, ["a"] * 40)
    assert estimate[:3] == (0.5, 0.5, 0.5)
    assert estimate.p_value == 1


def test_wins_are_averaged_over_the_metrics_that_have_the_prompt() -> None:
    a = [values([[3], [1], [2]]), values([[1], [np.nan], [9]])]
    b = [values([[2], [1], [5]]), values([[2], [0], [5]])]
    estimate = stats.probability_of_improvement(a, b, ["x"] * 3)
    # Wins 1, 1/2, 0 of the first and 0, missing, 1 of the second.
    assert estimate.value == pytest.approx(0.5)
    assert (estimate.n_seeds, estimate.n_images, estimate.n_missing) == (1, 3, 0)
    a[0][0, 1] = np.nan
    estimate = stats.probability_of_improvement(a, b, ["x"] * 3)
    assert (estimate.n_images, estimate.n_missing) == (2, 1)


def test_copies_of_a_metric_do_not_narrow_the_probability_of_improvement() -> None:
    a, b, tags = seeds_of(0, 0.2, 0.3), seeds_of(0.1, 0.1), ["a"] * 20 + ["b"] * 20
    one = stats.probability_of_improvement([a], [b], tags)
    assert stats.probability_of_improvement([a] * 4, [b] * 4, tags) == one


def test_a_seed_without_one_metric_still_counts_by_the_others() -> None:
    a, b, tags = seeds_of(0.1, 0.2), seeds_of(0, 0), ["a"] * 40
    lacking = a.copy()
    lacking[1] = np.nan
    estimate = stats.probability_of_improvement([a, lacking], [b, b], tags)
    alone = stats.probability_of_improvement([lacking], [b], tags)
    assert (estimate.n_seeds, alone.n_seeds) == (2, 1)
    assert estimate.value == stats.probability_of_improvement([a], [b], tags).value


def test_a_clear_improvement_has_an_interval_above_one_half() -> None:
    rng = np.random.default_rng(0)
    prompts = rng.normal(size=(1, 60, 1))
    a = prompts + 0.8 + 0.3 * rng.normal(size=(3, 60, 1))
    b = prompts + 0.3 * rng.normal(size=(3, 60, 1))
    estimate = stats.probability_of_improvement([a], [b], ["x"] * 60)
    assert estimate.low > 0.8
    assert estimate.p_value < 0.01


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


def test_a_constant_has_no_correlation() -> None:
    with pytest.raises(ValueError, match="both sides must vary"):
        stats.correlation([1, 1, 1], [1, 2, 3])
