"""Advantages, credit and the objective against values computed by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tafs import grpo, sampling

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


def test_a_group_of_equal_rewards_teaches_nothing():
    assert not grpo.group_advantages(torch.full((3, 2, 5), 0.7)).any()


def test_groups_and_steps_are_normalised_apart():
    rewards = torch.tensor([[[0.0, 1.0], [0.0, 100.0]], [[5.0, 4.0], [1.0, 1.0]]])
    advantages = grpo.group_advantages(rewards)
    expected = torch.tensor([[[-1.0, 1.0], [-1.0, 1.0]], [[1.0, -1.0], [0.0, 0.0]]])
    torch.testing.assert_close(advantages, expected, atol=1e-3, rtol=0)


def test_global_std_divides_by_the_batch_wide_std():
    rewards = torch.tensor([[0.0, 2.0], [10.0, 12.0]])
    # group means 1 and 11; batch mean 6, std sqrt((36 + 16 + 16 + 36) / 4) = 5.0990
    expected = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]) / 5.0990
    torch.testing.assert_close(grpo.global_std_advantages(rewards), expected, atol=1e-4, rtol=0)


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


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "clipped"),
    [
        (1.3, 1.0, 1.1, True),
        (0.7, 1.0, 0.7, False),
        (1.3, -1.0, -1.3, False),
        (0.7, -1.0, -0.9, True),
    ],
)
def test_clipping_limits_only_what_would_gain(ratio, advantage, value, clipped):
    log_prob = torch.tensor([ratio]).log()
    objective = grpo.clipped_objective(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.1)
    assert objective.loss.item() == pytest.approx(-value, abs=1e-6)
    assert objective.clipped.item() is clipped


def test_kl_of_equal_variance_gaussians_is_the_halved_squared_distance():
    mean, reference = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])
    kl = grpo.gaussian_kl(mean, reference, torch.tensor(2.0))
    assert kl.item() == pytest.approx(((1 / 8) + (4 / 8)) / 2)


def test_the_printed_ratio_of_a_deterministic_estimate_has_no_gradient_on_policy():
    """Eq. 10 prints p(x_0^n | x_t) of an image that is a function of its noisy state: whatever
    variance it is given, the on-policy gradient is exactly zero, while the re-noising's is not."""
    v = torch.randn(4, 3, requires_grad=True)
    x_t, advantages = torch.randn(4, 3), torch.tensor([1.0, -1.0, 2.0, -2.0])
    estimate = sampling.x0_estimate(x_t, v, 0.5)
    as_printed = sampling.Transition(estimate, torch.tensor(0.3))
    log_prob = as_printed.log_prob(estimate.detach())
    loss = grpo.clipped_objective(log_prob, log_prob.detach(), advantages, 0.1).loss
    (gradient,) = torch.autograd.grad(loss, v, retain_graph=True)
    assert not gradient.any()
    renoised = sampling.anneal(x_t, v, 0.5, 0.25)
    x_s = renoised.sample(torch.Generator().manual_seed(0)).detach()
    log_prob = renoised.log_prob(x_s)
    loss = grpo.clipped_objective(log_prob, log_prob.detach(), advantages, 0.1).loss
    (gradient,) = torch.autograd.grad(loss, v)
    assert gradient.any()
