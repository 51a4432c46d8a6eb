"""Samplers as Gaussian transitions x_s | x_t ~ N(mean, std^2 I), for times t > s.

t = 1 is noise and t = 0 is data: x_t = (1 - t) x_0 + t e, and the network predicts v = e - x_0.
Rollout and loss build the same Transition from the same function, so they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Time = float | Tensor  # one time for the batch, or [B]


@dataclass(frozen=True)
class Transition:
    """A Gaussian step. `mean` is float32 [B, ...]; `std` broadcasts against it."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """One draw of x_s, [B, ...]; the mean itself where std is 0 everywhere."""
        if not self.std.any():
            return self.mean
        noise = torch.randn(
            self.mean.shape, generator=generator, device=generator.device, dtype=self.mean.dtype
        )
        return self.mean + self.std * noise.to(self.mean.device)

    def log_prob(self, x_s: Tensor) -> Tensor:
        """Log-density of x_s averaged over the non-batch elements, [B].

        The average, not the sum, is what clip ranges of 1e-5 .. 1e-3 are relative to.

        Raises:
            ValueError: the step is deterministic and has no density.
        """
        if not self.std.all():
            raise ValueError("a deterministic step (std = 0) has no density")
        # Ratios live in the last digits: the quadratic form is taken in float32 whatever x_s is.
        z = (x_s.float() - self.mean) / self.std
        log_density = -0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)
        return log_density.flatten(1).mean(1)


def x0_estimate(x_t: Tensor, v: Tensor, t: Time) -> Tensor:
    """The data that the velocity points to: x0_hat = x_t - t v."""
    return x_t.float() - _like(t, x_t) * v.float()


def x1_estimate(x_t: Tensor, v: Tensor, t: Time) -> Tensor:
    """The noise that the velocity points to: x1_hat = x_t + (1 - t) v."""
    return x_t.float() + (1 - _like(t, x_t)) * v.float()


def ode(x_t: Tensor, v: Tensor, t: Time, s: Time) -> Transition:
    """Euler's step along the probability-flow ODE; std = 0."""
    t_, s_ = _like(t, x_t), _like(s, x_t)
    return Transition(x_t.float() + (s_ - t_) * v.float(), torch.zeros_like(s_))


def flow_sde(x_t: Tensor, v: Tensor, t: Time, s: Time, eta: float = 0.7) -> Transition:
    """Flow-GRPO's SDE step (Liu et al., 2025, Eq. 9), g = eta sqrt(t / (1 - t)).

    At t = 1, where g diverges, 1 - t is taken at the next grid point, as published.
    """
    t_, s_ = _like(t, x_t), _like(s, x_t)
    g = eta * (t_ / (1 - torch.where(t_ >= 1, s_, t_))).sqrt()
    return _sde(x_t, v, t_, s_, g)


def dance_sde(x_t: Tensor, v: Tensor, t: Time, s: Time, eta: float = 0.3) -> Transition:
    """DanceGRPO's SDE step (Xue et al., 2025): the same drift with a constant g = eta."""
    t_, s_ = _like(t, x_t), _like(s, x_t)
    return _sde(x_t, v, t_, s_, torch.full_like(t_, eta))


def cps(x_t: Tensor, v: Tensor, t: Time, s: Time, eta: float = 0.7) -> Transition:
    """Coefficient-preserving sampling (Wang and Yu, 2025): std = s sin(eta pi / 2).

    eta = 0 is `ode`, eta = 1 is `anneal`.
    """
    s_ = _like(s, x_t)
    std = s_ * math.sin(eta * math.pi / 2)
    keep = (s_.square() - std.square()).clamp(min=0).sqrt()
    mean = (1 - s_) * x0_estimate(x_t, v, t) + keep * x1_estimate(x_t, v, t)
    return Transition(mean, std)


def anneal(x_t: Tensor, v: Tensor, t: Time, s: Time) -> Transition:
    """TAFS re-noising (Yue et al., 2026, Eqs. 4-7): x_s = (1 - s) x0_hat + s e.

    With the signs of the convention above: Eq. 4 omits x_T and Eq. 5 omits the factor (1 - s).
    """
    s_ = _like(s, x_t)
    return Transition((1 - s_) * x0_estimate(x_t, v, t), s_)


def _sde(x_t: Tensor, v: Tensor, t: Tensor, s: Tensor, g: Tensor) -> Transition:
    drift = v.float() + g.square() / (2 * t) * x1_estimate(x_t, v, t)
    return Transition(x_t.float() + drift * (s - t), g * (t - s).sqrt())


def _like(time: Time, x: Tensor) -> Tensor:
    """The time as float32 that broadcasts against x: [B, 1, ..., 1] or a scalar."""
    value = torch.as_tensor(time, dtype=torch.float32, device=x.device)
    return value.view(-1, *[1] * (x.dim() - 1)) if value.dim() else value


def uniform_grid(steps: int) -> Tensor:
    """[steps + 1] equidistant times from 1 to 0: t_n = 1 - (n - 1) / N (Eq. 4)."""
    return torch.linspace(1, 0, steps + 1)


Step = Callable[[Tensor, Tensor, Tensor, Tensor], Transition]
SAMPLERS: dict[str, Step] = {"ode": ode, "anneal": anneal}  # evaluation


def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    grid: Tensor,
    step: Step,
    generator: torch.Generator,
) -> Tensor:
    """Walk the grid from noise to data with one sampler; len(grid) - 1 evaluations.

    Args:
        velocity: (x_t [B, ...], t [B]) -> v.
        noise: x_1, [B, ...]; grid: [N + 1] from 1 to 0.
        generator: the stream of the steps' noise; it must not be the one that drew `noise`.
    """
    x = noise
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        x = step(x, velocity(x, t.expand(len(x))), t, s).sample(generator)
    return x
