"""Samplers as Gaussian transitions x_s | x_t ~ N(mean, std^2 I), for times t > s.

Convention: t = 1 is noise and t = 0 is data, x_t = (1 - t) x_0 + t e, and the network predicts
v = e - x_0. Rollout and loss build their transitions with the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from tafs.common.seeding import Generators

Time: TypeAlias = "float | Tensor"  # one time for the whole batch, or [B]


@dataclass(frozen=True)
class Transition:
    """A Gaussian step: `mean` is float32 [B, ...], `std` broadcasts against it."""

    mean: Tensor
    std: Tensor

    def sample(self, generators: Generators) -> Tensor:
        """Draw x_s, [B, ...]; if std is 0 everywhere, return the mean and draw nothing."""
        if not self.std.any():
            return self.mean
        noise = generators.randn(self.mean.shape[1:])
        return self.mean + self.std * noise.to(self.mean.device)

    def log_prob(self, x_s: Tensor) -> Tensor:
        """Return the log-density of x_s, averaged over the non-batch elements, [B].

        Clip ranges of 1e-5 to 1e-3 refer to this average; with a sum, ratios would be far larger.

        Raises:
            ValueError: the step is deterministic and has no density.
        """
        if not self.std.all():
            raise ValueError("a deterministic step (std = 0) has no density")
        # Always in float32: ratios differ from 1 in the last digits.
        z = (x_s.float() - self.mean) / self.std
        log_density = -0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)
        return log_density.flatten(1).mean(1)


def x0_estimate(x_t: Tensor, v: Tensor, t: Time) -> Tensor:
    """Return the estimate of the data, x0_hat = x_t - t v."""
    return x_t.float() - _like(t, x_t) * v.float()


def interpolate(x_0: Tensor, e: Tensor, t: Time) -> Tensor:
    """Return the noised data x_t = (1 - t) x_0 + t e."""
    t_ = _like(t, x_0)
    return (1 - t_) * x_0 + t_ * e


def x1_estimate(x_t: Tensor, v: Tensor, t: Time) -> Tensor:
    """Return the estimate of the noise, x1_hat = x_t + (1 - t) v."""
    return x_t.float() + (1 - _like(t, x_t)) * v.float()


def ode(x_t: Tensor, v: Tensor, t: Time, s: Time) -> Transition:
    """Euler step of the probability-flow ODE; std = 0."""
    t_, s_ = _like(t, x_t), _like(s, x_t)
    return Transition(x_t.float() + (s_ - t_) * v.float(), torch.zeros_like(s_))


def flow_sde(x_t: Tensor, v: Tensor, t: Time, s: Time, eta: float = 0.7) -> Transition:
    """Flow-GRPO's SDE step (Liu et al., 2025, Eq. 9), g = eta sqrt(t / (1 - t)).

    At t = 1 g diverges, so 1 - t is taken at the next grid point, as published.
    """
    t_, s_ = _like(t, x_t), _like(s, x_t)
    g = eta * (t_ / (1 - torch.where(t_ >= 1, s_, t_))).sqrt()
    return _sde(x_t, v, t_, s_, g)


def dance_sde(x_t: Tensor, v: Tensor, t: Time, s: Time, eta: float = 0.3) -> Transition:
    """DanceGRPO's SDE step (Xue et al., 2025): as `flow_sde` with a constant g = eta."""
    t_, s_ = _like(t, x_t), _like(s, x_t)
    return _sde(x_t, v, t_, s_, torch.full_like(t_, eta))


def renoise(x_t: Tensor, v: Tensor, t: Time, s: Time, eta: Time) -> Transition:
    """Re-noising step x_s = (1 - s) x0_hat + s (sqrt(1 - eta^2) x1_hat + eta e).

    eta = 0 equals `ode`, eta = 1 equals `anneal`.
    """
    s_, eta_ = _like(s, x_t), _like(eta, x_t)
    keep = (1 - eta_.square()).clamp(min=0).sqrt()
    mean = (1 - s_) * x0_estimate(x_t, v, t) + s_ * keep * x1_estimate(x_t, v, t)
    return Transition(mean, s_ * eta_)


def cps(x_t: Tensor, v: Tensor, t: Time, s: Time, eta: float = 0.7) -> Transition:
    """Coefficient-preserving sampling (Wang and Yu, 2025): std = s sin(eta pi / 2)."""
    return renoise(x_t, v, t, s, math.sin(eta * math.pi / 2))


