"""Advantages, credit and the objective against values computed by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.toy import streams

from tafs.methods import grpo
from tafs.models import sampling

rewards = st.lists(
    st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4), min_size=1, max_size=6
).map(lambda rows: torch.tensor(rows)[:, None])  # [steps, 1, 4]


def test_group_advantages_are_the_hand_computed_z_scores():
    advantages = grpo.group_advantages(torch.tensor([[1.0, 2.0, 3.0, 6.0]]))
    # mean 3, population std sqrt((4 + 1 + 0 + 9) / 4) = 1.870829
    expected = torch.tensor([[-2.0, -1.0, 0.0, 3.0]]) / 1.870829
    torch.testing.assert_close(advantages, expected, atol=2e-4, rtol=0)


@given(rewards=rewards)
def test_advantages_have_zero_mean_in_each_group_and_step(rewards):
    advantages = grpo.group_advantages(rewards)
    assert advantages.isfinite().all()
    assert advantages.mean(-1).abs().max() < 1e-4


NORMALISATIONS = (grpo.group_advantages, grpo.global_std_advantages)
magnitudes = st.floats(2.0**-100, 2.0**100, width=32)  # of a reward


@pytest.mark.parametrize("normalise", NORMALISATIONS)
@given(
    value=st.just(0.0) | magnitudes | magnitudes.map(lambda m: -m),
    size=st.integers(1, 24),
    lacking=st.sets(st.integers(0, 23)),
    ulps=st.integers(0, 4),
)
def test_a_group_with_equal_rewards_has_zero_advantages(normalise, value, size, lacking, ulps):
    """Whatever the other groups are; rewards that differ by float rounding are equal."""
    rewards = torch.full((2, 3, size), value)
    rewards[1] = torch.linspace(value, value + 1, size)
    rewards[1, 2] = value
    for _ in range(ulps):
        rewards[..., 0, -1] = rewards[..., 0, -1].nextafter(torch.tensor(0.0))
    rewards[..., [image for image in lacking if image < size]] = float("nan")
    advantages = normalise(rewards)
    assert advantages.isfinite().all()
    assert not advantages[0].any() and not advantages[1, 2].any()


def test_scaled_equal_rewards_have_zero_advantages():
    """The float32 mean of 50 times 5/6 is another number."""
    rewards = 50 * torch.full((1, 6), 5 / 6)
    assert (rewards - rewards.mean(-1)).any()
    for normalise in NORMALISATIONS:
        assert not normalise(rewards).any()


@pytest.mark.parametrize("normalise", NORMALISATIONS)
@given(power=st.integers(-100, 100), shift=st.integers(-64, 64))
def test_a_scale_or_a_shift_of_the_rewards_changes_the_advantages_only_by_eps(
    normalise, power, shift
):
    """A = (R - mean) / (std + eps), by hand for deviations of -2, -1, 0 and 3."""
    rewards = (torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 4.0, 3.0, 0.0]]) + shift) * 2.0**power
    deviations = torch.tensor([[-2.0, -1.0, 0.0, 3.0], [2.0, 1.0, 0.0, -3.0]]).double()
    expected = deviations / (3.5**0.5 + 1e-4 / 2.0**power)
    torch.testing.assert_close(normalise(rewards).double(), expected, atol=0, rtol=1e-6)


def test_a_preference_is_relative_to_the_size_of_the_rewards():
    one = torch.tensor(1.0)
    above = one.nextafter(torch.tensor(2.0))
    for _ in range(grpo.SAME_ULPS):
        assert not grpo.group_advantages(torch.stack([one, above])[None]).any()
        above = above.nextafter(torch.tensor(2.0))
    assert grpo.group_advantages(torch.stack([one, above])[None]).all()
    assert grpo.group_advantages(torch.tensor([[1e-9, 2e-9]])).all()


@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_binade_is_the_power_of_two_above_a_number(value):
    found = grpo.binade(torch.tensor(value, dtype=torch.float64)).item()
    if value:
        assert found / 2 <= abs(value) < found
    assert math.frexp(found)[0] == 0.5


def test_groups_and_steps_are_normalised_separately():
    rewards = torch.tensor([[[0.0, 1.0], [0.0, 100.0]], [[5.0, 4.0], [1.0, 1.0]]])
    advantages = grpo.group_advantages(rewards)
    expected = torch.tensor([[[-1.0, 1.0], [-1.0, 1.0]], [[1.0, -1.0], [0.0, 0.0]]])
    torch.testing.assert_close(advantages, expected, atol=1e-3, rtol=0)


def test_global_std_divides_by_the_batch_wide_std():
    rewards = torch.tensor([[0.0, 2.0], [10.0, 12.0]])
    # group means 1 and 11; batch mean 6, std sqrt((36 + 16 + 16 + 36) / 4) = 5.0990
    expected = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]) / 5.0990
    torch.testing.assert_close(grpo.global_std_advantages(rewards), expected, atol=1e-4, rtol=0)


NAN = float("nan")


def test_group_mean_and_std_ignore_a_missing_reward():
    advantages = grpo.group_advantages(torch.tensor([[1.0, NAN, 2.0, 3.0, 6.0], [0, 0, 0, NAN, 2]]))
    # Known rewards: mean 3, std 1.870829; mean 0.5, std sqrt((3 * 0.25 + 2.25) / 4) = 0.866025
    first = torch.tensor([-2.0, 0.0, -1.0, 0.0, 3.0]) / 1.870829
    second = torch.tensor([-0.5, -0.5, -0.5, 0.0, 1.5]) / 0.866025
    torch.testing.assert_close(advantages, torch.stack([first, second]), atol=4e-4, rtol=0)
    assert advantages[0, 1] == 0 and advantages[1, 3] == 0


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_a_group_with_fewer_than_two_rewards_has_zero_advantages(normalise):
    advantages = normalise(torch.tensor([[NAN, 5.0, NAN], [NAN, NAN, NAN], [1.0, 2.0, 3.0]]))
    assert not advantages[:2].any()
    assert advantages[2, 2] == -advantages[2, 0] > 0


def test_the_global_std_ignores_missing_rewards():
    rewards = torch.tensor([[0.0, 2.0, NAN], [NAN, 7.0, NAN]])
    # Batch mean 3, std sqrt((9 + 1 + 16) / 3) = 2.943920, the second group's reward included.
    expected = torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]) / 2.943920
    torch.testing.assert_close(grpo.global_std_advantages(rewards), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("normalise", NORMALISATIONS)
@given(rewards=rewards, lacking=st.sets(st.integers(0, 3), max_size=4))
def test_known_rewards_are_normalised_as_without_the_missing_ones(normalise, rewards, lacking):
    known = [image for image in range(4) if image not in lacking]
    rewards = rewards.double()  # nearly equal float32 rewards differ by rounding only
    with_gaps = rewards.clone()
    with_gaps[..., list(lacking)] = NAN
    advantages = normalise(with_gaps)
    assert not advantages[..., list(lacking)].any()
    if known:
        torch.testing.assert_close(advantages[..., known], normalise(rewards[..., known]))


def test_the_mean_of_known_values_equals_the_mean_if_all_are_known():
    values = torch.rand(7, 3, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(grpo.mean_of_known(values, (1, 2)), values.mean((1, 2)))
    values[2, 1, 5] = values[2, 2, 0] = values[4] = NAN
    means = grpo.mean_of_known(values, (1, 2))
    assert means[2].item() == pytest.approx(values[2][~values[2].isnan()].mean().item())
    assert means.isnan().tolist() == [False] * 4 + [True] + [False] * 2


IMAGES = torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)


@pytest.mark.parametrize(
    ("credit", "counted", "expected"),
    [
        ("step", 3, [1, 10, 100]),
        ("step", 2, [10, 10, 100]),
        ("step", 1, [100, 100, 100]),
        ("final", 1, [100, 100, 100]),
        ("sum", 3, [111, 111, 111]),
        ("sum", 2, [110, 110, 110]),
        ("to_go", 3, [111, 110, 100]),
        ("to_go", 2, [110, 110, 100]),
        ("to_go", 1, [100, 100, 100]),
    ],
)
def test_credit_readings_give_the_hand_computed_sums(credit, counted, expected):
    credited = grpo.assign_credit(IMAGES[-counted:], credit, steps=3)
    assert credited.flatten().tolist() == expected


def test_an_unknown_credit_reading_is_refused_by_name():
    with pytest.raises(ValueError, match="'steps'.*step, sum, to_go, final"):
        grpo.assign_credit(IMAGES, "steps", 3)


def test_the_objective_is_minus_the_mean_advantage_before_the_first_update():
    log_prob, advantages = torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 1.5])
    objective = grpo.clipped_objective(log_prob, log_prob, advantages, 1e-4)
    assert objective.loss.item() == -1.0
    assert objective.ratio.tolist() == [1.0, 1.0]
    assert not objective.clipped.any()


def test_an_image_with_advantage_0_adds_nothing_and_counts_in_the_mean():
    """An invalid image, whatever its ratio: (1.1 * 1 + 0 + 0.9 * -1) / 3, by hand."""
    log_prob = torch.tensor([1.3, 5.0, 0.7]).log().requires_grad_()
    advantages = torch.tensor([1.0, 0.0, -1.0])
    objective = grpo.clipped_objective(log_prob, torch.zeros(3), advantages, 0.1)
    assert objective.loss.item() == pytest.approx(-0.2 / 3, abs=1e-6)
    assert objective.clipped.tolist() == [True, False, True]
    objective = grpo.clipped_objective(log_prob, torch.zeros(3), advantages, 0.5)
    (gradient,) = torch.autograd.grad(objective.loss, log_prob)
    # d(r A) / d log r = r A of the others, each over 3
    torch.testing.assert_close(gradient, torch.tensor([-1.3, 0.0, 0.7]) / 3)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "clipped"),
    [
        (1.3, 1.0, 1.1, True),
        (0.7, 1.0, 0.7, False),
        (1.3, -1.0, -1.3, False),
        (0.7, -1.0, -0.9, True),
    ],
)
def test_clipping_limits_only_improvements(ratio, advantage, value, clipped):
    log_prob = torch.tensor([ratio]).log()
    objective = grpo.clipped_objective(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.1)
    assert objective.loss.item() == pytest.approx(-value, abs=1e-6)
    assert objective.clipped.item() is clipped


def test_kl_of_equal_variance_gaussians_is_the_halved_squared_distance():
    mean, reference = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])
    kl = grpo.gaussian_kl(mean, reference, torch.tensor(2.0))
    assert kl.item() == pytest.approx(((1 / 8) + (4 / 8)) / 2)


def test_the_printed_ratio_of_a_deterministic_estimate_has_no_gradient_on_policy():
    """Eq. 10 prints p(x_0^n | x_t), where x_0^n is a function of x_t.

    With any fixed variance its on-policy gradient is exactly zero; that of the re-noising is not.
    """
    v = torch.randn(4, 3, requires_grad=True)
    x_t, advantages = torch.randn(4, 3), torch.tensor([1.0, -1.0, 2.0, -2.0])
    estimate = sampling.x0_estimate(x_t, v, 0.5)
    as_printed = sampling.Transition(estimate, torch.tensor(0.3))
    log_prob = as_printed.log_prob(estimate.detach())
    loss = grpo.clipped_objective(log_prob, log_prob.detach(), advantages, 0.1).loss
    (gradient,) = torch.autograd.grad(loss, v, retain_graph=True)
    assert not gradient.any()
    renoised = sampling.anneal(x_t, v, 0.5, 0.25)
    x_s = renoised.sample(streams(4)).detach()
    log_prob = renoised.log_prob(x_s)
    loss = grpo.clipped_objective(log_prob, log_prob.detach(), advantages, 0.1).loss
    (gradient,) = torch.autograd.grad(loss, v)
    assert gradient.any()
