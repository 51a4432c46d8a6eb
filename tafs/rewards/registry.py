"""Sets of rewards on one device, and the checks of their input."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tafs.data.prompts import Prompt
from tafs.rewards.metrics import Reward, plugin

# Share of an iteration's or an evaluation's images that may have no score before the work stops.
MISSING_SHARE = 0.1
ROUNDING = 1e-3  # tolerated excess over [0, 1] of a pixel; a quarter of an 8-bit step


class RewardSet:
    """Several rewards on one device, loaded once."""

    def __init__(self, rewards: Sequence[Reward]) -> None:
        self.rewards = tuple(rewards)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(r.name for r in self.rewards)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The modules of all rewards."""
        return tuple(network for reward in self.rewards for network in reward.networks)

    @torch.no_grad()
    def score(
        self, images: Tensor, prompts: Sequence[Prompt], chunk: int = 512
    ) -> dict[str, Tensor]:
        """Training-scale scores by name, [B] each; images [B, 3, H, W] in [0, 1].

        Raises:
            ValueError: wrong images or prompts; names the rewards and the image.
        """
        check_batch(", ".join(self.names), images, prompts)
        parts = [slice(low, low + chunk) for low in range(0, max(1, len(images)), chunk)]
        return {
            reward.name: torch.cat([reward.score(images[part], prompts[part]) for part in parts])
            for reward in self.rewards
        }

    def differentiate(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Training-scale scores by name, [B] each, with gradients to the images.

        Raises:
            ValueError: a reward has no gradient, or wrong images or prompts; names them.
        """
        check_batch(", ".join(self.names), images, prompts)
        for reward in self.rewards:
            if not reward.differentiable:
                raise ValueError(f"reward {reward.name!r} is not differentiable")
        return {reward.name: reward.score(images, prompts) for reward in self.rewards}

    def report(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Training-scale scores on the published scales."""
        return {r.name: r.report(scores[r.name]) for r in self.rewards}


def check_batch(name: str, images: Tensor, prompts: Sequence[Prompt]) -> None:
    """Refuse images [B, ...] without one prompt each, or with NaN or infinity.

    Raises:
        ValueError: names the reward, and the first image that is not finite.
    """
    if images.ndim == 0 or len(images) != len(prompts):
        count = len(images) if images.ndim else "no batch of"
        raise ValueError(f"reward {name}: {count} images, but {len(prompts)} prompts")
    finite = images.detach().isfinite()
    if not finite.all():
        first = int((~finite).nonzero()[0, 0])
        raise ValueError(f"reward {name}: image {first} of {len(images)} holds NaN or infinity")


def check_images(name: str, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Return the images in float32; refuse those that a model would fail on or score wrongly.

    Raises:
        ValueError: images are not [B, 3, H, W] of floating-point numbers in [0, 1], or have not one
            prompt each; names the reward.
    """
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"reward {name}: images must be [B, 3, H, W], not {list(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(
            f"reward {name}: images must be floating-point numbers in [0, 1], not {images.dtype}"
        )
    check_batch(name, images, prompts)
    images = images.float()
    if len(images):
        low, high = (value.item() for value in images.detach().aminmax())
        if low < -ROUNDING or high > 1 + ROUNDING:
            raise ValueError(
                f"reward {name}: images must be in [0, 1], not from {low:.3g} to {high:.3g}"
            )
    return images


def load(names: Sequence[str], build: Callable[[str], Reward]) -> RewardSet:
    """Load rewards by name with an asset source's `build`.

    Raises:
        ValueError: an unknown reward; lists those available.
    """
    for name in names:
        plugin(name)
    return RewardSet([build(name) for name in names])
