"""Means, stds and log-densities against torch.distributions, diffusers and hand-computed values."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from support.toy import streams
from torch.distributions import Independent, Normal

from tafs.models import sampling

SHAPE = (3, 2, 4, 4)


def states(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(SHAPE, generator=generator) for _ in range(2))  # type: ignore[return-value]


TRANSITIONS = {name: getattr(sampling, name) for name in ("flow_sde", "dance_sde", "cps", "anneal")}
times = st.tuples(st.floats(0.06, 0.99), st.floats(0.05, 0.95)).filter(lambda p: p[1] < p[0] - 1e-3)


@given(pair=times, seed=st.integers(0, 99))
@pytest.mark.parametrize("name", TRANSITIONS)
def test_log_prob_is_the_mean_gaussian_log_density_per_element(name, pair, seed):
    x_t, v = states(seed)
    t, s = pair
    step = TRANSITIONS[name](x_t, v, t, s)
    x_s = step.sample(streams(len(x_t), seed))
    reference = Independent(Normal(step.mean.double(), step.std.double().expand(SHAPE)), 3)
    elements = math.prod(SHAPE[1:])
    expected = reference.log_prob(x_s.double()) / elements
    torch.testing.assert_close(step.log_prob(x_s).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("step", "eta", "g2"), [("flow_sde", 0.7, 0.49 * 0.8 / 0.2), ("dance_sde", 0.3, 0.09)]
)
def test_sde_steps_have_the_hand_computed_mean_and_std(step, eta, g2):
    x_t, v = torch.full((1, 1), 2.0), torch.full((1, 1), 0.5)
    found = TRANSITIONS[step](x_t, v, 0.8, 0.6, eta)
    drift = 0.5 + g2 / 1.6 * (2.0 + 0.2 * 0.5)
    assert found.mean.item() == pytest.approx(2.0 - 0.2 * drift, abs=1e-6)
    assert found.std.item() == pytest.approx(math.sqrt(g2 * 0.2), abs=1e-6)


def test_flow_sde_at_full_noise_uses_the_next_grid_point():
    x_t, v = states()
    step = sampling.flow_sde(x_t, v, 1.0, 0.9, 0.7)
    assert step.std.item() == pytest.approx(0.7 * math.sqrt(1 / 0.1) * math.sqrt(0.1), abs=1e-6)
    assert step.mean.isfinite().all()


@pytest.mark.parametrize("stochastic", [False, True])
def test_ode_and_anneal_equal_the_steps_of_diffusers_scheduler(stochastic):
    x_t, v = states()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=stochastic)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    scheduler.set_begin_index(1)
    torch.manual_seed(5)
    theirs = scheduler.step(v, scheduler.timesteps[1], x_t, return_dict=False)[0]
    torch.manual_seed(5)
    ours = (sampling.anneal if stochastic else sampling.ode)(x_t, v, 0.75, 0.5)
    x_s = ours.mean + ours.std * torch.randn_like(x_t)
    torch.testing.assert_close(x_s, theirs, atol=1e-5, rtol=1e-5)


@given(pair=times, seed=st.integers(0, 99))
def test_cps_runs_from_ode_at_eta_0_to_anneal_at_eta_1(pair, seed):
    x_t, v = states(seed)
    t, s = pair
    still, full = sampling.cps(x_t, v, t, s, 0.0), sampling.cps(x_t, v, t, s, 1.0)
    torch.testing.assert_close(still.mean, sampling.ode(x_t, v, t, s).mean, atol=1e-5, rtol=1e-5)
    assert not still.std.any()
    annealed = sampling.anneal(x_t, v, t, s)
    torch.testing.assert_close(full.mean, annealed.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(full.std, annealed.std)


@pytest.mark.parametrize("name", ["flow_sde", "cps", "anneal"])
def test_the_marginal_of_a_point_mass_is_kept_as_steps_shrink(name):
    """For data at 0 the exact velocity is x_t / t and x_s ~ N(0, s^2): every sampler keeps it."""
    generators = streams(1)
    x = generators.randn([20_000])
    grid = torch.linspace(1, 0, 201)
    step = TRANSITIONS[name]
    for t, s in zip(grid[:-60], grid[1:-59], strict=True):
        x = step(x, x / t, t, s).sample(generators)
    assert x.std().item() == pytest.approx(s.item(), rel=0.03)


def test_constant_velocity_integrates_exactly():
    noise, v = states()
    for steps in (1, 3, 8):
        x_0 = sampling.integrate(
            lambda x, t: v, noise, sampling.uniform_grid(steps), sampling.ode, streams(0)
        )
        torch.testing.assert_close(x_0, noise - v, atol=1e-5, rtol=1e-5)


def test_annealed_sampling_ends_in_the_clean_estimate():
    """With the velocity of a point mass every step's estimate is that point."""
    noise, target = states()
    x_0 = sampling.integrate(
        lambda x, t: (x - target) / t.view(-1, 1, 1, 1),
        noise,
        sampling.uniform_grid(4),
        sampling.anneal,
        streams(len(noise), 1),
    )
    torch.testing.assert_close(x_0, target, atol=1e-5, rtol=1e-5)


