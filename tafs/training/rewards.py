"""The rewards of an iteration's images, and how many of them may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tafs.common import errors
from tafs.methods import grpo
from tafs.rewards.registry import MISSING_SHARE


class NonFinite(errors.RunFailed):
    """An image, reward, loss or gradient is NaN or infinite; its update was not made."""


@dataclass
class IterationRewards:
    """Rewards of the scored images of all processes; NaN in every reward of an invalid image."""

    by_name: dict[str, Tensor]  # training scale, [K, groups, G]
    reported: dict[str, Tensor]  # published scale, [K, groups, G]
    weights: Mapping[str, float]
    invalid: Tensor  # bool [groups, G]: some reward at some step is NaN or infinite

    @property
    def total(self) -> Tensor:
        """The weighted sum of the rewards, [K, groups, G]."""
        parts = [weight * self.by_name[name] for name, weight in self.weights.items()]
        return torch.stack(parts).sum(0)

    @property
    def spread(self) -> float:
        """The mean over groups of the total's standard deviation within a group at the last step.

        Only valid images count, and only groups with two or more of them; NaN without such a group.
        """
        last = self.total[-1]
        std = last.std(-1)
        for group in self.invalid.any(-1).nonzero().flatten().tolist():
            valid = last[group][~self.invalid[group]]
            std[group] = valid.std() if len(valid) > 1 else torch.nan
        return grpo.mean_of_known(std, 0).item()


def tolerated(images: int) -> int:
    """How many images of an iteration may lack a reward: MISSING_SHARE of them.

    At least one, because a share means little in a small batch, and never all of them.
    """
    return min(max(1, int(MISSING_SHARE * images)), images - 1)


def invalid_images(
    rewards: Mapping[str, Tensor], iteration: int, *, needs_gradients: bool
) -> Tensor:
    """Find the images without a finite reward: bool [groups, G].

    Args:
        rewards: of all processes, [K, groups, G] each.
        needs_gradients: whether the method differentiates the rewards; no image may then lack one.

    Raises:
        NonFinite: too many images lack a reward; names the first of them and the limit.
    """
    missing = torch.stack([~values.isfinite() for values in rewards.values()])
    invalid = missing.any(0).any(0)
    count, images = int(invalid.sum()), invalid.numel()
    allowed = 0 if needs_gradients else tolerated(images)
    if count > allowed:
        image = int(invalid.flatten().nonzero()[0, 0])
        which, step = missing.flatten(2)[:, :, image].nonzero()[0].tolist()
        name, values = list(rewards.items())[which]
        limit = f"at most {allowed} may ({MISSING_SHARE:.0%}, or one)"
        if needs_gradients:
            limit = "none may where the method differentiates it"
        raise NonFinite(
            f"iteration {iteration}: reward {name!r} is {values[step].flatten()[image].item()} "
            f"for image {image}, scored step {step + 1} of {len(values)}; {count} of {images} "
            f"images ({count / images:.1%}) lack a finite reward, {limit}"
        )
    return invalid