def anneal(x_t: Tensor, v: Tensor, t: Time, s: Time) -> Transition:
    """TAFS re-noising step (Yue et al., 2026, Eqs. 4-7): x_s = (1 - s) x0_hat + s e.

    The printed Eq. 4 omits x_T, and the printed Eq. 5 omits the factor (1 - s).
    """
    s_ = _like(s, x_t)
    return Transition((1 - s_) * x0_estimate(x_t, v, t), s_)


def ode_to(x_t: Tensor, x0_hat: Tensor, t: Time, s: Time) -> Tensor:
    """Euler step from the estimate of the data: x_s = x0_hat + (s / t) (x_t - x0_hat)."""
    t_, s_ = _like(t, x_t), _like(s, x_t)
    return x0_hat + s_ / t_ * (x_t.float() - x0_hat)


def dpm_solver_to(
    x_t: Tensor, x0_hat: Tensor, t: Time, s: Time, x0_before: Tensor, t_before: Time
) -> Tensor:
    """DPM-Solver++(2M) step to s > 0 (Lu et al., 2022, Algorithm 2) for x_t = (1 - t) x_0 + t e.

    With lambda = log((1 - t) / t) and h = lambda_s - lambda_t, the data estimate is extrapolated
    from the current and the previous step: D = x0_hat + h / (2 h_before) (x0_hat - x0_before).
    """
    t_, s_, u_ = _like(t, x_t), _like(s, x_t), _like(t_before, x_t)
    h = _half_log_snr(s_) - _half_log_snr(t_)
    h_before = _half_log_snr(t_) - _half_log_snr(u_)
    estimate = x0_hat + h / (2 * h_before) * (x0_hat - x0_before)
    return s_ / t_ * x_t.float() - (1 - s_) * torch.expm1(-h) * estimate


def _half_log_snr(t: Tensor) -> Tensor:
    return torch.log1p(-t) - t.log()


def _sde(x_t: Tensor, v: Tensor, t: Tensor, s: Tensor, g: Tensor) -> Transition:
    drift = v.float() + g.square() / (2 * t) * x1_estimate(x_t, v, t)
    return Transition(x_t.float() + drift * (s - t), g * (t - s).sqrt())


def _like(time: Time, x: Tensor) -> Tensor:
    """Return the time as float32 that broadcasts against x: [B, 1, ..., 1] or a scalar."""
    value = torch.as_tensor(time, dtype=torch.float32, device=x.device)
    return value.view(-1, *[1] * (x.dim() - 1)) if value.dim() else value


def uniform_grid(steps: int) -> Tensor:
    """Return equidistant times from 1 to 0, [steps + 1]: t_n = 1 - (n - 1) / N (Eq. 4)."""
    return torch.linspace(1, 0, steps + 1)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Shift times towards noise, t -> shift t / (1 + (shift - 1) t) (Esser et al., 2024)."""
    return shift * t / (1 + (shift - 1) * t)


Step: TypeAlias = "Callable[[Tensor, Tensor, Tensor, Tensor], Transition]"


class Sampler(NamedTuple):
    """How an evaluation samples a model."""

    step: Step
    uniform: bool  # whether the grid is uniform (Eq. 4); otherwise it is the model's own
    title: str


SAMPLERS = {
    "ode": Sampler(ode, uniform=False, title="Euler steps on the model's grid"),
    "ode_uniform": Sampler(ode, uniform=True, title="Euler steps on the uniform grid"),
    "anneal": Sampler(anneal, uniform=True, title="annealed sampling"),
}

# For policies: samplers whose steps have a density. The last argument is the noise level eta.
TRANSITIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, float], Transition]] = {
    "anneal": lambda x_t, v, t, s, eta: anneal(x_t, v, t, s),
    "cps": cps,
    "dance_sde": dance_sde,
    "flow_sde": flow_sde,
}


def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    grid: Tensor,
    step: Step,
    generators: Generators,
) -> Tensor:
    """Sample from noise to data with one sampler, with N network evaluations.

    Args:
        velocity: (x_t [B, ...], t [B]) -> v [B, ...].
        noise: x_1, [B, ...].
        grid: times from 1 to 0, [N + 1].
        step: of a value of SAMPLERS.
        generators: the source of the steps' noise; not the one that drew `noise`.

    Returns:
        x_0, [B, ...].
    """
    x = noise
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        x = step(x, velocity(x, t.expand(len(x))), t, s).sample(generators)
    return x
