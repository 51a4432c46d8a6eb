"""Group-relative policy optimisation: advantages, ratio, clipped objective, KL (Eqs. 1-3, 9, 10).

Pure functions of tensors. Reward tensors are [..., groups, G]: G images of one prompt in a group.
NaN is a missing reward: no mean and no standard deviation knows of it, and its advantage is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CREDITS = ("step", "sum", "to_go", "final")


def mean_of_known(values: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """The mean over `dim` of what is not NaN; NaN where nothing is known.

    Where nothing is missing it is `Tensor.mean`, bit for bit.
    """
    mean = values.mean(dim, keepdim=keepdim)
    return torch.where(mean.isnan(), values.nanmean(dim, keepdim=keepdim), mean)


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """(R - mean) / std over the G images of a prompt at the same step (Eq. 9).

    The text of the paper says variance; the standard deviation is meant. A group whose rewards are
    all equal, or of which fewer than two are known, carries no preference: its advantages are
    exactly 0.

    Args:
        rewards: [..., groups, G].
    """
    centred = rewards - mean_of_known(rewards, -1, keepdim=True)
    std = mean_of_known(centred.square(), -1, keepdim=True).sqrt()
    known = ~rewards.isnan() & (std > eps * 1e-2)
    return torch.where(known, centred / (std + eps), torch.zeros_like(centred))


def global_std_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """Flow-GRPO's advantages: per-prompt mean, std over the whole batch.

    The only known reward of a group has advantage 0, but it counts in the batch's std.

    Args:
        rewards: [..., groups, G]; each leading index is a batch of its own.
    """
    centred = rewards - mean_of_known(rewards, -1, keepdim=True)
    spread = (rewards - mean_of_known(rewards, (-2, -1), keepdim=True)).square()
    std = mean_of_known(spread, (-2, -1), keepdim=True).sqrt()
    return torch.where(rewards.isnan(), torch.zeros_like(centred), centred / (std + eps))


def assign_credit(advantages: Tensor, credit: str, steps: int) -> Tensor:
    """Advantage of each re-noising step from the advantages of the images they lead to.

    Args:
        advantages: [K, groups, G] of the last K = N_adv of the images x0_hat^n, n = 2..N.
        credit: `step` (Eq. 10), `sum` (Algorithm 1, line 18), `to_go` (sum over m >= n), `final`
            (the last image's, for every step: "w/o Step Adv."). Under `step`, an action whose own
            image does not count takes the first one that does, so that N_adv = 1 is `final`, as
            Tables 3 and 5 print it.
        steps: N - 1.

    Returns:
        [steps, groups, G].
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
    """`loss` is a scalar to minimise; the others describe the batch, detached."""

    loss: Tensor
    ratio: Tensor  # [B]
    clipped: Tensor  # [B] bool: the clipped branch was taken


def clipped_objective(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float
) -> Objective:
    """-mean(min(r A, clip(r, 1 - eps, 1 + eps) A)) with r = exp(log_prob - old) (Eqs. 2, 10).

    The mean is over all images. One with a missing reward has advantage 0: it adds 0 to the sum and
    to the gradient, and the others' terms weigh what they would weigh beside it.

    Args:
        log_prob, old_log_prob, advantages: [B].
    """
    ratio = (log_prob - old_log_prob).exp()
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
    plain, limited = ratio * advantages, bounded * advantages
    loss = -torch.minimum(plain, limited).mean()
    return Objective(loss, ratio.detach(), (limited < plain).detach())


def gaussian_kl(mean: Tensor, reference_mean: Tensor, std: Tensor) -> Tensor:
    """KL of two Gaussians of equal std, averaged over the non-batch elements, [B] (Eq. 3)."""
    return ((mean - reference_mean).square() / (2 * std.square())).flatten(1).mean(1)