def test_densities_are_float32_for_bfloat16_networks_and_undefined_for_deterministic_steps():
    x_t, v = (x.bfloat16() for x in states())
    step = sampling.anneal(x_t, v, 0.5, 0.25)
    assert step.mean.dtype == torch.float32
    assert step.log_prob(x_t).dtype == torch.float32
    with pytest.raises(ValueError, match="no density"):
        sampling.ode(x_t, v, 0.5, 0.25).log_prob(x_t)


def test_times_can_differ_within_a_batch():
    x_t, v = states()
    t, s = torch.tensor([0.9, 0.6, 0.3]), torch.tensor([0.7, 0.4, 0.1])
    batch = sampling.flow_sde(x_t, v, t, s)
    for i in range(3):
        one = sampling.flow_sde(x_t[i : i + 1], v[i : i + 1], t[i].item(), s[i].item())
        torch.testing.assert_close(batch.mean[i : i + 1], one.mean)


def gaussian_error(steps: int, second_order: bool) -> float:
    """Error of the ODE from t = 0.9 to 0.1 for data N(0, 0.5^2), whose exact solution is known."""

    def std(t):
        return math.sqrt((1 - t) ** 2 * 0.25 + t**2)

    def estimate(x, t):
        return (1 - t) * 0.25 / std(t) ** 2 * x

    grid = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64).tolist()
    x, before = torch.ones(1, 1), None
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        x0_hat = estimate(x, t)
        if second_order and before is not None:
            x = sampling.dpm_solver_to(x, x0_hat, t, s, *before)
        else:
            x = sampling.ode_to(x, x0_hat, t, s)
        before = (x0_hat, t)
    return abs(x.item() - std(0.1) / std(0.9))


@pytest.mark.parametrize(("second_order", "power"), [(False, 1), (True, 2)])
def test_solvers_have_their_order_of_convergence(second_order, power):
    coarse, fine = gaussian_error(16, second_order), gaussian_error(64, second_order)
    assert math.log(coarse / fine, 4) == pytest.approx(power, abs=0.35)


def test_both_solvers_are_exact_for_a_point_mass():
    x_0, noise = states()
    x_t = sampling.interpolate(x_0, noise, 0.8)
    expected = sampling.interpolate(x_0, noise, 0.5)
    torch.testing.assert_close(sampling.ode_to(x_t, x_0, 0.8, 0.5), expected)
    torch.testing.assert_close(sampling.dpm_solver_to(x_t, x_0, 0.8, 0.5, x_0, 0.9), expected)


def test_euler_from_the_estimate_is_eulers_step():
    x_t, v = states()
    x0_hat = sampling.x0_estimate(x_t, v, 0.8)
    expected = sampling.ode(x_t, v, 0.8, 0.5).mean
    torch.testing.assert_close(sampling.ode_to(x_t, x0_hat, 0.8, 0.5), expected)


def test_the_share_of_fresh_noise_can_differ_within_a_batch():
    x_t, v = states()
    eta = torch.tensor([0.0, 0.6, 1.0])
    step = sampling.renoise(x_t, v, 0.8, 0.5, eta)
    assert step.std.flatten().tolist() == pytest.approx([0, 0.3, 0.5])
    torch.testing.assert_close(step.mean[:1], sampling.ode(x_t, v, 0.8, 0.5).mean[:1])
    torch.testing.assert_close(step.mean[2:], sampling.anneal(x_t, v, 0.8, 0.5).mean[2:])


def test_the_shift_of_a_grid_keeps_its_ends_and_moves_it_towards_noise():
    grid = sampling.shifted(sampling.uniform_grid(4), 3.0)
    # 3t / (1 + 2t) at t = 1, 3/4, 1/2, 1/4, 0
    assert grid.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
