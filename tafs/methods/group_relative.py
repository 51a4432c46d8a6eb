"""The base class of methods that learn from group-relative advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tafs.methods import grpo
from tafs.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class GroupRelative(Method):
    """Advantages that compare the images of one prompt (Eqs. 1, 9).

    Subclasses say which images are scored and how their advantages are credited to the trained
    steps; `nfe_theta` is the number of these.
    """

    normalize_rewards: bool = False  # True: the weighted sum of each reward's own advantages
    global_std: bool = False  # True: divide by the batch's std instead of each group's
    advantage_limit: float | None = None  # advantages are clamped to +- this limit
    shared_noise: bool = False  # True: all images of a group start from the same noise

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.advantage_limit is not None:
            self._at_least("advantage_limit", 0)

    @property
    def nfe_theta(self) -> int:
        raise NotImplementedError

    @property
    def shares_start_noise(self) -> bool:
        return self.shared_noise

    def scored_steps(self) -> Sequence[int]:
        """Return the indices of the steps whose x0_hat is scored; -1 is the final image."""
        return (-1,)

    def assign_credit(self, advantages: Tensor, steps: int) -> Tensor:
        """Map advantages of scored images [K, groups, G] to trained steps, [steps, groups, G]."""
        return advantages[-1:].expand(steps, -1, -1)

    def compute_advantages(
        self, rewards: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> Tensor:
        """Normalise the weighted sum of the rewards, or each reward before the weighted sum."""
        if self.normalize_rewards:
            advantages = torch.stack([w * self.advantages(rewards[n]) for n, w in weights.items()])
            return self.assign_credit(advantages.sum(0), self.nfe_theta)
        total = torch.stack([w * rewards[n] for n, w in weights.items()]).sum(0)
        return self.assign_credit(self.advantages(total), self.nfe_theta)

    def advantages(self, rewards: Tensor) -> Tensor:
        """Normalise rewards [K, groups, G] to advantages of the images that take credit.

        A missing reward is NaN and must not influence the advantages of other images.
        """
        normalise = grpo.global_std_advantages if self.global_std else grpo.group_advantages
        advantages = normalise(rewards)
        if self.advantage_limit is None:
            return advantages
        return advantages.clamp(-self.advantage_limit, self.advantage_limit)
