"""Group-relative policy optimisation: advantages, ratio, clipped objective, KL (Eqs. 1-3, 9, 10).

Pure functions of tensors. Rewards are [..., groups, G], with G images of one prompt in a group.
NaN marks a missing reward: means and standard deviations ignore it, and its advantage is 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

CREDITS = ("step", "sum", "to_go", "final")
SAME_ULPS = 4  # rewards whose range is at most this many roundings of the largest are equal


def mean_of_known(values: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """Return the mean over `dim` of the values that are not NaN; NaN if all of them are NaN.

    Without NaN the result equals `Tensor.mean` bit for bit.
    """
    mean = values.mean(dim, keepdim=keepdim)
    return torch.where(mean.isnan(), values.nanmean(dim, keepdim=keepdim), mean)


def centred(rewards: Tensor) -> Tensor:
    """Subtract the mean of each group; NaN where a reward is missing.

    Exactly 0 in a group without a preference: fewer than two rewards are known, or they differ by
    no more than float rounding. The computed mean of equal numbers may differ from them.
    """
    missing = rewards.isnan()
    low = rewards.masked_fill(missing, math.inf).amin(-1, keepdim=True)
    high = rewards.masked_fill(missing, -math.inf).amax(-1, keepdim=True)
    rounding = SAME_ULPS * torch.finfo(rewards.dtype).eps * torch.maximum(low.abs(), high.abs())
    difference = rewards - mean_of_known(rewards, -1, keepdim=True)
    return torch.where(high - low <= rounding, torch.zeros_like(rewards), difference)


def binade(values: Tensor) -> Tensor:
    """Return the power of two 2^e with 2^(e-1) <= |value| < 2^e; 1 for the value 0.

    Dividing by it keeps squares in the range of the dtype and changes no digit of them.
    """
    mantissa, _ = torch.frexp(values)
    return torch.where(values == 0, torch.ones_like(values), values / mantissa).abs()


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """Compute (R - mean) / (std + eps) over the G images of a prompt at the same step (Eq. 9).

    The text of the paper says "variance", but the standard deviation is meant. The advantages of a
    group without a preference (see `centred`) are exactly 0.
    """
    differences = centred(rewards)
    std = _root_mean_square(differences, -1)
    return torch.where(rewards.isnan(), torch.zeros_like(rewards), differences / (std + eps))


def global_std_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """Compute Flow-GRPO's advantages: the mean of each group, the std of the whole batch.

    Each leading index is a separate batch. The advantages of a group without a preference (see
    `centred`) are exactly 0, but its rewards count in the batch's std.
    """
    spread = rewards - mean_of_known(rewards, (-2, -1), keepdim=True)
    std = _root_mean_square(spread, (-2, -1))
    return torch.where(rewards.isnan(), torch.zeros_like(rewards), centred(rewards) / (std + eps))


def _root_mean_square(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return the root mean square of the values that are not NaN; `dim` is kept."""
    unit = binade(values.abs().nan_to_num(0.0).amax(dim, keepdim=True))
    return mean_of_known((values / unit).square(), dim, keepdim=True).sqrt() * unit


def assign_credit(advantages: Tensor, credit: str, steps: int) -> Tensor:
    """Compute the advantage of each re-noising step from those of the images it leads to.

    Args:
        advantages: [K, groups, G], of the last K = N_adv of the images x0_hat^n, n = 2..N.
        credit: how a step is credited:
            `step`: with its own image (Eq. 10). A step whose own image is not among the last K
                takes the first image that is, so that N_adv = 1 equals `final`, as in Tables 3
                and 5;
            `sum`: with the sum over all images (Algorithm 1, line 18);
            `to_go`: with the sum over its own image and all later ones (m >= n);
            `final`: with the last image ("w/o Step Adv.").
        steps: the number of re-noising steps, N - 1.

    Returns:
        The advantages of the steps, [steps, groups, G].

    Raises:
        ValueError: `credit` is none of CREDITS.
    """
    first_counted = (torch.arange(steps) - (steps - len(advantages))).clamp(min=0)
    if credit == "step":
        return advantages[first_counted]
    if credit == "final":
        return advantages[-1:].expand(steps, -1, -1)
    to_go = advantages.flip(0).cumsum(0).flip(0)
    if credit == "sum":
        return to_go[:1].expand(steps, -1, -1)
    if credit == "to_go":
        return to_go[first_counted]
    raise ValueError(f"unknown credit {credit!r} (available: {', '.join(CREDITS)})")


class Objective(NamedTuple):
    """The clipped objective of a batch; only `loss` has gradients."""

    loss: Tensor  # scalar, to minimise
    ratio: Tensor  # [B]
    clipped: Tensor  # [B] bool, whether the clipped term is the smaller one

    @property
    def metrics(self) -> dict[str, Tensor]:
        """What the journal records of it, [B] each."""
        return {
            "ratio_deviation": (self.ratio - 1).abs(),
            "clip_fraction": self.clipped.float(),
        }


def clipped_objective(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float
) -> Objective:
    """Compute -mean(min(r A, clip(r, 1 - eps, 1 + eps) A)), r = exp(log_prob - old) (Eqs. 2, 10).

    The mean is over all images. An image with a missing reward has advantage 0 and adds nothing to
    the gradient, but it counts in the mean.

    Args:
        log_prob: [B], with gradients.
        old_log_prob: [B], under the policy that sampled.
        advantages: [B].
        clip_range: eps.
    """
    ratio = (log_prob - old_log_prob).exp()
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
    plain, limited = ratio * advantages, bounded * advantages
    loss = -torch.minimum(plain, limited).mean()
    return Objective(loss, ratio.detach(), (limited < plain).detach())


def gaussian_kl(mean: Tensor, reference_mean: Tensor, std: Tensor) -> Tensor:
    """Return the KL of two Gaussians with equal std, mean over non-batch elements, [B] (Eq. 3)."""
    return ((mean - reference_mean).square() / (2 * std.square())).flatten(1).mean(1)
