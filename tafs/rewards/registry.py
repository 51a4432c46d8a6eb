"""Sets of rewards on one device, and the checks of their input."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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

    @torch.no_grad()
    def score(
        self, images: Tensor, prompts: Sequence[Prompt], chunk: int = 512
    ) -> dict[str, Tensor]:
        """Training-scale scores by name, [B] each; images [B, 3, H, W] in [0, 1].

        Raises:
            ValueError: an image holds NaN or infinity; names the rewards and the image.
        """
        check_finite(", ".join(self.names), images)
        parts = [slice(low, low + chunk) for low in range(0, len(images), chunk)]
        return {
            reward.name: torch.cat([reward.score(images[part], prompts[part]) for part in parts])
            for reward in self.rewards
        }

    def differentiate(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Training-scale scores by name, [B] each, with gradients to the images.

        Raises:
            ValueError: a reward has no gradient, or an image holds NaN or infinity; names them.
        """
        check_finite(", ".join(self.names), images)
        for reward in self.rewards:
            if not reward.differentiable:
                raise ValueError(f"reward {reward.name!r} is not differentiable")
        return {reward.name: reward.score(images, prompts) for reward in self.rewards}

    def report(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Training-scale scores on the published scales."""
        return {r.name: r.report(scores[r.name]) for r in self.rewards}


def check_finite(name: str, images: Tensor) -> None:
    """Refuse images [B, ...] with NaN or infinity.

    Raises:
        ValueError: an image holds NaN or infinity; names the reward and the image.
    """
    broken = ~images.detach().flatten(1).isfinite().all(1)
    if broken.any():
        first = int(broken.nonzero()[0, 0])
        raise ValueError(f"reward {name}: image {first} of {len(images)} holds NaN or infinity")


def check_images(name: str, images: Tensor, prompts: Sequence[Prompt]) -> None:
    """Refuse images that a reward model would fail on or score wrongly.

    Raises:
        ValueError: images are not [B, 3, H, W], B > 0, float32, with one prompt each, finite and in
            [0, 1]; names the reward.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"reward {name}: images must be [B, 3, H, W], not {list(images.shape)}")
    if images.dtype != torch.float32:
        raise ValueError(f"reward {name}: images must be float32, not {images.dtype}")
    if len(images) == 0:
        raise ValueError(f"reward {name}: there are no images to score")
    if len(images) != len(prompts):
        raise ValueError(f"reward {name}: {len(images)} images, but {len(prompts)} prompts")
    check_finite(name, images)
    low, high = (value.item() for value in images.detach().aminmax())
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ValueError(
            f"reward {name}: images must be in [0, 1], not from {low:.3g} to {high:.3g}"
        )


def load(names: Sequence[str], build: Callable[[str], Reward]) -> RewardSet:
    """Load rewards by name with an asset source's `build`.

    Raises:
        ValueError: an unknown reward; lists those available.
    """
    for name in names:
        plugin(name)
    return RewardSet([build(name) for name in names])
